"""Where runs are kept, and what the folder of an unfinished one says of it. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_run(path: Path) -> dict[str, Any]:
    """The content of config.json of an unfinished run, as --resume takes it up.

    Raises ValueError where the folder holds no run, one that has ended, or a config.json that is damaged.
    """
    if (path / "result.json").exists():
        raise ValueError(f"--resume {path}: that run has ended, its result is in result.json; start a new run")
    try:
        content = json.loads((path / "config.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"--resume {path} is not the folder of a run that has begun (it has no config.json); name a folder such "
            "as runs/<date-time>-<dataset>, or start a new run"
        ) from error
    except OSError as error:
        raise ValueError(f"--resume {path}: config.json cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"--resume {path}: config.json is damaged ({error}); start a new run") from error
    if not isinstance(content, dict) or not isinstance(content.get("flags"), dict):
        raise ValueError(f"--resume {path}: config.json is damaged (it lacks the run's flags); start a new run")
    return content


def make_folder(path: Path) -> list[Path]:
    """Create a folder, with those that it lies in; returns those that were not there, the innermost first.

    Raises OSError where it cannot be made.
    """
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
    for number in itertools.count(1):
        path = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")
