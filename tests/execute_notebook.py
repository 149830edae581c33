"""Executes examples/compare.ipynb in Jupyter, in place: .venv/bin/python tests/execute_notebook.py

Its outputs are committed; `code_digest` of the code that they are of stands in its metadata.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "compare.ipynb"


def code_digest(notebook: Any) -> str:
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells, in a kernel in this folder. Raises nbclient's CellExecutionError where one fails."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=300, startup_timeout=300, resources={"metadata": {"path": str(folder)}}).execute()


if __name__ == "__main__":
    import nbformat

    content = nbformat.read(NOTEBOOK, as_version=4)
    execute(content, NOTEBOOK.parent)
    for cell in content.cells:
        cell.metadata.pop("execution", None)
    content.metadata["code_digest"] = code_digest(content)
    nbformat.write(content, NOTEBOOK)
