"""A peer: what a server knows of one worker, or a worker of its server, as one thing that is there or lost.

It has two connections. Signs of life, control messages, and the announcement of every other message go over the control
connection. The other messages go over a connection for tensors, between these two alone (`tensors`). So a worker
that dies, hangs or joins disturbs no other, and nobody waits for a message that may never come: receiving begins when
the message has been announced, and has a limit.

A peer that is lost gives back all that it had: its sockets, threads and memory. Only of a message that was on its way
over gloo, what gloo needs for it stays until the time limit of the message (`process_group`).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from multi_process.boundary import clean_text
from multi_process.messages import (
    ControlMessage,
    KeptStates,
    Message,
    PartialSum,
    StartScoring,
    StartTraining,
    from_line,
    from_package,
    to_line,
    to_package,
)
from multi_process.packing import SLOW_BYTES_PER_SECOND
from multi_process.transport.control import ControlConnection, ProtocolError
from multi_process.transport.handshake import FinishedError
from multi_process.transport.tensors import (
    FORMATION_SECONDS,
    SERVER,
    SLOWEST_BYTES_PER_SECOND,
    WORKER,
    TensorConnection,
    TransferError,
)
from multi_process.transport.wire import Wire
from perfedavg.terminal.console import LOGGER

__all__ = ["SERVER", "WORKER", "Peer", "PeerLostError", "RunEndedError"]

ARRIVAL_SECONDS = 1.0
"""For the rest of a message to arrive that was coming when the peer left, while the connection for it is there."""
CLOCK_SECONDS = 0.05
"""By which gloo's clock, in milliseconds, may be ahead."""
WATCH_SECONDS = 0.02
"""Between two looks at the connection for tensors: how its formation gets on, and whether it has ended. All peers that
are being connected share the former: hundreds that each looked so often would leave no time to connect any."""
LEAST_TIMED_BYTES = 2**18
"""Of a message by which it is known how fast the line is."""
MAX_PLAIN_BYTES = 2**20
"""In a message without parameters."""
MAX_REPORT_BYTES = 1024
"""In a message with parameters, for what it says of one client: about four times what a refusal takes."""
PEER_DESCRIPTORS = 8
"""Of a peer: its control connection, gloo's connection (and ours to it), port, poll and pipe, and one to spare."""
MAX_UNRECEIVED = 10_000
"""Messages that wait to be received. An honest peer sends one for each thing that it was asked to do."""
MAX_UNSENT_BYTES = 2**30
"""Of tensors that wait to be sent, or four messages, and the states of clients in hand. A peer for which more are
waiting takes none."""

WITH_PARAMETERS = frozenset(kind.__name__ for kind in (StartTraining, StartScoring, KeptStates, PartialSum))

_connecting: set[Peer] = set()
"""Those of this process that are forming their connection for tensors."""


class PeerLostError(ConnectionError):
    """The peer died, fell silent, or ended the connection."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is gone: {reason}")
        self.reason = reason


class RunEndedError(ValueError):
    """The server sent this worker away for good, or ended the run, and said why."""


_FAREWELLS: dict[str, Callable[[str], Exception]] = {
    "dropped": lambda reason: ConnectionError(f"it dropped this worker: {reason}"),
    "dismissed": lambda reason: RunEndedError(f"the server sent this worker away: {reason}"),
    "ended": lambda reason: RunEndedError(f"the server ended the run: {reason}"),
    "finished": lambda reason: FinishedError(reason),
}
"""What the server says at the end, see `Peer.close`; and what a worker makes of it."""

_Lost = Callable[[], Exception]
"""Why a peer is lost. Whoever asks gets an error of its own: one that was raised keeps alive who raised it."""


_Announcement = tuple[str, int]
"""A package is coming over the tensors' connection: its message's kind, and its bytes."""


class Peer:
    """The other side, as seen from this one. Messages may be sent and received in different threads.

    control: the connection, after the handshake.
    tensors: the other one, which is not formed yet.
    side: SERVER or WORKER, which this side is.
    name: of the peer, for errors.
    beat_seconds, silence_seconds: see `handshake.Hello`.

    num_parameters: of the model, once it is known; no message with parameters is taken before.
    num_clients: of which such a message may report, at most.
    max_states_bytes: of what clients keep, in one message.
    num_in_hand: groups of clients that the worker has at a time, whose states may all be on their way.
    Raises ConnectionError where there is no thread to be had for it.
    """

    def __init__(
        self,
        control: ControlConnection,
        tensors: TensorConnection,
        side: int,
        name: str,
        beat_seconds: float,
        silence_seconds: float,
    ) -> None:
        self.name = name
        self.bytes_sent = 0
        self.bytes_received = 0
        self.num_parameters: int | None = None
        self.num_clients = 0
        self.max_states_bytes = 0
        self.num_in_hand = 0
        self._control = control
        self._side = side
        self._beat_seconds = beat_seconds
        self._silence_seconds = silence_seconds
        self._tensors = tensors
        self._incoming: queue.SimpleQueue[Message | _Announcement | Exception | _Lost] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: nothing more will come
        self._changed = threading.Condition()
        self._farewell_lock = threading.Lock()
        self._receiving = threading.Lock()  # held while a package is, so that nobody waits for a socket that is closed
        self._num_coming = 0
        self._is_slow = False
        self._unsent_bytes = 0
        self._lost: _Lost | None = None
        self._is_lost: Future[Any] = Future()
        self._threads: dict[str, threading.Thread] = {}
        try:
            self._start("beat", self._beat_loop)
            self._start("receive", self._receive_loop)
        except RuntimeError as error:
            self.close(str(error))
            raise ConnectionError(f"no thread can be started for it ({error})") from None

    @property
    def lost_reason(self) -> Exception | None:
        """Why the peer is lost, or None while it lives."""
        return None if self._lost is None else self._lost()

    @property
    def last_heard(self) -> float:
        """When the peer last gave a sign of life, on the clock of `time.monotonic`."""
        return self._control.last_heard

    @property
    def is_connected(self) -> bool:
        """Whether it has all the descriptors that it will have."""
        return "send" in self._threads

    def connect(self) -> None:
        """Form the connection for tensors, together with the peer.

        Raises PeerLostError where the peer is lost meanwhile, ConnectionError where the two cannot reach each other.
        """
        formation: Future[str | None] = Future()

        def form() -> None:  # in a thread of its own: gloo does not hear that the peer is lost
            failure = None
            try:
                self._tensors.form()
            except Exception as error:  # torch's own, or that of the store
                failure = _first_line(error)  # and not the error, which holds on to gloo's sockets
            formation.set_result(failure)

        _connecting.add(self)
        try:
            self._start("form", form)
            deadline = time.monotonic() + FORMATION_SECONDS
            while not formation.done() and self._lost is None and time.monotonic() < deadline:
                watch_seconds = min(WATCH_SECONDS * len(_connecting), deadline - time.monotonic())
                wait([formation, self._is_lost], max(0.0, watch_seconds), FIRST_COMPLETED)
                if formation.done():
                    break
                self._tensors.watch()
            self._raise_if_lost()
            failure = formation.result() if formation.done() else "no connection in time"
            if failure is not None:
                raise ConnectionError(
                    f"no connection for tensors with {self.name} could be formed ({failure}){self._tensors.hint}"
                )
            self._start("send", self._send_loop)
        except RuntimeError as error:
            raise ConnectionError(f"no thread can be started for it ({error})") from None
        finally:
            _connecting.discard(self)

    def attach(self, wire: Wire) -> None:
        """Server: the worker's second connection has come. Raises ProtocolError where it is not wanted."""
        self._tensors.attach(wire)

    def send(self, message: Message) -> None:
        """Send a message, without waiting until it has left; its tensors must not change meanwhile.

        Raises PeerLostError, RunEndedError or FinishedError where the peer is known to be lost.
        """
        num_bytes = _tensor_bytes(vars(message))
        with self._changed:
            self._unsent_bytes += num_bytes
        most = max(MAX_UNSENT_BYTES, 4 * num_bytes) + self.num_in_hand * self.max_states_bytes
        if num_bytes and self._unsent_bytes > most:
            self._lose("it takes nothing of what it is sent")
        self._raise_if_lost()
        self._outgoing.put(message)

    def drain(self, timeout_seconds: float) -> None:
        """Wait until everything has been sent, or the peer is lost, or the time is over. The last thing to be done."""
        self._outgoing.put(None)
        if "send" in self._threads:
            self._threads["send"].join(timeout_seconds)

    def receive(self) -> Message:
        """The next message, for which it waits as long as the peer lives. Its tensors are valid until the next one.

        Raises PeerLostError where the peer is lost, RunEndedError or FinishedError where the server ended the
        connection for good, ValueError for a message that is not one.
        """
        incoming = self._incoming.get()
        if isinstance(incoming, tuple):
            try:
                return self._receive_package(*incoming)
            finally:
                with self._changed:
                    self._num_coming -= 1
                    self._changed.notify_all()
        if isinstance(incoming, Exception):
            raise incoming
        if isinstance(incoming, Message):
            return incoming
        self._incoming.put(incoming)  # for whoever receives next
        raise incoming()

    def close(self, reason: str, farewell: str | None = None) -> None:
        """End the connections, so that both sides have lost each other for this reason, unless they had already.

        farewell: what the server tells the worker with the reason: that it was `dropped` (join anew), that it is
        `dismissed` (leave for good), or that the run has `ended` before its time or is `finished` for all.
        """
        with self._farewell_lock:
            is_first = self._set_lost(partial(PeerLostError, self.name, reason))
            if is_first and farewell is not None:
                with contextlib.suppress(ConnectionError):
                    self._control.send_last(**{farewell: clean_text(reason)})
        self._control.end()

    def interrupt(self, error: Exception) -> None:
        """Let whoever receives on this side raise an error of its own."""
        self._incoming.put(error)

    def _start(self, name: str, body: Callable[[], None]) -> None:
        """Raises RuntimeError where the system has no thread left, or as `send` does where the peer is lost."""
        thread = threading.Thread(target=body, name=f"{self.name}: {name}", daemon=True)
        with self._changed:  # so that _beat_loop waits for every thread that was started
            self._raise_if_lost()
            thread.start()
            self._threads[name] = thread

    def _receive_loop(self) -> None:
        """Handle what comes over the control connection, until the peer is lost."""
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
        if self._incoming.qsize() > MAX_UNRECEIVED:
            raise ProtocolError(f"it sent {MAX_UNRECEIVED} messages at once")
        if "control" in fields:
            try:
                self._incoming.put(from_line(fields))
            except ValueError as error:
                self._incoming.put(error)  # for whoever receives to send its sender away, as for a wrong package
        elif "message" in fields:
            self._announce(fields["message"], fields.get("num_bytes"))
        elif "key" in fields:
            self._tensors.set_by_peer(fields["key"], fields.get("value"))
        elif self._side == WORKER and (farewells := set(_FAREWELLS) & set(fields)):
            farewell = farewells.pop()
            raise _FAREWELLS[farewell](clean_text(fields[farewell]))
        else:
            raise ProtocolError("it said what is not of this protocol")

    def _announce(self, kind: object, num_bytes: object) -> None:
        """A package is coming. Raises ProtocolError where it is larger than any that the peer has to send."""
        if not isinstance(kind, str) or type(num_bytes) is not int or not 0 < num_bytes <= self._most_bytes(kind):
            raise ProtocolError(f"it announces a message {clean_text(kind, 40)} of {clean_text(num_bytes, 40)} bytes")
        with self._changed:
            self._num_coming += 1
        self._incoming.put((kind, num_bytes))

    def _most_bytes(self, kind: str) -> int:
        """In a message of this kind."""
        if kind not in WITH_PARAMETERS:
            return MAX_PLAIN_BYTES
        if self.num_parameters is None:
            return 0
        fixed_bytes = MAX_PLAIN_BYTES + MAX_REPORT_BYTES * self.num_clients + 8 * self.num_parameters
        return fixed_bytes + self.max_states_bytes

    def _receive_package(self, kind: str, num_bytes: int) -> Message:
        seconds = self._silence_seconds + num_bytes / SLOWEST_BYTES_PER_SECOND
        began = time.monotonic()
        with self._connection_errors():
            try:
                with self._receiving:
                    code, content = self._tensors.receive(num_bytes, seconds)
            except TransferError:
                if time.monotonic() - began < seconds - CLOCK_SECONDS:
                    raise
                raise ConnectionError(
                    f"a message of {num_bytes} bytes was announced and did not arrive within {seconds:.0f} s"
                ) from None
        self.bytes_received += num_bytes
        if num_bytes >= LEAST_TIMED_BYTES:
            self._is_slow = num_bytes < SLOW_BYTES_PER_SECOND * (time.monotonic() - began)
        message = from_package(code, content, self._most_bytes(kind))
        if type(message).__name__ != kind:
            raise ValueError(f"a {kind} message was announced, and a {type(message).__name__} came")
        return message

    def _send_loop(self) -> None:
        """Send what is to be sent, one message after the other."""
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
        package = to_package(message, packs_sums=self._is_slow)
        self._control.send(message=type(message).__name__, num_bytes=package.content.nbytes)
        self.bytes_sent += package.content.nbytes
        self._tensors.send(package)
        with self._changed:
            self._unsent_bytes -= _tensor_bytes(vars(message))

    def _beat_loop(self) -> None:
        """Give signs of life while the peer lives; then give back all that it had."""
        while self._lost is None:
            try:
                self._control.beat()
            except ConnectionError as error:
                self._lose(str(error))
            wait([self._is_lost], self._beat_seconds)
        self._await_what_is_coming()
        with self._farewell_lock:  # the peer hears why before it finds the tensors' connection closed
            self._tensors.interrupt()
        self._control.end()
        for name in ("receive", "send"):
            if name in self._threads:
                self._threads[name].join()
        self._control.close()
        if "form" in self._threads:
            self._threads["form"].join()
        with self._receiving:  # whose descriptor may be another connection's once it is closed
            self._tensors.close()

    def _await_what_is_coming(self) -> None:
        """For as long as it may come from a peer that is lost, and a moment for the end of it to be taken in."""
        deadline, is_at_end = time.monotonic() + ARRIVAL_SECONDS, False
        with self._changed:
            while self._num_coming and not is_at_end and time.monotonic() < deadline:
                is_at_end = self._tensors.is_at_end()
                self._changed.wait(WATCH_SECONDS)

    def _lose(self, reason: str) -> None:
        """The peer is lost. A worker that lives may join again."""
        self.close(reason, farewell="dropped" if self._side == SERVER else None)

    def _set_lost(self, lost: _Lost) -> bool:
        """Whether this call was the first to find the peer lost."""
        with self._changed:
            if self._lost is not None:
                return False
            self._lost = lost
        self._incoming.put(lost)
        self._outgoing.put(None)
        self._is_lost.set_result(None)
        return True

    @contextmanager
    def _connection_errors(self) -> Iterator[None]:
        """Whatever way the peer is found to be lost, the connections are ended and PeerLostError raised."""
        try:
            yield
        except ConnectionError as error:
            self._lose(str(error))
        except TransferError as error:
            LOGGER.info("%s: %s", self.name, error)
            wait([self._is_lost], ARRIVAL_SECONDS)  # for the control connection, which knows better why
            self._lose("the tensors' connection was closed")
        else:
            return
        self._raise_if_lost()

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost()


def _tensor_bytes(value: object) -> int:
    """Of all tensors in it, where it is one or a dictionary with some."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_tensor_bytes, value.values())) if isinstance(value, dict) else 0


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
