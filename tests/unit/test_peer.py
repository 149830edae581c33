"""A link is alive or gone, never in between: whoever sends or receives on it hears at once, and why."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch
from helpers import basic, wait_until

from multi_process.messages import (
    AssignGroups,
    Finish,
    GroupScored,
    GroupTrained,
    Message,
    PartialSum,
    RequestPartialSum,
    StartTraining,
)
from multi_process.transport import peer as peer_module
from multi_process.transport import process_group, store
from multi_process.transport.control import ControlConnection
from multi_process.transport.handshake import FinishedError
from multi_process.transport.keys import tls_context
from multi_process.transport.peer import SERVER, WORKER, Peer, PeerLostError, RunEndedError
from multi_process.transport.process_group import GroupConnection
from multi_process.transport.stream import StreamConnection
from multi_process.transport.tensors import TensorConnection, TransferError
from multi_process.transport.wire import Wire
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import ClientReport

REPORT = ClientReport(5, 16, 0.25, 1.5)
NEVER = 1000.0
"""Seconds between signs of life of an end that falls silent."""
SO_MAX_PACING_RATE = 47
"""Linux's option of a socket, which Python does not name."""
SLOW, FAST = 2**19, 2**31 - 1
"""Bytes a second."""
SILENCE = 60.0
"""Seconds of it after which an end is lost. Far above what holds one up on a busy machine."""


def wires(keys: Path | None) -> tuple[Wire, Wire]:
    """The two ends of a connection, a server's and a worker's: in plain text, or with keys."""
    tls = [None if keys is None else tls_context(keys, is_server) for is_server in (True, False)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    server, worker = Wire(accepted, tls[0], is_server=True), Wire(dialled, tls[1])
    with beside(lambda: server.begin(time.monotonic() + 60)):
        worker.begin(time.monotonic() + 60)
    return server, worker


class Ends:
    """A server's peer and a worker's, in this process. A gloo group of two takes one thread an end to form.

    transport: what carries tensors, `tls` for the server's port with keys.
    """

    def __init__(
        self,
        transport: str,
        keys: Path,
        server_beat: float,
        worker_beat: float,
        is_connected: bool,
        ethernet: str | None,
    ) -> None:
        used = keys if transport == "tls" else None
        self.server_wire, self.worker_wire = wires(used)
        self.server_control = ControlConnection(self.server_wire)
        self.worker_control = ControlConnection(self.worker_wire)
        server_tensors: TensorConnection
        worker_tensors: TensorConnection
        if transport == "gloo":
            server_tensors = GroupConnection(self.server_control, SERVER, ethernet, None)
            worker_tensors = GroupConnection(self.worker_control, WORKER, ethernet, None)
        else:

            def dial() -> Wire:
                server_end, worker_end = wires(used)
                server_tensors.attach(server_end)
                return worker_end

            server_tensors, worker_tensors = StreamConnection(SERVER, None), StreamConnection(WORKER, dial)
        self.server = Peer(self.server_control, server_tensors, SERVER, "worker 1", server_beat, SILENCE)
        self.worker = Peer(self.worker_control, worker_tensors, WORKER, "the server", worker_beat, SILENCE)
        self.server.num_parameters = self.worker.num_parameters = 100_000
        if is_connected:
            with beside(lambda: self.server.connect()):
                self.worker.connect()

    def close(self) -> None:
        for end in (self.server, self.worker):
            end.close("the test is over")


Connect = Callable[..., Ends]


def connecting(transport: str, keys: Path) -> Iterator[Connect]:
    opened: list[Ends] = []

    def build(
        server_beat: float = 0.1,
        worker_beat: float = 0.1,
        is_connected: bool = True,
        ethernet: str | None = None,
    ) -> Ends:
        opened.append(Ends(transport, keys, server_beat, worker_beat, is_connected, ethernet))
        return opened[-1]

    yield build
    for ends in opened:
        ends.close()


@pytest.fixture(params=["gloo", "tcp", "tls"])
def connect(request: pytest.FixtureRequest, keys: Path) -> Iterator[Connect]:
    yield from connecting(request.param, keys)


@pytest.fixture
def connect_gloo(keys: Path) -> Iterator[Connect]:
    yield from connecting("gloo", keys)


@contextlib.contextmanager
def beside(body: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Run a function in a thread beside the block. Yields what will hold the error that it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            body()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield errors
    thread.join(120)
    assert not thread.is_alive(), "it waits for ever"


def hear_of_the_end(end: Peer) -> Exception:
    """Receive until the peer is lost. Returns the error that says why."""
    try:
        while True:
            end.receive()
    except (PeerLostError, RunEndedError, FinishedError) as error:
        return error


def test_messages_arrive_in_order_in_both_directions_at_once(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server sends the next client while the worker reports the last one."""
    monkeypatch.setattr(peer_module, "SLOW_BYTES_PER_SECOND", 0.0)
    ends = connect()
    parameters = torch.randn(100_000)
    total = torch.randint(-(2**62), 2**62, (100_000,))
    down: list[Message] = [
        StartTraining(1, 2, 3, parameters),
        AssignGroups([[5, 6], [2**40]]),
        RequestPartialSum(),
        Finish(),
    ]
    up: list[Message] = [GroupTrained(5), GroupTrained(2**40), PartialSum(7, 3, [REPORT], total)]
    for message in down:
        ends.server.send(message)
    for message in up:
        ends.worker.send(message)
    start = ends.worker.receive()
    assert isinstance(start, StartTraining)
    assert (start.phase, start.round_number, start.capacity) == (1, 2, 3)
    assert torch.equal(start.parameters, parameters)
    assert [ends.worker.receive() for _ in down[1:]] == down[1:]
    assert [ends.server.receive() for _ in up[:2]] == up[:2]
    answer = ends.server.receive()
    assert isinstance(answer, PartialSum)
    assert (answer.weight, answer.reports) == (7, [REPORT])
    assert torch.equal(answer.total, total)
    for end in (ends.server, ends.worker):
        end.drain(120)
    assert ends.server.bytes_sent == ends.worker.bytes_received > parameters.nbytes
    assert ends.worker.bytes_sent == ends.server.bytes_received > total.nbytes


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_sum_is_packed_where_the_model_took_long_to_come(
    is_slow: bool, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fast line packing takes longer than what it saves."""
    monkeypatch.setattr(peer_module, "SLOW_BYTES_PER_SECOND", math.inf if is_slow else 0.0)
    ends = connect()
    total = torch.randint(-(2**20), 2**20, (100_000,))
    ends.server.send(StartTraining(1, 2, 3, torch.randn(100_000)))
    ends.worker.receive()
    ends.worker.send(PartialSum(7, 3, [REPORT], total))
    answer = ends.server.receive()
    assert isinstance(answer, PartialSum)
    assert torch.equal(answer.total, total)
    assert (ends.server.bytes_received < total.nbytes / 2) == is_slow


def test_a_message_about_a_large_group_arrives(connect: Connect) -> None:
    """A GPU may score a thousand clients at once; in a handshake, nobody may say so much."""
    ends = connect()
    curve = tuple(basic(1 / 3, epoch / 7) for epoch in range(7))
    score = ClientScore(0, 16, 4, basic(1.5, 0.5), basic(1.25, 0.75), curve)
    message = GroupScored([replace(score, client_id=number) for number in range(1000)])
    ends.worker.send(message)
    assert ends.server.receive() == message


def test_messages_of_several_threads_stay_whole(connect: Connect) -> None:
    """A worker's slots report side by side; parts of two messages that mix on the wire would be neither."""
    ends = connect()
    num_threads, num_messages = 4, 25

    def report(slot: int) -> None:
        for number in range(num_messages):
            total = torch.full((1000,), slot * num_messages + number)
            ends.worker.send(PartialSum(slot, number + 1, [REPORT], total))

    with contextlib.ExitStack() as stack:
        failures = [stack.enter_context(beside(lambda slot=slot: report(slot))) for slot in range(num_threads)]  # type: ignore[misc]
        received = [ends.server.receive() for _ in range(num_threads * num_messages)]
    assert failures == [[]] * num_threads
    seen = set()
    for message in received:
        assert isinstance(message, PartialSum)
        seen.add((message.weight, message.capacity))
    assert len(seen) == num_threads * num_messages


def test_tensors_are_whole_while_signs_of_life_go_on(connect: Connect) -> None:
    ends = connect(server_beat=0.001, worker_beat=0.001)
    for value in range(1, 21):
        ends.server.send(StartTraining(1, value, 1, torch.full((50_000,), float(value))))
        start = ends.worker.receive()
        assert isinstance(start, StartTraining)
        assert start.parameters.unique().tolist() == [value]


def test_an_end_that_is_closed_ends_the_other(connect: Connect) -> None:
    ends = connect(server_beat=NEVER)  # or it might learn of it by that
    with beside(lambda: hear_of_the_end(ends.server)):
        ends.worker.close("it had enough")
    assert str(ends.worker.lost_reason) == "the server is gone: it had enough"
    assert str(ends.server.lost_reason) == "worker 1 is gone: the connection was closed"
    for end in (ends.server, ends.worker):
        with pytest.raises(PeerLostError):
            end.send(Finish())
        assert isinstance(hear_of_the_end(end), PeerLostError)


def test_a_peer_without_signs_of_life_is_gone(connect: Connect) -> None:
    """Nothing closes the connections of a host that is cut off."""
    ends = connect(worker_beat=NEVER)
    ends.server._silence_seconds = 2.0  # from the next message on, now that they are connected
    ends.worker.send(GroupTrained(5))
    started = time.monotonic()
    error = hear_of_the_end(ends.server)
    assert str(error) == "worker 1 is gone: no sign of life for 2 s"
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("side", [SERVER, WORKER])
def test_a_peer_that_falls_silent_in_the_middle_of_a_message_is_gone(connect: Connect, side: int) -> None:
    """Nothing interrupts gloo's receive, so whoever waits for the message must not wait in there."""
    server_beat, worker_beat = ((0.1, NEVER), (NEVER, 0.1))[side]
    ends = connect(server_beat=server_beat, worker_beat=worker_beat)
    receiver, sender = ((ends.server, ends.worker_control), (ends.worker, ends.server_control))[side]
    receiver._silence_seconds = 2.0  # from the next message on, now that they are connected
    sender.send(message="Finish", num_bytes=2**20)  # of which nothing comes; by its size, it may take minutes
    started = time.monotonic()
    with pytest.raises(PeerLostError, match=r"no sign of life for 2 s"):
        receiver.receive()
    assert time.monotonic() - started < peer_module.ARRIVAL_SECONDS + 60


@pytest.mark.parametrize("leaves", ["sender", "receiver"])
@pytest.mark.parametrize("side", [SERVER, WORKER])
def test_who_leaves_when_half_of_a_message_has_come_is_not_waited_for(
    connect: Connect, side: int, leaves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo tells no transfer, which may take long for so large a message. Both peers' own threads end, too."""
    monkeypatch.setattr(peer_module, "ARRIVAL_SECONDS", NEVER)
    ends = connect()
    receiver, sender = ((ends.server, ends.worker), (ends.worker, ends.server))[side]
    receiver.num_parameters = 10**9
    set_pace(sender, SLOW)
    sender.send(StartTraining(1, 2, 1, torch.ones(2**22)))
    with beside(lambda: hear_of_the_end(receiver)):
        came = bytes_received(receiver)
        wait_until(lambda: bytes_received(receiver) >= came + 2**18)
        (sender if leaves == "sender" else receiver).close("it leaves")
        set_pace(sender, FAST)
    for end in (sender, receiver):
        end._threads["beat"].join(SILENCE)  # which ends the others, and gives all back
        assert not any(thread.is_alive() for thread in end._threads.values())


def set_pace(end: Peer, bytes_per_second: int) -> None:
    for wire in tensor_wires(end):
        with contextlib.suppress(OSError):  # it is closed
            wire.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, bytes_per_second)


def tensor_wires(end: Peer) -> list[socket.socket]:
    """The sockets that carry an end's tensors; with gloo those of both ends, which are in one process here."""
    tensors = end._tensors
    if isinstance(tensors, GroupConnection):
        return tensors._wires
    assert isinstance(tensors, StreamConnection)
    assert tensors._wire is not None
    return [tensors._wire._socket]


def bytes_received(end: Peer) -> int:
    """Of tensors, by the kernel's count (tcpi_bytes_received)."""
    information = [wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256) for wire in tensor_wires(end)]
    return sum(struct.unpack_from("Q", one, 128)[0] for one in information)


def test_no_connection_is_closed_while_a_message_is_received(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo never ends a transfer whose group is gone, so that the server would wait for who fell silent."""
    ends = connect()
    tensors, happened = ends.server._tensors, list[str]()
    begins, is_interrupted = threading.Event(), threading.Event()

    def receive(num_bytes: int, timeout_seconds: float) -> None:
        begins.set()
        assert is_interrupted.wait(SILENCE)
        time.sleep(0.3)  # in which it would be closed
        happened.append("received")
        raise TransferError("it was interrupted")

    for name, note in (("interrupt", is_interrupted.set), ("close", lambda: happened.append("closed"))):
        monkeypatch.setattr(tensors, name, partial(_both, note, getattr(tensors, name)))
    monkeypatch.setattr(tensors, "receive", receive)
    ends.worker_control.send(message="PartialSum", num_bytes=1000)
    with beside(lambda: hear_of_the_end(ends.server)):
        assert begins.wait(SILENCE)
        ends.server.close("the test is over")
    ends.server._threads["beat"].join()
    assert happened == ["received", "closed"]


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


def test_a_peer_that_leaves_in_the_middle_of_a_message_is_gone(connect: Connect) -> None:
    ends = connect()
    ends.worker_control.send(message="Finish", num_bytes=100)
    ends.worker_wire.end()
    with pytest.raises(PeerLostError, match="the connection was closed"):
        ends.server.receive()


def test_a_message_that_was_sent_before_the_end_arrives(connect: Connect) -> None:
    """The server says that the run is over, and closes at once."""
    ends = connect()
    ends.server.send(Finish())
    with beside(lambda: ends.server.drain(120)):
        assert isinstance(ends.worker.receive(), Finish)
    ends.server.close("the run is over")
    assert isinstance(hear_of_the_end(ends.worker), PeerLostError)


@pytest.mark.parametrize(
    ("farewell", "kind", "text"),
    [
        ("dropped", PeerLostError, "the server is gone: it dropped this worker: other data"),
        ("dismissed", RunEndedError, "the server sent this worker away: other data"),
        ("ended", RunEndedError, "the server ended the run: other data"),
        ("finished", FinishedError, "other data"),
    ],
)
def test_a_worker_is_told_whether_to_join_anew(
    connect: Connect, farewell: str, kind: type[Exception], text: str
) -> None:
    ends = connect()
    ends.server.close("other data", farewell=farewell)
    error = hear_of_the_end(ends.worker)
    assert type(error) is kind
    assert str(error) == text
    with pytest.raises(kind, match="other data"):
        ends.worker.send(Finish())


@pytest.mark.parametrize(
    "content",
    [b'{"hello": 1}\n', b"nonsense\n", b"[1]\n", b'{"key": "a", "value": "b"}\n', b"[" * 60_000 + b"\n"],
    ids=lambda content: content[:20].decode(),
)
def test_a_peer_that_says_what_is_not_of_the_protocol_is_gone(connect: Connect, content: bytes) -> None:
    """Any other error would end the thread that listens, and nobody would hear that the peer is lost."""
    ends = connect(is_connected=False)
    ends.worker_wire.send(memoryview(content), time.monotonic() + 60)
    assert isinstance(hear_of_the_end(ends.server), PeerLostError)


def test_who_receives_a_wrong_message_hears_what_is_wrong_and_may_tell_its_sender(connect: Connect) -> None:
    """As with a wrong package: the sender is sent away for good, not asked to join anew."""
    ends = connect(is_connected=False)
    ends.worker_control.send(control="GroupTrained", values={"first": -1})
    with pytest.raises(ValueError, match="first is -1, must be in 0"):
        ends.server.receive()
    assert ends.server.lost_reason is None


def test_a_worker_cannot_dismiss_the_server(connect: Connect) -> None:
    ends = connect(is_connected=False)
    ends.worker_control.send(dismissed="because")
    assert str(hear_of_the_end(ends.server)) == "worker 1 is gone: it said what is not of this protocol"


def test_drain_waits_until_everything_has_left(connect: Connect) -> None:
    ends = connect()
    for _ in range(10):
        ends.worker.send(PartialSum(1, 1, [REPORT], torch.zeros(10_000, dtype=torch.int64)))
    with beside(lambda: ends.worker.drain(120)) as errors:
        received = [ends.server.receive() for _ in range(10)]
    assert not errors
    assert len(received) == 10


def test_drain_does_not_wait_for_who_is_gone(connect: Connect) -> None:
    ends = connect()
    ends.server.close("over")
    hear_of_the_end(ends.worker)
    started = time.monotonic()
    ends.worker.drain(200)
    assert time.monotonic() - started < 100


def test_an_error_of_a_slot_reaches_the_thread_that_receives(connect: Connect) -> None:
    """The main thread of a worker waits for messages while its slots work."""
    ends = connect()
    with beside(ends.worker.receive) as errors:
        ends.worker.interrupt(ArithmeticError("client 3"))
    assert isinstance(errors[0], ArithmeticError)
    assert ends.worker.lost_reason is None, "the connection itself goes on, so that the server can be told"


def test_the_interface_of_the_tensors_can_be_named(connect_gloo: Connect) -> None:
    ends = connect_gloo(ethernet="lo")
    ends.server.send(Finish())
    assert isinstance(ends.worker.receive(), Finish)


def test_no_group_is_formed_with_who_is_gone(connect: Connect) -> None:
    ends = connect(is_connected=False)
    ends.worker.close("over")
    with pytest.raises(PeerLostError):
        ends.server.connect()


def test_a_peer_that_does_not_answer_is_not_waited_for_in_vain(
    connect_gloo: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "FORMATION_SECONDS", 0.5)
    monkeypatch.setattr(process_group, "FORMATION_SECONDS", 0.5)
    monkeypatch.setattr(store, "WAIT_SECONDS", 0.5)
    ends = connect_gloo(is_connected=False)
    with pytest.raises(ConnectionError, match=r"could be formed .*; check --ethernet"):
        ends.server.connect()


def test_who_leaves_while_the_group_is_formed_is_not_waited_for(connect_gloo: Connect) -> None:
    ends = connect_gloo(is_connected=False)
    with beside(lambda: ends.server.connect()) as errors:
        store = cast(GroupConnection, ends.worker._tensors).store
        while not store.check(["gloo/0/0"]):  # the server has said at which address it listens
            time.sleep(0.01)
        ends.worker.close("over")
    assert isinstance(errors[0], PeerLostError)


def test_signs_of_life_come_through_while_a_large_message_is_stuck(connect: Connect) -> None:
    """100 MB may take minutes on a slow line; whoever sends them must not be taken for dead meanwhile."""
    ends = connect()
    ends.server.num_parameters = 13_000_000
    ends.worker.send(PartialSum(1, 1, [REPORT], torch.zeros(13_000_000, dtype=torch.int64)))
    while not ends.server._num_coming:  # it has been announced, and nobody receives it
        time.sleep(0.01)
    for _ in range(20):
        heard = ends.server.last_heard
        while ends.server.last_heard == heard:
            assert ends.server.lost_reason is None
            time.sleep(0.01)
    assert isinstance(ends.server.receive(), PartialSum)


def test_the_last_sign_of_life_is_known(connect: Connect) -> None:
    """By it the server tells a rank that is in use from one whose worker is gone."""
    ends = connect(is_connected=False)
    asked = time.monotonic()
    while ends.server.last_heard <= asked:
        assert time.monotonic() - asked < 60
        time.sleep(0.01)
