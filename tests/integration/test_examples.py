"""The examples run as they stand, in less time; the notebook's outputs are those of its code, and came from Jupyter."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT, Launched, finish

sys.path.append(str(ROOT / "tests"))

from execute_notebook import NOTEBOOK, code_digest, execute

SHOWN = {
    "compare_methods.py": ("fedper over fedavg, client by client", "unseen"),
    "own_model_and_method.py": ("FedAvg round 2: training loss", "fine_tune trained"),
    "stop_and_go_on.py": ("stopped after round 1", "went on to its end: model", "model in client.pt"),
}


def test_every_script_is_listed_here() -> None:
    assert {path.name for path in NOTEBOOK.parent.glob("*.py")} == SHOWN.keys()


@pytest.mark.parametrize("name", SHOWN)
def test_a_script_runs_from_any_folder(name: str, launched: Launched, tmp_path: Path) -> None:
    status, output, errors = finish(launched.start(f"examples/{name}", "2", cwd=tmp_path))
    assert status == 0, errors
    for words in SHOWN[name]:
        assert words in " ".join(output.split()), output
    if name == "stop_and_go_on.py":
        digests = [line.split()[-1] for line in output.splitlines()[1:3]]
        assert len(set(digests)) == 1, output


def test_the_notebooks_outputs_are_of_its_code() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert notebook.metadata["code_digest"] == code_digest(notebook), "run tests/execute_notebook.py, and look at it"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", {"stream": None})}
    assert kinds >= {"image/png", "text/html", "stream"}
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_the_notebook_runs_in_jupyter(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("ROUNDS = 20", "ROUNDS = 3").replace('".."', repr(str(ROOT)))
        cell.source = cell.source.replace("workers=2", "workers=2, personalization_epochs=1")
    execute(notebook, tmp_path)
    assert len(list((tmp_path / "runs").glob("*-digits/result.json"))) == 2
    assert "image/png" in notebook.cells[-2].outputs[0]["data"]
