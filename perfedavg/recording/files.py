"""Files that are whole or not there at all, whatever ends the process and however full the disk is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors

_PARTIAL = ".partial"


def replace_file(path: Path, parts: Iterable[Any]) -> None:
    """Write a file, or replace it, in one step: a reader, a crash or a power cut never leaves half of it.

    parts: its content, piece by piece; anything with the buffer interface.
    Raises OSError, and leaves what was there as it was, where it cannot be written.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, as `safetensors.safe_open` has it. Raises OSError or SafetensorError.

    That library takes a path for text, which the name of a user's folder need not be; a descriptor's is.
    """
    with open(path, "rb") as file, safetensors.safe_open(f"/proc/self/fd/{file.fileno()}", "pt") as content:
        yield content


def remove_partial_files(folder: Path) -> None:
    """Remove what a process that was killed inside `replace_file` left in a folder. No other may be writing there."""
    for partial in folder.glob(f".*{_PARTIAL}"):
        partial.unlink(missing_ok=True)


class GrowingFile:
    """A file that grows by whole pieces. Pieces for which there is no room are kept, and written before the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []

    def append(self, piece: bytes) -> None:
        """Add a piece. Raises OSError, and keeps the piece, where it cannot be written yet."""
        self._waiting.append(piece)
        self.flush()

    def flush(self, to_disk: bool = False) -> None:
        """Write what waits; to_disk: and see to it that it outlives a power cut. Raises OSError as `append` does."""
        if not self._waiting and not (to_disk and self._path.exists()):
            return
        with open(self._path, "ab", buffering=0) as file:
            _append_all(file.fileno(), b"".join(self._waiting))
            self._waiting.clear()
            if to_disk:
                os.fsync(file.fileno())

    def replace(self, pieces: Iterable[bytes]) -> None:
        """Let the file hold these pieces and no others, in one step. Raises OSError."""
        self._waiting.clear()
        replace_file(self._path, pieces)


class LineFile:
    """A text file that grows by whole lines, as a `GrowingFile` does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = GrowingFile(path)

    def append(self, line: str) -> None:
        """Add a line (without its newline). Raises OSError, and keeps the line, where it cannot be written yet."""
        self._file.append(f"{line}\n".encode())

    def flush(self, to_disk: bool = False) -> None:
        """As a `GrowingFile`'s."""
        self._file.flush(to_disk)

    def replace(self, lines: Iterable[str]) -> None:
        """Let the file hold these lines and no others, in one step. Raises OSError."""
        self._file.replace(f"{line}\n".encode() for line in lines)


def _append_all(descriptor: int, content: bytes) -> None:
    """Write all of it behind what is there, or leave the file as it was and raise OSError."""
    size = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(content):
            written += os.write(descriptor, content[written:])
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
