"""Where runs are kept, and what config.json says of one. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfedavg.plain_values import from_plain, parse_json
from perfedavg.settings import ExperimentConfig

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class RecordedRun:
    """What the config.json of a run holds.

    flags: of its experiment, by name, as its user gave them or as they were by default.
    content: all of the file.
    """

    path: Path
    flags: Mapping[str, Any]
    content: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> RecordedRun:
        """Raises ValueError where it is damaged, FileNotFoundError or NotADirectoryError where there is none."""
        path = folder / CONFIG_FILE
        content = read_object(path)
        try:
            return cls(path, from_plain(dict[str, Any], content.get("flags"), "flags"), content)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error})") from error

    def experiment(self) -> ExperimentConfig:
        """What the flags came to, with everything settled. Raises ValueError, naming the field that is damaged."""
        try:
            values = from_plain(dict[str, Any], self.content.get("experiment"), "experiment")
            experiment = ExperimentConfig.from_dict(values)
            if not experiment.is_settled:
                raise ValueError("its client_batching or initial_model is not settled")
            return experiment
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged, or of another version of this project ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises FileNotFoundError or NotADirectoryError where there is no file, ValueError where it cannot be read or holds
    something else.
    """
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it does not hold a JSON object")
        return content
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def read_unfinished_run(folder: Path) -> RecordedRun:
    """The run that --resume goes on with.

    Raises ValueError where the folder holds no run, one that has ended, or a config.json that is damaged.
    """
    if (folder / "result.json").exists():
        raise ValueError(f"--resume {folder}: that run has ended, its result is in result.json; start a new run")
    try:
        return RecordedRun.read(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"--resume {folder} is not the folder of a run that has begun (it has no config.json); name a folder such "
            "as runs/<date-time>-<dataset>, or start a new run"
        ) from error
    except ValueError as error:
        raise ValueError(f"--resume {folder}: {error}; start a new run") from error


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
