"""A pair: the torch process group of two over which one worker and the server exchange tensors.

It is gloo's, with nccl one of nccl's beside it. gloo listens on a port of its own for the other side, asks nobody who
connects, keeps a descriptor for each, and ends the whole process where it runs out of them. So it listens no longer
than it takes to form the pair. Nor does gloo interrupt a transfer; a pair is interrupted by shutting down its
connection.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Generator, Iterator
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from fedlab.core.communicator import (
    HEADER_DATA_TYPE_IDX,
    HEADER_RECEIVER_RANK_IDX,
    HEADER_SIZE,
    Package,
    PackageProcessor,
    dtype_flab2torch,
    dtype_torch2flab,
    supported_torch_dtypes,
)
from fedlab.utils import MessageCode
from torch import Tensor
from torch.distributed import PrefixStore, Store

from multi_process.transport.control import ControlConnection, ProtocolError

FORMATION_SECONDS = 30.0
"""For forming a pair, once both sides have agreed to."""
GLOO_ATTEMPTS = 5
"""Times its timeout that gloo waits for a connection."""
SENDING_TIMEOUT = timedelta(days=1)
"""For one tensor to be taken by the other side, which may be busy or behind a slow line. One that dies or falls silent
ends it at once."""
MAX_KEYS = 16
"""That the other side may set while a pair is formed. gloo needs one, nccl a few."""
MAX_VALUE_BYTES = 4096
MAX_SLICES = 64
"""Numbers by which a package describes its tensors: a message has at most a handful, three or more numbers each."""

SERVER, WORKER = 0, 1
"""The ranks within a pair."""


class Group(Protocol):
    """What is used of a process group. (torch's type stubs leave it out.)"""

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> dist.Work: ...

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> dist.Work: ...

    def abort(self) -> None: ...


class TensorConnection(PackageProcessor):
    """FedLab's exchange of a package in three parts (header, slices, content) over a process group of two.

    Three of FedLab's limits are lifted. The receive buffer has the content's size (FedLab's adds the shapes, and so
    allocates twice as much). A content may have 2^31 elements and more, because the slices travel as int64. And the
    content travels on a device of one's choice: with nccl it is this process's GPU, while header and slices travel on
    the CPU over gloo.

    side: SERVER or WORKER.
    """

    def __init__(self, control: ControlConnection, side: int) -> None:
        self._side = side
        self._local_host = control.local_host
        self._store = ControlStore(control)
        self._device: object | None = None
        self._gloo: Group | None = None
        self._nccl: Group | None = None
        self._wires: list[socket.socket] = []
        self._listener: tuple[int, socket.socket] | None = None
        self._closing = threading.Lock()
        self._buffer = torch.empty(0, dtype=torch.int8)

    @property
    def store(self) -> ControlStore:
        return self._store

    def form(self, ethernet: str | None, nccl_device: torch.device | None) -> None:
        """Meet the other side.

        ethernet: interface for tensors; None for the one by which the other side is reached.
        nccl_device: the GPU whose memory contents are sent from and received into; None for gloo.
        Raises ConnectionError, or an error of torch's, where they do not meet.
        """
        try:
            self._gloo = self._form_gloo(ethernet)
            self._wires = [wire for _, wire in self._sockets(is_listening=False)]
            if not self._wires:
                raise ConnectionError("gloo's connection is not among this process's sockets")
            if nccl_device is None:
                self._store.close()
            else:
                self._nccl = self._form_nccl(nccl_device)
                self._buffer = self._buffer.to(nccl_device)
        finally:
            self.stop_listening()

    def find_listener(self) -> None:
        """Look for gloo's port while there is time, because it may have to be closed in a hurry."""
        with self._closing:
            self._find_listener()

    def stop_listening(self) -> None:
        """Close gloo's port. What takes the place of gloo's socket is one that nobody can connect to."""
        with self._closing:
            self._find_listener()
            if self._listener is None:
                return
            descriptor, listener = self._listener
            with listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
                deaf.setblocking(False)
                deaf.bind("")  # to an address that the system makes up
                deaf.listen(0)
                os.dup2(deaf.fileno(), descriptor, inheritable=False)
            self._listener = self._device = None

    def _find_listener(self) -> None:
        if self._device is not None and self._listener is None:
            with contextlib.closing(self._sockets(is_listening=True)) as found:
                self._listener = next(found, None)  # a later one would be the duplicate of the first

    def send(self, package: Package) -> None:
        package.header[HEADER_RECEIVER_RANK_IDX] = 1 - self._side
        package.header[HEADER_DATA_TYPE_IDX] = dtype_torch2flab(package.dtype)
        slices = torch.tensor(package.slices, dtype=torch.int64)
        for part in (package.header, slices):
            _open(self._gloo).send([part], 1 - self._side, 0).wait(SENDING_TIMEOUT)
        content = package.content.to(self._buffer.device)
        _open(self._nccl or self._gloo).send([content], 1 - self._side, 0).wait(SENDING_TIMEOUT)

    def receive(self, num_bytes: int, timeout_seconds: float) -> tuple[MessageCode, list[Tensor]]:
        """Message code and content of the next package, which has so many bytes. They are valid until the next one.

        Raises ValueError where it is another one, ConnectionError where the pair was interrupted, and torch's
        RuntimeError where the other side is gone or the time is over.
        """
        deadline = time.monotonic() + timeout_seconds
        header = self._receive(self._gloo, torch.empty(HEADER_SIZE, dtype=torch.int32), deadline)
        _, _, num_slices, code, data_type = Package.parse_header(header)
        if not 0 < num_slices <= MAX_SLICES:
            raise ValueError(f"a package with {num_slices} slices is none of this protocol's")
        slices = self._receive(self._gloo, torch.empty(num_slices, dtype=torch.int64), deadline).tolist()
        dtype = _data_type(data_type)
        size = sum(sizes_of(slices))
        if size * dtype.itemsize != num_bytes:
            raise ValueError(f"a package of {num_bytes} bytes was announced, and one of {size * dtype.itemsize} came")
        content = self._receive(self._nccl or self._gloo, self._receive_buffer(size, dtype), deadline)
        return code, Package.parse_content(slices, content.cpu())

    def interrupt(self) -> None:
        """Let every transfer fail, now and from now on. May be called from any thread, and again."""
        self._store.close()
        for wire in self._wires:
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)
        if self._nccl is not None:
            with contextlib.suppress(RuntimeError):
                self._nccl.abort()

    def close(self) -> None:
        """Give back the sockets, threads and memory. No transfer may be under way."""
        self._gloo = self._nccl = self._device = None
        for wire in self._wires:
            wire.close()
        self._wires = []
        self._buffer = self._buffer[:0].clone()

    def _form_gloo(self, ethernet: str | None) -> Group:
        """A gloo group that listens on one address only.

        gloo's own choice is the address of this machine's host name, which other machines often cannot reach.
        """
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()  # type: ignore[attr-defined]  # torch's stubs know it by other names
        where = {"interface": ethernet} if ethernet else {"hostname": self._local_host}
        self._device = gloo.create_device(**where)
        options._devices = [self._device]
        options._threads = 1
        options._timeout = timedelta(seconds=FORMATION_SECONDS / GLOO_ATTEMPTS)
        return cast(Group, gloo(PrefixStore("gloo", self._store), self._side, 2, options))

    def _form_nccl(self, device: torch.device) -> Group:
        """An nccl group of two, one GPU each."""
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = SENDING_TIMEOUT
        return cast(Group, dist.ProcessGroupNCCL(PrefixStore("nccl", self._store), self._side, 2, options))

    def _sockets(self, is_listening: bool) -> Generator[tuple[int, socket.socket], None, None]:
        """gloo's sockets for this pair: their descriptors, and a duplicate of each, for the caller to close.

        Known by the addresses that the two sides have told each other, which stand in what gloo put into the store.
        """
        own, others = (self._store.value_of(f"gloo/0/{side}") for side in (self._side, 1 - self._side))
        for descriptor, one in _own_sockets():
            try:
                listens = bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
                is_ours = _as_told(one.family, one.getsockname()) in own
                if not listens and not is_ours:
                    is_ours = _as_told(one.family, one.getpeername()) in others
            except OSError:  # not connected
                listens, is_ours = False, False
            if is_ours and listens == is_listening:
                yield descriptor, one
            else:
                one.close()

    def _receive(self, group: Group | None, buffer: Tensor, deadline: float) -> Tensor:
        remaining = timedelta(seconds=max(0.001, deadline - time.monotonic()))
        _open(group).recv([buffer], 1 - self._side, 0).wait(remaining)
        return buffer

    def _receive_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory for a content; the same for every package, because rounds are alike."""
        if self._buffer.dtype != dtype or self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=dtype, device=self._buffer.device)
        return self._buffer[:size]


class ControlStore(Store):
    """The store over which torch forms a group, kept equal at both ends of a control connection.

    A TCPStore of torch's takes orders from whoever reaches its port; this one only from the peer that was greeted.
    """

    def __init__(self, control: ControlConnection) -> None:
        super().__init__()
        self._control = control
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._is_closed = False

    def set_by_peer(self, key: Any, value: Any) -> None:
        """A value that the peer has set. Raises ProtocolError where it sets what no group needs."""
        with self._changed:
            if self._is_closed:
                raise ProtocolError("it sets a key for a process group that is formed")
            if not (isinstance(key, str) and isinstance(value, str)):
                raise ProtocolError("it sets a key that is no text, or a value that is none")
            if len(self._values) >= MAX_KEYS or max(len(key), len(value)) > MAX_VALUE_BYTES:
                raise ProtocolError(
                    f"it sets more than {MAX_KEYS} keys of up to {MAX_VALUE_BYTES} bytes for a process group"
                )
            self._values[key] = base64.b64decode(value)
            self._changed.notify_all()

    def value_of(self, key: str) -> bytes:
        """The value of a key, empty where there is none."""
        return self._values.get(key, b"")

    def close(self) -> None:
        """Nothing more is to be set: the groups are formed, or the peer is gone."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # What follows are torch's own names, called from its native code.

    def set(self, key: str, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else bytes(value)
        with self._changed:
            self._values[key] = content
        self._control.send(key=key, value=base64.b64encode(content).decode())

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        del timeout  # gloo's is for a connection; the peer may take longer to get there
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self.check(keys), FORMATION_SECONDS)
            if not self.check(keys):
                raise ConnectionError("the peer is gone" if self._is_closed else "the peer does not answer")


def sizes_of(slices: list[int]) -> list[int]:
    """The number of elements of each tensor, from FedLab's layout: size, number of dimensions, the dimensions.

    Raises ValueError where the numbers are none of that layout.
    """
    sizes = []
    position = 0
    while position < len(slices):
        size, num_dimensions = [*slices[position : position + 2], 0][:2]
        shape = slices[position + 2 : position + 2 + max(0, num_dimensions)]
        if len(shape) != num_dimensions or min(shape, default=0) < 0 or math.prod(shape) != size:
            raise ValueError(f"a package's slices {slices[position : position + 8]} describe no tensor")
        position += 2 + num_dimensions
        sizes.append(size)
    return sizes


def _data_type(number: int) -> torch.dtype:
    if not 0 <= number < len(supported_torch_dtypes):
        raise ValueError(f"a package's data type {number} is none of FedLab's")
    return cast(torch.dtype, dtype_flab2torch(number))


def _open(group: Group | None) -> Group:
    if group is None:
        raise ConnectionError("the tensors' connection was closed")
    return group


_LOOKING = threading.Lock()
"""Held while this process's sockets are looked through, so that nobody takes another's duplicate for gloo's own."""


def _own_sockets() -> Iterator[tuple[int, socket.socket]]:
    """This process's TCP sockets: their descriptors, and a duplicate of each."""
    with _LOOKING:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                copy = os.dup(int(name))
                if not stat.S_ISSOCK(os.fstat(copy).st_mode):
                    os.close(copy)
                    continue
                duplicate = socket.socket(fileno=copy)
                if duplicate.family in (socket.AF_INET, socket.AF_INET6):
                    yield int(name), duplicate
                else:
                    duplicate.close()


def _as_told(family: int, address: tuple[str, int] | tuple[str, int, int, int]) -> bytes:
    """The beginning of the system's own form of an address, which gloo sends as it stands."""
    host, port, *rest = address
    start = struct.pack("=H", family) + struct.pack("!H", port)
    flow = struct.pack("!I", rest[0]) if rest else b""
    return start + flow + socket.inet_pton(family, host.partition("%")[0])
