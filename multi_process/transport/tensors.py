"""The connection for tensors between a worker and the server: FedLab's packages, whatever carries their bytes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from multi_process.fedlab_adapter import HEADER_SIZE, BytePackage, MessageCode, read_header, sizes_of, split_content
from multi_process.transport.control import ProtocolError
from multi_process.transport.wire import Wire

FORMATION_SECONDS = 30.0
"""For meeting the other side, once both have agreed to."""
SLOWEST_BYTES_PER_SECOND = 4 * 1024
"""A peer that sends or takes a package more slowly than this, after a first silence, is lost. 30 may share one
megabit."""
SENDING_SECONDS = 3600.0
"""Of silence, while the other side is busy with something else, until it takes what it is sent."""
MAX_SLICES = 64
"""Numbers by which a package describes its tensors. A message has two tensors, three numbers each."""

SERVER, WORKER = 0, 1
"""The two sides. They are the ranks within a process group."""


class TransferError(Exception):
    """A package was not sent or received: the other side is gone, the connection was ended, or the time is over."""


class TensorConnection(ABC):
    """Exchanges FedLab's packages with the other side."""

    hint = ""
    """What its user may do where the two sides do not meet."""

    @abstractmethod
    def form(self) -> None:
        """Meet the other side. Raises ConnectionError, or an error of torch's, where they do not meet."""

    def watch(self) -> None:  # noqa: B027  # most need no watching
        """To be called again and again while it is formed. Raises ConnectionError where that has to end."""

    def set_by_peer(self, key: Any, value: Any) -> None:
        """Take in what the other side tells of its addresses. Raises ProtocolError where none is needed."""
        raise ProtocolError("it sets a key for a process group that there is not")

    def attach(self, wire: Wire) -> None:
        """Server: take in the worker's second connection to the port. Raises ProtocolError where it is not wanted."""
        wire.close()
        raise ProtocolError("its tensors have a connection of another kind")

    @abstractmethod
    def send(self, package: BytePackage) -> None:
        """Raises TransferError."""

    @abstractmethod
    def receive(self, num_bytes: int, timeout_seconds: float) -> tuple[MessageCode, list[Tensor]]:
        """Message code and content of the next package, which has so many bytes. They are valid until the next one.

        Raises ValueError where it is another one, TransferError where it did not come.
        """

    def is_at_end(self) -> bool:
        """Whether the other side has closed it and all that it sent was read, where `receive` does not tell."""
        return False

    @abstractmethod
    def interrupt(self) -> None:
        """Let whoever sends, receives or forms the connection fail, now and from now on. From any thread; may be called
        again."""

    @abstractmethod
    def close(self) -> None:
        """Give back the sockets, threads and memory. Nobody may be sending or receiving."""


class ConnectionInParts(TensorConnection):
    """Exchanges packages in FedLab's three parts: header, slices, content.

    Unlike FedLab's, its receive buffer has the content's size and is used again.

    side: SERVER or WORKER, which this side is.
    """

    def __init__(self, side: int) -> None:
        self._side = side
        self._buffer = torch.empty(0, dtype=torch.int8)

    def send(self, package: BytePackage) -> None:
        header, slices, content = package.parts(receiver=1 - self._side)
        for part in (header, slices):
            self._send(part)
        self._send(content, is_content=True)

    def receive(self, num_bytes: int, timeout_seconds: float) -> tuple[MessageCode, list[Tensor]]:
        deadline = time.monotonic() + timeout_seconds
        header = torch.empty(HEADER_SIZE, dtype=torch.int32)
        self._receive(header, deadline)
        code, num_slices, dtype = read_header(header)
        if not 0 < num_slices <= MAX_SLICES or dtype is not torch.int8:
            raise ValueError(f"a package with {num_slices} slices of {dtype} is none of this protocol's")
        slices = torch.empty(num_slices, dtype=torch.int64)
        self._receive(slices, deadline)
        sizes = slices.tolist()
        size = sum(sizes_of(sizes))
        if size != num_bytes:
            raise ValueError(f"a package of {num_bytes} bytes was announced, and one of {size} came")
        content = self._receive_buffer(size)
        self._receive(content, deadline, is_content=True)
        return code, split_content(sizes, content.cpu())

    def close(self) -> None:
        self._buffer = self._buffer[:0].clone()

    @abstractmethod
    def _send(self, part: Tensor, is_content: bool = False) -> None:
        """Send the bytes of a part. Raises TransferError."""

    @abstractmethod
    def _receive(self, part: Tensor, deadline: float, is_content: bool = False) -> None:
        """Fill a part with what comes. deadline: on the clock of `time.monotonic`. Raises TransferError."""

    def _receive_buffer(self, size: int) -> Tensor:
        """Memory for a content; the same for every package, because rounds are alike."""
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.int8, device=self._buffer.device)
        return self._buffer[:size]


def sending_seconds(num_bytes: int) -> float:
    """The time limit for sending so many bytes."""
    return SENDING_SECONDS + num_bytes / SLOWEST_BYTES_PER_SECOND
