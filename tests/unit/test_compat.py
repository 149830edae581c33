"""torchvision must import beside a torch it was not built for, and be left alone beside one it was built for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def run_python(code: str, *search_path: Path) -> str:
    program = f"import sys; sys.path[:0] = {[str(path) for path in (*search_path, ROOT)]}\n{code}"
    command = [sys.executable, "-W", "ignore", "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_torchvision_and_fedlab_import_and_print_nothing() -> None:
    imports = "import compat; compat.import_fedlab('fedlab.core'); import logging, torchvision.datasets\n"
    assert run_python(imports + "logging.getLogger('x').info('quiet')") == ""


def test_a_matching_torchvision_gets_nothing_registered(tmp_path: Path) -> None:
    """A package that imports without complaint stands for the matching build."""
    (tmp_path / "torchvision.py").write_text("")
    code = "import compat; compat.import_torchvision(); print(compat._registered)"
    assert run_python(code, tmp_path) == "[]"


def test_another_failure_of_torchvision_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('another failure')")
    code = "import compat\ntry: compat.import_torchvision()\nexcept RuntimeError as error: print(error)"
    assert run_python(code, tmp_path) == "another failure"


def test_pyarrow_is_not_loaded_on_the_way_and_can_be_afterwards() -> None:
    """It would cost each process some 35 MB, for a reader of files that few runs have."""
    imports = "import sys, compat; compat.import_fedlab('fedlab.core'); print('pyarrow' in sys.modules, end=' ')\n"
    assert run_python(imports + "import pyarrow; print('pyarrow' in sys.modules)") == "False True"
