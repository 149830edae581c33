"""Tensors over a torch process group of two, one worker and the server.

It is gloo's, with nccl one of nccl's beside it. gloo listens on a port of its own for the other side, asks nobody who
connects, keeps a descriptor for each, and ends the whole process where it runs out of them. So it listens no longer
than it takes to form the group. Nor does gloo interrupt a transfer; that is done by shutting down its connection. It
tells that to a transfer that has not begun, but never to one of which a part has come or gone. So each package has a
thread of its own, which is left behind then, with its package and gloo's thread, until the package's time is over.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore

from multi_process.fedlab_adapter import BytePackage, MessageCode
from multi_process.transport.control import ControlConnection
from multi_process.transport.store import ControlStore
from multi_process.transport.tensors import (
    FORMATION_SECONDS,
    SENDING_SECONDS,
    ConnectionInParts,
    TransferError,
    sending_seconds,
)
from perfedavg.machine.descriptors import num_spare
from perfedavg.terminal.entry_point import is_shortage

Result = TypeVar("Result")
MAX_FAILURE_CHARS = 200
GLOO_ATTEMPTS = 5
"""Times its timeout that gloo waits for a connection."""


class Group(Protocol):
    """What is used of a process group. (torch's type stubs leave it out.)"""

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> dist.Work: ...

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> dist.Work: ...

    def abort(self) -> None: ...


class GroupConnection(ConnectionInParts):
    """Tensors over a process group of two.

    The content travels on a device of one's choice: with nccl it is this process's GPU, while header and slices travel
    on the CPU over gloo.

    control: over which the two tell each other their addresses.
    ethernet: interface for tensors; None for the one by which the other side is reached.
    nccl_device: the GPU whose memory contents are sent from and received into; None for gloo.
    """

    hint = (
        "; check --ethernet and the firewall, which must let server and worker reach each other on every port, or give "
        "the server --backend tcp"
    )

    def __init__(
        self, control: ControlConnection, side: int, ethernet: str | None, nccl_device: torch.device | None
    ) -> None:
        super().__init__(side)
        self.store = ControlStore(control)
        self._local_host = control.local_host
        self._ethernet = ethernet
        self._nccl_device = nccl_device
        self._device: object | None = None
        self._gloo: Group | None = None
        self._nccl: Group | None = None
        self._wires: list[socket.socket] = []
        self._listener: tuple[int, socket.socket] | None = None
        self._closing = threading.Lock()
        self._interrupted: Future[None] = Future()

    def form(self) -> None:
        self._meet(FORMATION_SECONDS)
        if self._nccl_device is None:
            self.store.close()

    def failure_to_meet(self, timeout_seconds: float) -> str:
        """As `form`, but for the store, which goes on. What went wrong, or nothing."""
        try:
            self._meet(timeout_seconds)
        except (ConnectionError, RuntimeError) as error:
            without_source = re.sub(r"\[[^]]*:\d+] *", "", str(error))  # the file and line within gloo
            return without_source[:MAX_FAILURE_CHARS] or type(error).__name__
        return ""

    def _meet(self, timeout_seconds: float) -> None:
        try:
            self._gloo = self._form_gloo(timeout_seconds)
            self._wires = [wire for _, wire in self._sockets(is_listening=False)]
            if not self._wires:
                raise ConnectionError("gloo's connection is not among this process's sockets")
            if self._nccl_device is not None:
                self._nccl = self._form_nccl(self._nccl_device)
                self._buffer = self._buffer.to(self._nccl_device)
        finally:
            self.stop_listening()

    def watch(self) -> None:
        """Close gloo's port where descriptors run short, because who connects to it takes one."""
        self.find_listener()
        if num_spare() < 0:
            self.stop_listening()
            raise ConnectionError("file descriptors run short; raise the limit with ulimit -n")

    def set_by_peer(self, key: Any, value: Any) -> None:
        self.store.set_by_peer(key, value)

    def find_listener(self) -> None:
        """Look for gloo's port while there is time, because it may have to be closed in a hurry."""
        with self._closing:
            if self._device is not None and self._listener is None:
                with contextlib.closing(self._sockets(is_listening=True)) as found:
                    self._listener = next(found, None)  # a later one would be the duplicate of the first

    def stop_listening(self) -> None:
        """Close gloo's port. What takes the place of gloo's socket is one that nobody can connect to."""
        self.find_listener()
        with self._closing:
            if self._listener is None:
                return
            descriptor, listener = self._listener
            with listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
                deaf.setblocking(False)
                deaf.bind("")  # to an address that the system makes up
                deaf.listen(0)
                os.dup2(deaf.fileno(), descriptor, inheritable=False)
            self._listener = self._device = None

    def send(self, package: BytePackage) -> None:
        self._in_own_thread(partial(super().send, package))

    def receive(self, num_bytes: int, timeout_seconds: float) -> tuple[MessageCode, list[Tensor]]:
        return self._in_own_thread(partial(super().receive, num_bytes, timeout_seconds))

    def is_at_end(self) -> bool:
        for wire in self._wires:
            try:
                if not wire.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return True
            except BlockingIOError:
                continue
            except ConnectionError:
                return True
        return False

    def interrupt(self) -> None:
        self.store.close()
        with contextlib.suppress(InvalidStateError):  # it may be called again
            self._interrupted.set_result(None)
        for wire in self._wires:
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)
        if self._nccl is not None:
            with contextlib.suppress(RuntimeError):
                self._nccl.abort()

    def close(self) -> None:
        self._gloo = self._nccl = self._device = None
        for wire in self._wires:
            wire.close()
        self._wires = []
        super().close()

    def _form_gloo(self, timeout_seconds: float) -> Group:
        """A gloo group that listens on one address only.

        gloo's own choice is the address of this machine's host name, which other machines often cannot reach.
        """
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()  # type: ignore[attr-defined]  # torch's stubs know it by other names
        where = {"interface": self._ethernet} if self._ethernet else {"hostname": self._local_host}
        self._device = gloo.create_device(**where)
        options._devices = [self._device]
        options._threads = 1
        options._timeout = timedelta(seconds=timeout_seconds / GLOO_ATTEMPTS)
        return cast(Group, gloo(PrefixStore("gloo", self.store), self._side, 2, options))

    def _form_nccl(self, device: torch.device) -> Group:
        """An nccl group of two, one GPU each."""
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=SENDING_SECONDS)
        return cast(Group, dist.ProcessGroupNCCL(PrefixStore("nccl", self.store), self._side, 2, options))

    def _sockets(self, is_listening: bool) -> Generator[tuple[int, socket.socket], None, None]:
        """gloo's sockets for this group: their descriptors, and a duplicate of each, for the caller to close.

        Known by the addresses that the two sides have told each other, which stand in what gloo put into the store.
        """
        own, others = (self.store.value_of(f"gloo/0/{side}") for side in (self._side, 1 - self._side))
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

    def _in_own_thread(self, transfer: Callable[[], Result]) -> Result:
        """The transfer's result. Raises what it raises, or TransferError where it is interrupted first."""
        finished: Future[Result] = Future()
        threading.Thread(target=_fulfil, args=(finished, transfer), name="transfer", daemon=True).start()
        either: list[Future[Any]] = [finished, self._interrupted]
        wait(either, return_when=FIRST_COMPLETED)
        try:
            if not finished.done():
                raise TransferError("it was interrupted")
            return finished.result()
        finally:
            del finished, either  # an error keeps this frame, which must not keep the error

    def _send(self, part: Tensor, is_content: bool = False) -> None:
        part = part.to(self._buffer.device) if is_content else part
        limit = timedelta(seconds=sending_seconds(part.nbytes))
        with _transfer_errors():
            self._group(is_content).send([part], 1 - self._side, 0).wait(limit)

    def _receive(self, part: Tensor, deadline: float, is_content: bool = False) -> None:
        remaining = timedelta(seconds=max(0.001, deadline - time.monotonic()))
        with _transfer_errors():
            self._group(is_content).recv([part], 1 - self._side, 0).wait(remaining)

    def _group(self, is_content: bool) -> Group:
        """The one for contents, or for what comes before them."""
        group = (self._nccl if is_content else None) or self._gloo
        if group is None:
            raise TransferError("the tensors' connection was closed")
        return group


def _fulfil(finished: Future[Result], transfer: Callable[[], Result]) -> None:
    try:
        finished.set_result(transfer())
    except Exception as error:
        finished.set_exception(error)
    finally:
        del finished  # an error keeps this frame, which must not keep the error


@contextlib.contextmanager
def _transfer_errors() -> Iterator[None]:
    """torch's own are RuntimeErrors of many words. A shortage of this process's own is none, and is raised as it is."""
    try:
        yield
    except RuntimeError as error:
        if is_shortage(error):
            raise
        raise TransferError(str(error)) from error


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
