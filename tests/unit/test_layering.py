"""Imports go one way, so that the algorithm can be read, tested and used without the network or the flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT

OWN = {"perfedavg", "launch", "reporting", "experiments", "multi_process", "models", "datasets", "utils", "compat"}
OWN |= {"python_api", "over_ssh", "cluster", "tuning"}
OWN |= {
    "server",
    "client_worker",
    "server_or_worker",
    "make_keys",
    "single_process",
    "quick_start",
    "reproduce",
    "report",
    "personalize",
    "tune",
}
MAY_IMPORT = {
    "compat": set(),
    "models": {"perfedavg.own_module"},
    "datasets": {"compat", *(f"perfedavg.{name}" for name in ("contracts", "fields", "own_files", "own_module"))}
    | {"perfedavg.seeding"},
    "perfedavg": set(),
    "multi_process": {"compat", "perfedavg"},
    "reporting": {"perfedavg", "datasets.registry"},
    "experiments": {"datasets", "launch", "perfedavg", "reporting", "utils"},
    "launch": {"datasets.registry", "perfedavg"},
    "utils": {"launch", "perfedavg", "models", "datasets"},
    "python_api": {"launch", "perfedavg", "utils"},
    "over_ssh": {"launch", "perfedavg", "utils", "multi_process.transport.keys"},
    "tuning": {"datasets.registry", "launch", "perfedavg", "utils"},
}
ROOMS = (
    "machine",
    "own_module",
    "fields",
    "own_kinds",
    "own_files",
    "plain_values",
    "seeding",
    "terminal",
    "aggregation",
    "methods",
    "metrics",
    "settings",
    "contracts",
    "training",
    "own_model",
    "engine",
    "recording",
    "terminal.time_to_go",
    "terminal.display",
    "personal_model",
    "client_of_run",
    "recorded_run",
)
"""The rooms and modules of perfedavg: each imports only those before it, but for the names of types."""
COMPUTE_LATER = ("methods", "metrics")
"""Rooms whose modules are settings when they are imported, and import what they compute with when they compute."""
MOST_MODULES = 12
MOST_AT_ROOT = 13
"""Entry points, one for each thing that people do, and the two modules that all of them share."""
ENTRY_POINTS_INSIDE = {ROOT / "datasets" / "describe.py", ROOT / "perfedavg" / "__init__.py"}
"""They import what lies above their package: the first when it is run, the second for those who import it."""
ONLY_MULTI_PROCESS = ("torch.distributed", "fedlab.core")


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py")) if (ROOT / package).is_dir() else [ROOT / f"{package}.py"]
    return [path for path in found if ".environments" not in path.parts]  # of benchmarks: what other systems need


def imports(path: Path) -> set[str]:
    return imported(ast.walk(ast.parse(path.read_text())))


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    for path in set(modules(package)) - ENTRY_POINTS_INSIDE:
        own = {name for name in imports(path) if name.partition(".")[0] in OWN - {package}}
        lower = tuple(f"{name}." for name in MAY_IMPORT[package])
        above = {name for name in own if not f"{name}.".startswith(lower)}
        assert not above, f"{path} imports {above}"


def test_perfedavg_parses_no_flags_and_imports_no_framework() -> None:
    """Its errors name flags, because a flag is what their reader mends; no module reads one."""
    for path in modules("perfedavg"):
        assert not {name.partition(".")[0] for name in imports(path)} & {"fedlab", "argparse", "getopt"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                assert node.attr != "argv", f"{path}:{node.lineno} reads the command line"


def test_the_algorithm_names_no_flag() -> None:
    """The flag of a setting is its field's; a message has it from there (`settings.flag`)."""
    for room in ("aggregation", "engine", "methods", "training", "settings", "contracts"):
        for path in modules(f"perfedavg/{room}"):
            tree = ast.parse(path.read_text())
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    assert not re.search(r"--\w", node.value), f"{path}:{node.lineno}: {node.value}"


def test_a_flag_is_written_once() -> None:
    """Its name follows from the settings' own names, and is not repeated by whoever names the setting."""
    product = [path for package in OWN for path in modules(package)]
    assert sum(path.read_text().count("--fine_tune_server_lr") for path in product) <= 1


def test_only_multi_process_speaks_to_the_network() -> None:
    for package in (OWN - {"multi_process"}) | {"benchmarks"}:
        for path in modules(package):
            if path.is_relative_to(ROOT / "benchmarks" / "rivals"):
                continue  # other systems, with which this one is compared
            assert not any(name.startswith(ONLY_MULTI_PROCESS) for name in imports(path)), path


def place(module: str) -> int:
    """Where a module of perfedavg, by its name there, stands among the rooms; the most special entry counts."""
    fitting = [number for number, room in enumerate(ROOMS) if f"{module}.".startswith(f"{room}.")]
    assert fitting, f"perfedavg.{module} is in none of ROOMS"
    return max(fitting)


def nodes_at_run_time(node: ast.AST, with_functions: bool) -> Iterator[ast.AST]:
    """All nodes below one, without what is there for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not for_types and (with_functions or not isinstance(child, ast.FunctionDef)):
            yield child
            yield from nodes_at_run_time(child, with_functions)


def upward_imports(module: str, source: str) -> set[str]:
    """What a module of perfedavg imports of rooms above its own."""
    nodes = nodes_at_run_time(ast.parse(source), with_functions=module.partition(".")[0] not in COMPUTE_LATER)
    names = {name for name in imported(nodes) if name.startswith("perfedavg.")}
    return {name for name in names if place(name.removeprefix("perfedavg.")) > place(module)}


def test_rooms_import_only_rooms_below_them() -> None:
    for path in modules("perfedavg"):
        module = ".".join(path.relative_to(ROOT / "perfedavg").with_suffix("").parts).removesuffix("__init__")
        if module:
            upward = upward_imports(module.rstrip("."), path.read_text())
            assert not upward, f"{path} imports {upward}, which lies above it"


def test_an_upward_import_is_seen_wherever_it_stands() -> None:
    source = "def f():\n    from perfedavg.recording.runs import FinishedRun\n"
    assert "perfedavg.recording.runs" in upward_imports("engine.experiment", source)
    assert not upward_imports("recorded_run", source)
    assert upward_imports("terminal.console", "import perfedavg.terminal.display")
    assert not upward_imports("methods.maml", source)
    assert upward_imports("methods.maml", "from perfedavg.training import layers")
    assert not upward_imports("engine.experiment", f"if TYPE_CHECKING:\n    {source.splitlines()[1].strip()}")


def test_a_folder_is_a_room_with_few_modules_and_one_subject() -> None:
    packages = [ROOT / name for name in OWN if (ROOT / name).is_dir()]
    folders = {path.parent for package in packages for path in package.rglob("*.py")}
    for folder in folders | {ROOT}:
        names = sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")
        most = MOST_AT_ROOT if folder == ROOT else MOST_MODULES
        assert len(names) <= most, f"{folder} has {len(names)} modules: {names}"
        if folder != ROOT:
            subject = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
            assert subject, f"{folder}/__init__.py does not say what the folder is for"


def test_fedlab_is_used_in_one_module() -> None:
    """Whatever of it does not fit is fitted there, and the rest can be read without knowing it."""
    users = {path.name for path in modules("multi_process") if any(name.startswith("fedlab") for name in imports(path))}
    assert users == {"fedlab_adapter.py"}


def test_the_transport_knows_neither_the_server_nor_the_work() -> None:
    for path in (ROOT / "multi_process" / "transport").glob("*.py"):
        own = {name.split(".")[1] for name in imports(path) if name.startswith("multi_process.")}
        assert own <= {"transport", "messages", "packing", "boundary", "fedlab_adapter"}, path
