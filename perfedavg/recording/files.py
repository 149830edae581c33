"""Files that are whole or not there at all, whatever ends the process and however full the disk is."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

if TYPE_CHECKING:
    from torch import Tensor

_PARTIAL = ".partial"


def replace_file(path: Path, content: bytes, syncs_folder: bool = True) -> None:
    """Write a file, or replace it, in one step: a reader, a crash or a power cut never leaves half of it.

    syncs_folder: whether a power cut from now on leaves it; otherwise only one after `sync_folder` does.
    Raises OSError, and leaves what was there as it was, where it cannot be written.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if syncs_folder:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Let the names in a folder outlive a power cut. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_partial_files(folder: Path) -> None:
    """Remove what a process that was killed inside `replace_file` left. No other may be writing in that folder."""
    for partial in folder.glob(f".*{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises OSError or SafetensorError.

    The library takes a path only as UTF-8 text, which a folder's name need not be; a descriptor's path is.
    """
    with open(path, "rb") as file, safetensors.safe_open(f"/proc/self/fd/{file.fileno()}", "pt") as content:
        names = content.keys()
        return {name: content.get_tensor(name) for name in names}, content.metadata() or {}


def checked_file(kind: str, text: str, tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file with a text and a checksum. kind: what it is, under which the text stands."""
    import safetensors.torch

    return safetensors.torch.save(dict(tensors), {kind: text, "crc32": checksum(text, tensors)})


def read_checked(path: Path, kind: str) -> tuple[str, dict[str, Tensor]]:
    """Text and tensors of a file that `checked_file` made.

    Raises ValueError where the checksum does not fit, otherwise OSError, SafetensorError or KeyError.
    """
    tensors, metadata = read_tensors(path)
    text = metadata[kind]
    if metadata["crc32"] != checksum(text, tensors):
        raise ValueError("its checksum does not fit")
    return text, tensors


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of everything that a file says, which finds what a disk did to it."""
    import torch

    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return str(crc)


class GrowingFile:
    """A file that grows by whole pieces. Pieces for which there is no room are kept, and written before the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""

    def append(self, piece: bytes) -> None:
        """Add a piece. Raises OSError, and keeps the piece, where it cannot be written yet."""
        self._waiting += piece
        self.flush()

    def flush(self, to_disk: bool = False) -> None:
        """Write what waits. Raises OSError as `append` does. to_disk: let it outlive a power cut."""
        if not self._waiting and not (to_disk and self._path.exists()):
            return
        with open(self._path, "ab", buffering=0) as file:
            size, written = file.tell(), 0
            try:
                while written < len(self._waiting):
                    written += file.write(self._waiting[written:])
            except OSError:
                file.truncate(size)
                raise
            self._waiting = b""
            if to_disk:
                os.fsync(file.fileno())

    def replace(self, content: bytes) -> None:
        """Let the file hold this and nothing else, in one step. Raises OSError."""
        self._waiting = b""
        replace_file(self._path, content)
