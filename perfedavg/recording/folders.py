"""Folders of runs: named, made, claimed, and removed again where nothing came of them. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perfedavg.own_files import shown_dataset
from perfedavg.recording.files import remove_partial_files
from perfedavg.terminal.console import LOGGER

LOG_FILE = "log.txt"
LOCK_FILE = ".lock"


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
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{shown_dataset(dataset).replace(':', '.')}"
    parent.mkdir(parents=True, exist_ok=True)
    for suffix in itertools.chain([""], map("-{}".format, itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            path = parent / f"{stem}{suffix}"
            path.mkdir()
            return path
    raise AssertionError("unreachable")


class ClaimedFolder:
    """A folder, made where it was not there, that no other process may claim, and in which this one logs."""

    def __init__(self, path: Path, flag: str, is_made_for_it: bool) -> None:
        """flag: that named the folder.  is_made_for_it: whether this process has just made it.

        Raises ValueError where it cannot be written or is another process's.
        """
        import filelock

        self._path = path
        self._made = [path] if is_made_for_it else []
        try:
            self._made += make_folder(path)
            self._lock = filelock.FileLock(path / LOCK_FILE, blocking=False, thread_local=False)
            with contextlib.suppress(NotImplementedError):  # a file system without locks: there, nobody is kept out
                self._lock.acquire()
            remove_partial_files(path)
            log = path / LOG_FILE
            self._log_size = log.stat().st_size if log.exists() else 0
            self._log_handler = _RunLog(log, encoding="utf-8", errors="backslashreplace")
        except filelock.Timeout as error:
            raise ValueError(
                f"{flag} {path} is in use by another process; wait until that has ended, or name another folder"
            ) from error
        except OSError as error:
            remove_empty(self._made)
            raise ValueError(f"{flag} {path} cannot be written ({error.strerror}); name another folder") from error
        LOGGER.addHandler(self._log_handler)

    def close(self) -> None:
        """Let others claim the folder, and log no more to it."""
        LOGGER.removeHandler(self._log_handler)
        self._log_handler.close()
        self._lock.release()

    def discard(self) -> None:
        """Leave what was there before: no folder, or the user's own as it was."""
        self.close()
        with contextlib.suppress(OSError):
            if self._log_size:
                os.truncate(self._path / LOG_FILE, self._log_size)
            else:
                (self._path / LOG_FILE).unlink(missing_ok=True)
            (self._path / LOCK_FILE).unlink(missing_ok=True)
        remove_empty(self._made)


class _RunLog(logging.FileHandler):
    """On a full disk, lines are lost without a word: the run is what counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        pass
