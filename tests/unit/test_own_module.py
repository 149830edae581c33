"""A user's module beside this project's: found without getting in its way, and errors in it named by file and line."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

from datasets import DatasetRequest, load_federated_dataset
from perfedavg.own_module import PROJECT_MODULES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, in which a user's modules lie. What is imported from it is forgotten after the test."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(name: str) -> str:
    """The line with which a data set is refused."""
    with pytest.raises(ValueError, match="--dataset") as refused:
        load_federated_dataset(DatasetRequest(name, None, lambda count: 1, None, seed=0), Path("nowhere"))
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(f"--dataset {name}")
    return line


def test_every_name_that_this_project_imports_by_is_known_as_its_own() -> None:
    """Otherwise a clash with a new module of this project would be told as an error of the user's."""
    packages = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert {path.stem for path in ROOT.glob("*.py")} | packages == PROJECT_MODULES


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from datasets import load_dataset", "datasets"),
        ("import datasets.packaged_modules", "datasets"),
        ("import datasets\ndatasets.load_dataset('mnist')", "datasets"),
        ("from models import Net", "models"),
        ("from models.resnet import Net", "models"),
        ("import utils\nutils.read_table()", "utils"),
        ("from compat import pickle", "compat"),
        ("import server\nserver.connect()", "server"),
    ],
)
def test_a_name_that_this_project_has_is_named_with_both_files(code: str, name: str, folder: Path) -> None:
    """What the user meant is an installed package; what they got is this project's."""
    line_number = len(code.splitlines())
    installed = folder / "installed" / name
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("load_dataset = read_table = Net = pickle = connect = None\n")
    sys.path.append(str(folder / "installed"))
    (folder / "users_tables.py").write_text(code + "\n")
    line = refusal("users_tables:Data")
    assert f"{folder / 'users_tables.py'}, line {line_number}: " in line
    assert f"; {name} is this project's {ROOT / name}" in line
    assert f"and not {installed}" in line
    assert "docs/your-own-data.md" in line


def test_a_users_file_of_a_name_that_this_project_has_is_named(folder: Path) -> None:
    (folder / "users_tables.py").write_text("import utils\n\nTABLE = utils.read_table()\n")
    (folder / "utils.py").write_text("def read_table(): return []\n")
    line = refusal("users_tables:Data")
    assert f"{folder / 'users_tables.py'}, line 3: AttributeError" in line
    assert f"utils is this project's {ROOT / 'utils.py'}, and not {folder / 'utils.py'}" in line


@pytest.mark.parametrize("name", ["datasets", "models", "utils", "report", "random"])
def test_a_data_set_in_a_file_of_a_name_that_is_taken(name: str, folder: Path) -> None:
    """It is not imported, nor does it take the place of what this project and Python need."""
    (folder / f"{name}.py").write_text("class Data: pass\n")
    line = refusal(f"{name}:Data")
    assert f"{name} is " in line
    assert f"here, not {folder / f'{name}.py'}; rename your file" in line
    taken = random.__file__ if name == "random" else str(ROOT / name)
    assert f"{name} is {taken}" in line


def test_what_a_users_module_lacks_is_named(folder: Path) -> None:
    """Not the user's own module, which is there."""
    (folder / "users_tables.py").write_text("import users_reader\n")
    (folder / "users_reader.py").write_text("\n\nimport no_such_library.tables\n")
    line = refusal("users_tables:Data")
    assert f"{folder / 'users_reader.py'}, line 3: ModuleNotFoundError: No module named 'no_such_library'" in line
    assert f"install it for {sys.executable}" in line


def test_a_module_that_is_not_there_is_told_where_it_was_looked_for(folder: Path) -> None:
    """A worker that was started in another folder says so."""
    (folder / "users_package").mkdir()
    (folder / "users_package" / "__init__.py").touch()
    for name in ("no_such_tables", "users_package.no_such_tables"):
        line = refusal(f"{name}:Data")
        assert f"No module named '{name}'" in line
        assert f"neither in {folder}, where this process was started" in line


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("x = 1\ndef f(:\n", "line 2: SyntaxError: invalid syntax"),
        ("x = 1\n\nx / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("raise OSError('a line\\nand another')\n", "line 1: OSError: a line and another"),
        ("import sys\nsys.exit('usage')\n", "line 2: SystemExit: usage; a module that is imported must not end"),
        (
            "from . import reader\n",
            "line 1: ImportError: attempted relative import with no known parent package; start in",
        ),
        ("import json\njson.loads('{')\n", "line 2: JSONDecodeError"),
        ("raise ValueError('\\x1b[2Jred')\n", "line 1: ValueError: ?[2Jred"),
        ("x = 1\n", "users_tables.py has no Data that can be called"),
        ("Data = 3\n", "users_tables.py has no Data that can be called"),
    ],
)
def test_a_module_that_fails_is_one_line_with_file_and_line(code: str, reason: str, folder: Path) -> None:
    (folder / "users_tables.py").write_text(code)
    line = refusal("users_tables:Data")
    assert "--dataset users_tables:Data cannot be imported" in line
    assert f"{folder / 'users_tables.py'}" in line
    assert reason in line


@pytest.mark.parametrize("name", [":Data", "users_tables:", ".tables:Data", "..:x"])
def test_a_name_that_is_no_module_and_factory(name: str, folder: Path) -> None:
    assert "it means package.module:factory" in refusal(name)


def test_a_package_imports_its_own_modules_whatever_they_are_called(folder: Path) -> None:
    """The way out that the error names: in a package, `utils` and `datasets` are the user's."""
    package = folder / "users_study"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "utils.py").write_text("FINGERPRINT = 5\n")
    (package / "datasets.py").write_text("from users_study.utils import FINGERPRINT\nfrom . import utils\n")
    (package / "tables.py").write_text(
        "from . import datasets, utils\n"
        "class Data:\n"
        "    num_classes, train_client_ids, unseen_client_ids = 2, [0], [1]\n"
        "    num_train_examples = client_data = None\n"
        "    fingerprint = utils.FINGERPRINT\n"
        "    def __init__(self, *arguments): pass\n"
    )
    assert "fingerprint is 5; it must be a text" in refusal("users_study.tables:Data")
