"""A peer: what a server knows of one worker, or a worker of its server, as one thing that is there or lost.

It has two connections. Signs of life, control messages, and the announcement of every other message go over the control
connection. The other messages go over a torch process group of two, formed for these two alone (`tensors`). So a worker
that dies, hangs or joins disturbs no other, and nobody waits for a message that may never come: receiving begins when
the message has been announced, and has a limit.

A peer that is lost gives back all that it had: its sockets, threads and memory.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from multi_process.boundary import clean_text
from multi_process.messages import (
    ControlMessage,
    Message,
    PartialSum,
    StartScoring,
    StartTraining,
    from_line,
    from_package,
    to_line,
    to_package,
)
from multi_process.transport.control import ControlConnection, FinishedError, ProtocolError
from multi_process.transport.tensors import FORMATION_SECONDS, SERVER, WORKER, TensorConnection
from perfedavg.machine.descriptors import num_spare
from perfedavg.terminal.console import LOGGER
from perfedavg.terminal.entry_point import is_shortage

__all__ = ["SERVER", "WORKER", "Peer", "PeerLostError", "RunEndedError"]

ARRIVAL_SECONDS = 1.0
"""For the rest of a message to arrive that was coming when the peer left."""
SLOWEST_BYTES_PER_SECOND = 4 * 1024
"""Who sends a message more slowly than this, after a first silence, counts as gone. 30 may share one megabit."""
CLOCK_SECONDS = 0.05
"""By which gloo's clock, in milliseconds, may be ahead."""
WATCH_SECONDS = 0.02
"""Between two looks at how many descriptors are left, because who connects to gloo's port takes one. All links that
are being formed share these looks: hundreds that each looked so often would leave no time to form any."""
MAX_PLAIN_BYTES = 2**20
"""In a message without parameters."""
MAX_REPORT_BYTES = 1024
"""In a message with parameters, for what it says of one client: about four times what a refusal takes."""
MAX_UNRECEIVED = 10_000
"""Messages that wait to be received. An honest peer sends one for each thing that it was asked to do."""
MAX_UNSENT_BYTES = 2**30
"""Of tensors that wait to be sent, or four messages. A peer for which more are waiting takes none."""

WITH_PARAMETERS = frozenset(kind.__name__ for kind in (StartTraining, StartScoring, PartialSum))


_forming: set[Peer] = set()
"""Those of this process that are being formed."""


class PeerLostError(ConnectionError):
    """The peer of a link is gone: it died, it fell silent, or it ended the link."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is gone: {reason}")
        self.reason = reason


class RunEndedError(ValueError):
    """The server wants no more of this worker, or ended the run, and said why."""


_FAREWELLS: dict[str, Callable[[str], Exception]] = {
    "dropped": lambda reason: ConnectionError(f"it dropped this worker: {reason}"),
    "dismissed": lambda reason: RunEndedError(f"the server sent this worker away: {reason}"),
    "ended": lambda reason: RunEndedError(f"the server ended the run: {reason}"),
    "finished": lambda reason: FinishedError(reason),
}
"""What the server says when it ends a link, see `Peer.close`; and what a worker makes of it."""


@dataclass(frozen=True)
class _Announcement:
    """Of a package that comes over the pair. kind: the message's."""

    kind: str
    num_bytes: int


@dataclass(frozen=True)
class _Lost:
    """Why the peer is gone. Whoever asks gets an error of its own: one that was raised keeps alive who raised it."""

    error: Callable[[], Exception]


class Peer:
    """One end of a link. Messages may be sent and received in different threads; each is sent by the link's own.

    control: the connection, greeted.  side: SERVER or WORKER, which this end is.  name: of the peer, for errors.
    beat_seconds, silence_seconds: see `control.Hello`.

    num_parameters: of the model, once it is known; no message with parameters is taken before.
    num_clients: of which such a message may report, at most.
    Raises ConnectionError where there is no thread to be had for it.
    """

    def __init__(
        self, control: ControlConnection, side: int, name: str, beat_seconds: float, silence_seconds: float
    ) -> None:
        self.name = name
        self.bytes_sent = 0
        self.bytes_received = 0
        self.num_parameters: int | None = None
        self.num_clients = 0
        self._control = control
        self._side = side
        self._beat_seconds = beat_seconds
        self._silence_seconds = silence_seconds
        self._tensors = TensorConnection(control, side)
        self._announced: queue.SimpleQueue[Exception | Message | _Announcement | _Lost] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: nothing more will come
        self._changed = threading.Condition()
        self._farewell_lock = threading.Lock()
        self._num_coming = 0
        self._unsent_bytes = 0
        self._is_lost: Future[Any] = Future()
        self._lost: _Lost | None = None
        self._threads: dict[str, threading.Thread] = {}
        try:
            self._start("beat", self._beat_loop)
            self._start("receive", self._receive_loop)
        except RuntimeError as error:
            self.close(str(error))
            raise ConnectionError(f"no thread can be started for it ({error})") from None

    @property
    def lost_reason(self) -> Exception | None:
        """Why the peer is gone, or None while it lives."""
        return None if self._lost is None else self._lost.error()

    @property
    def last_heard(self) -> float:
        """When the peer last gave a sign of life, on the clock of `time.monotonic`."""
        return self._control.last_heard

    @property
    def is_connected(self) -> bool:
        """Whether it has all the descriptors that it will have."""
        return "send" in self._threads

    def connect(self, ethernet: str | None, nccl_device: torch.device | None) -> None:
        """Form the process group, together with the peer. See `TensorConnection.form`.

        Raises PeerLostError where the peer is gone meanwhile, ConnectionError where the two cannot reach each other.
        """
        formation: Future[str | None] = Future()

        def form() -> None:  # in a thread of its own: gloo does not hear that the peer is gone
            failure = None
            try:
                self._tensors.form(ethernet, nccl_device)
            except Exception as error:  # torch's own, or that of the store
                failure = _first_line(error)  # and not the error, which holds on to gloo's sockets
            formation.set_result(failure)

        _forming.add(self)
        try:
            self._start("form", form)
            deadline = time.monotonic() + FORMATION_SECONDS
            while not formation.done() and self._lost is None and time.monotonic() < deadline:
                watch_seconds = min(WATCH_SECONDS * len(_forming), deadline - time.monotonic())
                wait([formation, self._is_lost], max(0.0, watch_seconds), FIRST_COMPLETED)
                if formation.done():
                    break
                self._tensors.find_listener()
                if num_spare() < 0:
                    self._tensors.stop_listening()
                    raise ConnectionError("file descriptors run short; raise the limit with ulimit -n")
            self._raise_if_lost()
            failure = formation.result() if formation.done() else "no connection in time"
            if failure is not None:
                raise ConnectionError(
                    f"no process group with {self.name} could be formed; check --ethernet and the firewall, which must "
                    f"let server and worker reach each other on every port ({failure})"
                )
            self._start("send", self._send_loop)
        except RuntimeError as error:
            raise ConnectionError(f"no thread can be started for it ({error})") from None
        finally:
            _forming.discard(self)

    def send(self, message: Message) -> None:
        """Send a message, without waiting until it has left; its tensors must not change meanwhile.

        Raises PeerLostError, RunEndedError or FinishedError where the peer is known to be gone.
        """
        num_bytes = _tensor_bytes(message)
        with self._changed:
            self._unsent_bytes += num_bytes
        if num_bytes and self._unsent_bytes > max(MAX_UNSENT_BYTES, 4 * num_bytes):
            self._lose("it takes nothing of what it is sent")
        self._raise_if_lost()
        self._outgoing.put(message)

    def drain(self, timeout_seconds: float) -> None:
        """Wait until everything has been sent, or the peer is gone, or the time is over. The last thing to be done."""
        self._outgoing.put(None)
        if "send" in self._threads:
            self._threads["send"].join(timeout_seconds)

    def receive(self) -> Message:
        """The next message, for which it waits as long as the peer lives. Its tensors are valid until the next one.

        Raises PeerLostError where the peer is gone, RunEndedError or FinishedError where the server ended the link for
        good, ValueError for a message that is not one.
        """
        announced = self._announced.get()
        if isinstance(announced, _Announcement):
            try:
                return self._receive_package(announced)
            finally:
                with self._changed:
                    self._num_coming -= 1
                    self._changed.notify_all()
        if isinstance(announced, _Lost):
            self._announced.put(announced)  # for whoever receives next
            raise announced.error()
        if isinstance(announced, Exception):
            raise announced
        return announced

    def close(self, reason: str, farewell: str | None = None) -> None:
        """End the link, so that both ends have it gone for this reason, unless it was already.

        farewell: what the server tells the worker with the reason: that this link was `dropped` (join anew), that this
        worker is `dismissed` (leave for good), or that the run has `ended` before its time or is `finished` for all.
        """
        with self._farewell_lock:
            is_first = self._set_lost(partial(PeerLostError, self.name, reason))
            if is_first and farewell is not None:
                with contextlib.suppress(ConnectionError):
                    self._control.send_last(**{farewell: clean_text(reason)})
        self._control.end()

    def interrupt(self, error: Exception) -> None:
        """Let whoever receives on this end raise an error of its own side."""
        self._announced.put(error)

    def _start(self, name: str, body: Callable[[], None]) -> None:
        """Raises RuntimeError where the system has no thread left, or as `send` does where the link has ended."""
        thread = threading.Thread(target=body, name=f"{self.name}: {name}", daemon=True)
        with self._changed:  # so that what ends the link waits for every thread that was started
            self._raise_if_lost()
            thread.start()
            self._threads[name] = thread

    def _receive_loop(self) -> None:
        """Take in what comes over the control connection, until the peer is gone."""
        try:
            while True:
                self._handle_control(self._control.receive(self._silence_seconds))
        except (RunEndedError, FinishedError) as error:
            self._set_lost(partial(type(error), str(error)))
        except ConnectionError as error:
            self._lose(str(error))
        except Exception as error:  # whatever it was that the peer said, it must not end this thread unheard
            self.close(str(error), farewell="dismissed" if self._side == SERVER else None)

    def _handle_control(self, fields: dict[str, Any]) -> None:
        if self._announced.qsize() > MAX_UNRECEIVED:
            raise ProtocolError(f"it sent {MAX_UNRECEIVED} messages at once")
        if "word" in fields:
            try:
                self._announced.put(from_line(fields))
            except ValueError as error:
                self._announced.put(error)  # for whoever receives to send its sender away, as for a wrong package
        elif "message" in fields:
            self._announce(fields["message"], fields.get("num_bytes"))
        elif "key" in fields:
            self._tensors.store.set_by_peer(fields["key"], fields.get("value"))
        elif self._side == WORKER and (farewell := set(_FAREWELLS) & set(fields)):
            name = farewell.pop()
            raise _FAREWELLS[name](clean_text(fields[name]))
        else:
            raise ProtocolError("it said what is not of this protocol")

    def _announce(self, kind: object, num_bytes: object) -> None:
        """A package is coming. Raises ProtocolError where it is larger than any that the peer has to send."""
        if not isinstance(kind, str) or type(num_bytes) is not int or not 0 < num_bytes <= self._most_bytes(kind):
            raise ProtocolError(f"it announces a message {clean_text(kind, 40)} of {clean_text(num_bytes, 40)} bytes")
        with self._changed:
            self._num_coming += 1
        self._announced.put(_Announcement(kind, num_bytes))

    def _most_bytes(self, kind: str) -> int:
        """In a message of this kind."""
        if kind not in WITH_PARAMETERS:
            return MAX_PLAIN_BYTES
        if self.num_parameters is None:
            return 0
        return MAX_PLAIN_BYTES + MAX_REPORT_BYTES * self.num_clients + 8 * self.num_parameters

    def _receive_package(self, announced: _Announcement) -> Message:
        seconds = self._silence_seconds + announced.num_bytes / SLOWEST_BYTES_PER_SECOND
        began = time.monotonic()
        with self._connection_errors():
            try:
                code, content = self._tensors.receive(announced.num_bytes, seconds)
            except RuntimeError:
                if time.monotonic() - began < seconds - CLOCK_SECONDS:
                    raise
                late = (
                    f"a message of {announced.num_bytes} bytes was announced and did not arrive within {seconds:.0f} s"
                )
                raise ConnectionError(late) from None
        self.bytes_received += sum(part.nbytes for part in content)
        message = from_package(code, content)
        if type(message).__name__ != announced.kind:
            raise ValueError(f"a {announced.kind} message was announced, and a {type(message).__name__} came")
        return message

    def _send_loop(self) -> None:
        """Announce and send what is to be sent, one message after the other."""
        while (message := self._outgoing.get()) is not None and self._lost is None:
            try:
                with self._connection_errors():
                    if isinstance(message, ControlMessage):
                        self._control.send(**to_line(message))
                    else:
                        self._send_package(message)
            except (PeerLostError, RunEndedError, FinishedError):
                return
            except Exception as error:  # a message that cannot be written down; whoever waits here must hear of it
                self.interrupt(error)
                return

    def _send_package(self, message: Message) -> None:
        package = to_package(message)
        self._control.send(message=type(message).__name__, num_bytes=package.content.nbytes)
        self._tensors.send(package)
        self.bytes_sent += package.content.nbytes
        with self._changed:
            self._unsent_bytes -= _tensor_bytes(message)

    def _beat_loop(self) -> None:
        """Give signs of life while the peer lives; then give back all that the link had."""
        while self._lost is None:
            try:
                self._control.beat()
            except ConnectionError as error:
                self._lose(str(error))
            wait([self._is_lost], self._beat_seconds)
        with self._changed:
            self._changed.wait_for(lambda: self._num_coming == 0, ARRIVAL_SECONDS)
        with self._farewell_lock:  # the peer hears why before it finds the tensors' connection closed
            self._tensors.interrupt()
        self._control.end()
        for name in ("receive", "send"):
            if name in self._threads:
                self._threads[name].join()
        self._control.close()
        if "form" in self._threads:
            self._threads["form"].join()
        self._tensors.close()

    def _lose(self, reason: str) -> None:
        """The peer is gone. A worker that is not may come again."""
        self.close(reason, farewell="dropped" if self._side == SERVER else None)

    def _set_lost(self, error: Callable[[], Exception]) -> bool:
        """Whether this call was the one that ended the link."""
        with self._changed:
            if self._lost is not None:
                return False
            self._lost = _Lost(error)
        self._announced.put(self._lost)
        self._outgoing.put(None)
        self._is_lost.set_result(None)
        self._tensors.store.close()
        return True

    @contextmanager
    def _connection_errors(self) -> Iterator[None]:
        """Whatever way the peer is found to be gone, the link is ended and PeerLostError raised."""
        try:
            yield
        except ConnectionError as error:
            self._lose(str(error))
        except RuntimeError as error:  # torch.distributed's, in many words
            if is_shortage(error):  # this process's own, which joining anew would not end
                raise
            LOGGER.info("%s: %s", self.name, error)
            wait([self._is_lost], ARRIVAL_SECONDS)  # for the other connection, which knows better why
            self._lose("the tensors' connection was closed")
        else:
            return
        self._raise_if_lost()

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost.error()


def _tensor_bytes(message: Message) -> int:
    return sum(value.nbytes for value in vars(message).values() if isinstance(value, torch.Tensor))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
