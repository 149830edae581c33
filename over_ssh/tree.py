"""Code as it is here, to be found or copied elsewhere: this project, and the user's own modules."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launch.paths import ROOT
from over_ssh.on_host.program import tree_digest
from perfedavg.own_module import PROJECT_MODULES

_OF_NO_WORKER = {"tests", "benchmarks", "examples", "results"}


@dataclass(frozen=True)
class Tree:
    """Files below a folder, as they were when they were read: they may change while a run goes on.

    root: absolute.  files: their paths below it.
    digest: of names and contents.  archive: a compressed tar archive.
    """

    root: Path
    files: tuple[str, ...]
    digest: str
    archive: bytes = field(repr=False)

    @classmethod
    def read(cls, root: Path, files: Iterable[str]) -> Tree:
        """Raises FileNotFoundError where a file is gone."""
        names = tuple(sorted(files))
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz", compresslevel=4) as archive:
            for name in names:
                archive.add(root / name, name, recursive=False)
        digest = tree_digest(str(root), list(names))
        if digest is None:
            raise FileNotFoundError(f"a file of {root} cannot be read any more; try again")
        return cls(root, names, digest, content.getvalue())


def project_tree() -> Tree:
    """What a worker and its environment are made of: the project's packages, scripts and requirements."""
    return Tree.read(ROOT, _project_files())


def _project_files() -> Iterator[str]:
    for path in ROOT.iterdir():
        if path.suffix == ".sh" or path.name.startswith("requirements"):
            yield path.name
        elif path.stem in PROJECT_MODULES - _OF_NO_WORKER:
            yield from [path.name] if path.suffix == ".py" else _python_files(path, ROOT)


def own_tree(folder: Path, module_names: Iterable[str]) -> Tree | None:
    """The modules of the user's own that are named, with those beside them; None where none lies in the folder.

    Beside them are the modules and packages in each folder on the way to them. A folder on the way may be a package
    without an `__init__.py`.
    folder: in which they are looked for.  module_names: such as `package.module`.
    """
    files: set[str] = set()
    for name in module_names:
        *packages, module = name.split(".")
        ways = [folder.joinpath(*packages[:depth]) for depth in range(len(packages) + 1)]
        top = folder / name.partition(".")[0]
        if any(_is_module(path) for path in (top, ways[-1] / module)):
            files |= {file for way in ways for file in _modules_in(way, folder)}
    return Tree.read(folder, files) if files else None


def _is_module(path: Path) -> bool:
    return path.with_name(f"{path.name}.py").is_file() or (path / "__init__.py").is_file()


def _modules_in(folder: Path, root: Path) -> Iterator[str]:
    """The modules and packages in a folder, but in the root no packages by names that are this project's."""
    yield from (str(path.relative_to(root)) for path in folder.glob("*.py") if path.is_file())
    for path in folder.iterdir() if folder.is_dir() else ():
        if folder != root or path.name not in PROJECT_MODULES:
            yield from _python_files(path, root)


def _python_files(package: Path, root: Path) -> Iterator[str]:
    """Of a package and the packages in it, but of no folder of data."""
    if os.path.isfile(package / "__init__.py"):  # also where one may not look into it
        yield from _modules_in(package, root)
