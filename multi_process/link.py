"""A link: the two connections between the server and one worker, as one thing that is alive or gone.

Signs of life, words, and the news that a message is coming, go over the control connection. Messages go over a torch
process group of two, the server and this worker, formed for this link alone: gloo's, and with nccl one of nccl's
beside it. So a worker that dies, hangs or joins disturbs no other pair, and nobody waits in a receive for a message
that may never come: a receive begins only when the message has been announced.
"""

from __future__ import annotations

import base64
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
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
)
from fedlab.utils import MessageCode
from torch import Tensor
from torch.distributed import PrefixStore, Store

from multi_process.control import ControlConnection, NotOursError
from multi_process.messages import Message, Word, from_line, from_package, to_line, to_package
from perfedavg.console import LOGGER

FORMATION_TIMEOUT = timedelta(seconds=30)
"""For forming a link's process group, once both sides have agreed to."""
TRANSFER_TIMEOUT = timedelta(hours=1)
"""For one tensor. A peer that dies ends a transfer at once, and one that hangs is found by the missing signs of life;
this only bounds how long the thread that was talking to the latter lingers."""
ARRIVAL_SECONDS = 1.0
"""For the rest of a message to arrive that was coming when the peer left."""

SERVER, WORKER = 0, 1
"""The ranks within a link's process group."""


class GoneError(ConnectionError):
    """The peer of a link is gone: it died, it fell silent, or it ended the link."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is gone: {reason}")
        self.reason = reason


class DismissedError(ValueError):
    """The server ended the run for good, and said why."""


class Link:
    """One end of a link. Messages may be sent and received in different threads; each is sent by the link's own.

    control: the connection, greeted.  side: SERVER or WORKER, which this end is.  name: of the peer, for errors.
    beat_seconds, silence_seconds: see `control.Greeting`.
    """

    def __init__(
        self, control: ControlConnection, side: int, name: str, beat_seconds: float, silence_seconds: float
    ) -> None:
        self.name = name
        self.bytes_sent = 0
        self.bytes_received = 0
        self._control = control
        self._side = side
        self._beat_seconds = beat_seconds
        self._silence_seconds = silence_seconds
        self._store = _ControlStore(control)
        self._processor: ExactPackageProcessor | None = None
        self._announced: queue.SimpleQueue[Exception | Word | None] = queue.SimpleQueue()  # None: a message is coming
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: nothing more will come
        self._transfers: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()  # None: nothing more
        self._speaker = self._thread(self._speak)
        self._ended: Future[Any] = Future()
        self._ending = threading.Lock()
        self._end: Exception | None = None
        for body in (self._listen, self._beat):
            self._thread(body).start()

    @property
    def end(self) -> Exception | None:
        """Why the peer is gone, or None while it lives."""
        return self._end

    @property
    def last_heard(self) -> float:
        """When the peer last gave a sign of life, on the clock of `time.monotonic`."""
        return self._control.last_heard

    def form(self, ethernet: str | None, nccl_device: torch.device | None) -> None:
        """Form the process group, together with the peer.

        ethernet: interface for tensors; None for the one by which the peer is reached.  nccl_device: the GPU whose
        memory contents are sent from and received into with nccl; None for gloo.
        Raises GoneError where the peer is gone meanwhile, ConnectionError where the two cannot reach each other.
        """
        formation: Future[Any] = Future()

        def form() -> None:  # in a thread of its own: gloo waits for minutes where a firewall swallows its packets
            try:
                gloo = _form_gloo(PrefixStore("gloo", self._store), self._side, ethernet, self._control.local_host)
                content = gloo if nccl_device is None else _form_nccl(self._store, self._side, nccl_device)
                formation.set_result(ExactPackageProcessor(gloo, content, nccl_device or torch.device("cpu")))
            except Exception as error:  # torch's own, or that of the store
                formation.set_exception(error)

        self._thread(form).start()
        wait([formation, self._ended], FORMATION_TIMEOUT.total_seconds(), FIRST_COMPLETED)
        self._raise_end()
        error = formation.exception() if formation.done() else TimeoutError("no connection in time")
        if error is not None:
            raise ConnectionError(
                f"no process group with {self.name} could be formed; check --ethernet and the firewall, which must let "
                f"server and worker reach each other on every port ({_first_line(error)})"
            ) from error
        self._processor = formation.result()
        self._speaker.start()
        self._thread(self._hear).start()

    def send(self, message: Message) -> None:
        """Send a message, without waiting until it has left; its tensors must not change meanwhile.

        Raises GoneError, or DismissedError, where the peer is known to be gone.
        """
        self._raise_end()
        self._outgoing.put(message)

    def drain(self, timeout_seconds: float) -> None:
        """Wait until everything has been sent, or the peer is gone, or the time is over. The last thing to be done."""
        self._outgoing.put(None)
        if self._processor is not None:
            self._speaker.join(timeout_seconds)

    def receive(self) -> Message:
        """The next message, for which it waits as long as the peer lives. Its tensors are valid until the next one.

        Raises GoneError where the peer is gone, DismissedError where the server ended the run for good, ValueError for
        a message that is not one.
        """
        announced = self._announced.get()
        if isinstance(announced, Word):
            return announced
        if announced is not None:
            if announced is self._end:
                self._announced.put(announced)  # for whoever receives next
            raise announced
        transfer: Future[Any] = Future()
        self._transfers.put(transfer)
        wait([transfer, self._ended], return_when=FIRST_COMPLETED)
        wait([transfer], ARRIVAL_SECONDS)
        if not transfer.done():
            self._raise_end()
        code, content = transfer.result()
        self.bytes_received += sum(part.nbytes for part in content)
        return from_package(code, content)

    def close(self, reason: str, tell: str | None = None) -> None:
        """End the link, so that both ends have it gone for this reason, unless it was already.

        tell: the name under which the peer is told the reason: `dropped` (join anew) or `dismissed` (leave for good).
        """
        self._set_end(GoneError(self.name, reason))
        if tell is not None:
            with contextlib.suppress(ConnectionError):
                self._control.send(**{tell: reason})
        self._control.close()

    def interrupt(self, error: Exception) -> None:
        """Let whoever receives on this end raise an error of its own side."""
        self._announced.put(error)

    def _thread(self, body: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=body, name=f"{self.name}: {body.__name__.strip('_')}", daemon=True)

    def _listen(self) -> None:
        """Take in what comes over the control connection, until the peer is gone."""
        try:
            while True:
                self._take_in(self._control.receive(self._silence_seconds))
        except DismissedError as error:
            self._set_end(error)
        except (ConnectionError, ValueError) as error:
            self._set_end(GoneError(self.name, str(error)))

    def _take_in(self, fields: dict[str, Any]) -> None:
        if "word" in fields:
            self._announced.put(from_line(fields))
        elif "message" in fields:
            self._announced.put(None)
        elif "key" in fields:
            self._store.take_in(str(fields["key"]), str(fields.get("value")))
        elif "dropped" in fields and self._side == WORKER:
            raise ConnectionError(f"it dropped this worker: {fields['dropped']}")
        elif "dismissed" in fields and self._side == WORKER:
            raise DismissedError(f"the server ended the run: {fields['dismissed']}")
        else:
            raise NotOursError("it said what is not of this protocol")

    def _beat(self) -> None:
        while self._end is None:
            try:
                self._control.beat()
            except ConnectionError as error:
                self._set_end(GoneError(self.name, str(error)))
                return
            time.sleep(self._beat_seconds)

    def _speak(self) -> None:
        """Announce and send what is to be sent, one message after the other."""
        while (message := self._outgoing.get()) is not None:
            try:
                with self._connection_errors():
                    if isinstance(message, Word):
                        self._control.send(**to_line(message))
                    else:
                        self._send_package(to_package(message))
            except (GoneError, DismissedError):
                return
            except Exception as error:  # a message that cannot be written down; whoever waits here must hear of it
                self.interrupt(error)
                return

    def _send_package(self, package: Package) -> None:
        assert self._processor is not None, "the group is formed before messages are sent"
        self._control.send(message="package")
        self._processor.send(package, 1 - self._side)
        self.bytes_sent += package.content.nbytes

    def _hear(self) -> None:
        """Receive what was announced, in a thread of its own: nothing interrupts a receive from a silent peer."""
        assert self._processor is not None, "the group is formed before messages are received"
        while (transfer := self._transfers.get()) is not None:
            try:
                with self._connection_errors():
                    transfer.set_result(self._processor.receive(1 - self._side))
            except Exception as error:  # whatever it is, whoever waits for the message must hear of it
                transfer.set_exception(error)

    def _set_end(self, end: Exception) -> bool:
        """Whether this call was the one that ended the link."""
        with self._ending:
            if self._end is not None:
                return False
            self._end = end
        self._announced.put(end)
        self._outgoing.put(None)
        self._transfers.put(None)
        self._ended.set_result(None)
        self._store.close()
        return True

    @contextmanager
    def _connection_errors(self) -> Iterator[None]:
        """Whatever way the peer is found to be gone, the link is ended and GoneError raised."""
        try:
            yield
        except ConnectionError as error:
            self._set_end(GoneError(self.name, str(error)))
            self._raise_end()
        except RuntimeError as error:  # torch.distributed's, in many words
            LOGGER.info("%s: %s", self.name, error)
            self._set_end(GoneError(self.name, "the tensors' connection was closed"))
            self._raise_end()

    def _raise_end(self) -> None:
        if self._end is not None:
            raise self._end


class PairGroup(Protocol):
    """What is used of a process group of two. (torch's type stubs leave it out.)"""

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> dist.Work: ...

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> dist.Work: ...


class ExactPackageProcessor(PackageProcessor):
    """FedLab's exchange of a package in three parts (header, slices, content) over a group of one's own.

    Two of FedLab's limits are lifted. The receive buffer has the content's size (FedLab's adds the shapes, and so
    allocates twice as much). And the content travels on a device of one's choice: with nccl it is this process's GPU,
    while header and slices travel on the CPU over gloo.
    """

    def __init__(self, control_group: PairGroup, content_group: PairGroup, content_device: torch.device) -> None:
        self._control_group = control_group
        self._content_group = content_group
        self._content_device = content_device
        self._buffer = torch.empty(0, dtype=torch.int8, device=content_device)

    def send(self, package: Package, dst: int) -> None:
        package.header[HEADER_RECEIVER_RANK_IDX] = dst
        package.header[HEADER_DATA_TYPE_IDX] = dtype_torch2flab(package.dtype)
        slices = torch.tensor(package.slices, dtype=torch.int32)
        for part in (package.header, slices):
            self._control_group.send([part], dst, 0).wait(TRANSFER_TIMEOUT)
        self._content_group.send([package.content.to(self._content_device)], dst, 0).wait(TRANSFER_TIMEOUT)

    def receive(self, src: int) -> tuple[MessageCode, list[Tensor]]:
        """Message code and content of the next package. The content is valid until the next one."""
        header = _receive(self._control_group, torch.empty(HEADER_SIZE, dtype=torch.int32), src)
        _, _, num_slices, code, data_type = Package.parse_header(header)
        slices = _receive(self._control_group, torch.empty(num_slices, dtype=torch.int32), src).tolist()
        content = self._room(sum(_sizes(slices)), dtype_flab2torch(data_type))
        return code, Package.parse_content(slices, _receive(self._content_group, content, src).cpu())

    def _room(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory for a content; the same for every package, because rounds are alike."""
        if self._buffer.dtype != dtype or self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=dtype, device=self._content_device)
        return self._buffer[:size]


class _ControlStore(Store):
    """The store over which torch forms a group, kept equal at both ends of a control connection.

    A TCPStore of torch's takes orders from whoever reaches its port; this one only from the peer that was greeted.
    """

    def __init__(self, control: ControlConnection) -> None:
        super().__init__()
        self._control = control
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def take_in(self, key: str, value: str) -> None:
        """A value that the peer has set."""
        with self._changed:
            self._values[key] = base64.b64decode(value)
            self._changed.notify_all()

    def close(self) -> None:
        """The peer is gone, and will set no more."""
        with self._changed:
            self._closed = True
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

    def wait(self, keys: list[str], timeout: timedelta = FORMATION_TIMEOUT) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.check(keys), timeout.total_seconds())
            if not self.check(keys):
                raise ConnectionError("the peer is gone" if self._closed else "the peer does not answer")


def _form_gloo(store: Store, rank: int, ethernet: str | None, local_host: str) -> PairGroup:
    """A gloo group of two that listens on one address only.

    gloo's own choice is the address of this machine's host name, which other machines often cannot reach.
    """
    gloo = dist.ProcessGroupGloo
    options = gloo._Options()  # type: ignore[attr-defined]  # torch's stubs know it by other names
    device = gloo.create_device(interface=ethernet) if ethernet else gloo.create_device(hostname=local_host)
    options._devices = [device]
    options._threads = 1
    options._timeout = FORMATION_TIMEOUT
    return cast(PairGroup, gloo(store, rank, 2, options))


def _form_nccl(store: Store, rank: int, device: torch.device) -> PairGroup:
    """An nccl group of two, one GPU each."""
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TRANSFER_TIMEOUT
    return cast(PairGroup, dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, 2, options))


def _receive(group: PairGroup, buffer: Tensor, src: int) -> Tensor:
    group.recv([buffer], src, 0).wait(TRANSFER_TIMEOUT)
    return buffer


def _sizes(slices: list[int]) -> Iterator[int]:
    """The number of elements of each tensor, from FedLab's layout: size, number of dimensions, the dimensions."""
    position = 0
    while position < len(slices):
        size, num_dimensions = slices[position : position + 2]
        position += 2 + num_dimensions
        yield size


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
