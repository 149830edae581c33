"""Imports go one way, so that the algorithm can be read, tested and used without the network or the flags."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers import ROOT

OWN = {"perfedavg", "reporting", "experiments", "multi_process", "models", "datasets", "utils", "paths", "compat"}
OWN |= {"server", "client_worker", "single_process", "quick_start", "reproduce", "report", "sine", "personalize"}
MAY_IMPORT = {
    "compat": set(),
    "paths": set(),
    "models": set(),
    "datasets": {"compat", "perfedavg.contracts", "perfedavg.seeding"},
    "perfedavg": set(),
    "multi_process": {"compat", "perfedavg"},
    "reporting": {"perfedavg", "datasets.registry"},
    "experiments": {"perfedavg", "utils", "quick_start"},
    "utils": {"paths", "perfedavg", "models", "datasets"},
}
ENTRY_POINTS_INSIDE = {ROOT / "datasets" / "describe.py"}
ONLY_MULTI_PROCESS = ("torch.distributed", "fedlab.core")


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py")) if (ROOT / package).is_dir() else [ROOT / f"{package}.py"]
    return [path for path in found if ".environments" not in path.parts]  # of benchmarks: what other systems need


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_only_multi_process_speaks_to_the_network() -> None:
    for package in (OWN - {"multi_process"}) | {"benchmarks"}:
        for path in modules(package):
            if path.is_relative_to(ROOT / "benchmarks" / "rivals"):
                continue  # other systems, with which this one is compared
            assert not any(name.startswith(ONLY_MULTI_PROCESS) for name in imports(path)), path
