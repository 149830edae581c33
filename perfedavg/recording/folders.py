"""Folders of runs: named, made, and removed again where nothing came of them. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable
from pathlib import Path


def make_folder(path: Path) -> list[Path]:
    """Create a folder and its parents; returns those that were not there, the innermost first. Raises OSError."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those that are empty, the innermost given first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def make_default_folder(parent: Path, dataset: str) -> Path:
    """Create `<parent>/<date-time>-<dataset>`, with a number behind it where another run has just taken that."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{dataset.replace(':', '.')}"
    parent.mkdir(parents=True, exist_ok=True)
    for suffix in itertools.chain([""], map("-{}".format, itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            path = parent / f"{stem}{suffix}"
            path.mkdir()
            return path
    raise AssertionError("unreachable")
