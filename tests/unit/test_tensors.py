"""The tensors' connection: who connects to gloo's port ends nothing, and a peer that is lost leaves nothing behind."""

from __future__ import annotations

import base64
import contextlib
import gc
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from datetime import timedelta
from functools import partial
from typing import Any, cast

import pytest
import torch
from helpers import wait_until

from multi_process.fedlab_adapter import sizes_of
from multi_process.messages import AssignGroups, Finish, KeptStates, Message, PartialSum, StartTraining, to_package
from multi_process.transport import peer as peer_module
from multi_process.transport import process_group, store
from multi_process.transport.control import ControlConnection, ProtocolError
from multi_process.transport.peer import SERVER, WORKER, Peer, PeerLostError
from multi_process.transport.process_group import GroupConnection
from multi_process.transport.store import MAX_KEYS
from multi_process.transport.tensors import TransferError
from multi_process.transport.wire import Wire
from perfedavg.engine.tasks import ClientReport

NUM_PARAMETERS = 1000
FLOODED_LIMIT = 4096
"""Of descriptors, for a process that is flooded."""
FLOOD = """
import socket, sys
for _ in range(int(sys.argv[2])):  # closed at this end at once: gloo keeps its own ends
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60).close()
    except ConnectionError:
        break
"""


def group_peer(control: ControlConnection, side: int, name: str) -> Peer:
    return Peer(control, GroupConnection(control, side, None, None), side, name, 0.1, 30.0)


class Ends:
    """A server's peer and a worker's, in this process."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.worker_wire = socket.create_connection(listener.getsockname())
            server_wire, _ = listener.accept()
        self.worker_control = ControlConnection(Wire(self.worker_wire))
        self.server = group_peer(ControlConnection(Wire(server_wire)), SERVER, "worker 1")
        self.worker = group_peer(self.worker_control, WORKER, "the server")
        self.server.num_parameters = self.worker.num_parameters = NUM_PARAMETERS

    def form(self) -> Ends:
        thread = threading.Thread(target=lambda: self.server.connect())
        thread.start()
        self.worker.connect()
        thread.join()
        return self

    def close(self) -> None:
        """Wait for the end of both links, so that no thread of gloo's is left behind."""
        for end in (self.server, self.worker):
            end.close("the test is over")
        for end in (self.server, self.worker):
            end._threads["beat"].join(60)


@pytest.fixture
def connect() -> Iterator[Callable[[], Ends]]:
    opened: list[Ends] = []

    def build() -> Ends:
        opened.append(Ends())
        return opened[-1]

    yield build
    for ends in opened:
        ends.close()


Connect = Callable[[], Ends]


def listening_ports() -> set[int]:
    """Of this process's TCP sockets."""
    ports = set()
    for _, one in process_group._own_sockets():
        with one:
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                ports.add(one.getsockname()[1])
    return ports


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def num_threads() -> int:
    """gloo's included, which Python does not know."""
    return len(os.listdir("/proc/self/task"))


@contextlib.contextmanager
def without_cycle_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_gloo_listens_no_longer_than_it_takes_to_form_the_pair(connect: Connect) -> None:
    """It would keep a descriptor for each stranger, and end the process where it runs out of them."""
    before = listening_ports()
    ends = connect()
    seen: set[int] = set()
    stop_listening = GroupConnection.stop_listening

    def watched(connection: GroupConnection) -> None:
        seen.update(listening_ports() - before)
        stop_listening(connection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupConnection, "stop_listening", watched)
        ends.form()
    assert len(seen) == 2, "each side had a port"
    assert listening_ports() <= before
    for port in seen:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    ends.server.send(StartTraining(1, 2, 3, torch.ones(NUM_PARAMETERS)))
    assert isinstance(ends.worker.receive(), StartTraining)


def test_who_floods_gloos_port_while_the_pair_is_formed_ends_the_formation_and_nothing_else(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer was admitted and never comes, so that the port stays open; the process has few descriptors.

    The flood is another process's, as it would be: here, it would keep the thread that watches from running.
    """
    limits = ((peer_module, "FORMATION_SECONDS"), (process_group, "FORMATION_SECONDS"), (store, "WAIT_SECONDS"))
    for module, name in limits:
        monkeypatch.setattr(module, name, 240.0)  # the flood comes before, however late
    ends = connect()
    before = listening_ports()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    errors: list[BaseException] = []

    def form() -> None:
        try:
            ends.server.connect()
        except ConnectionError as error:
            errors.append(error)

    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FLOODED_LIMIT, hard), hard))
    try:
        thread = threading.Thread(target=form)
        thread.start()
        wait_until(lambda: bool(listening_ports() - before))
        (port,) = listening_ports() - before
        subprocess.run([sys.executable, "-c", FLOOD, str(port), str(2 * FLOODED_LIMIT)], check=True, timeout=120)
        thread.join(60)
        assert not thread.is_alive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "file descriptors run short" in str(errors[0])
    assert listening_ports() <= before


def test_a_link_that_ends_leaves_no_descriptor_and_no_thread(connect: Connect) -> None:
    """Workers come and go for days, and nobody knows when Python's cycle collector comes."""
    connect().form()
    with without_cycle_collector():
        descriptors, threads = num_descriptors(), num_threads()
        for number in range(12):
            ends = connect().form()
            ends.server.send(StartTraining(1, number, 3, torch.ones(NUM_PARAMETERS)))
            if number % 3 == 0:
                ends.worker_control.end()
            elif number % 3 == 1:
                ends.server.close("it had enough", farewell="dropped")
            else:  # in the middle of a message
                ends.worker_control.send(message="Finish", num_bytes=7)
                with contextlib.suppress(PeerLostError):
                    ends.worker.close("it had enough")
                    ends.server.receive()
            wait_until(lambda ends=ends: ends.server.lost_reason is not None)  # type: ignore[misc]
        wait_until(lambda: num_descriptors() <= descriptors and num_threads() <= threads)


def test_whoever_hangs_up_before_the_pair_is_formed_leaves_nothing_behind(connect: Connect) -> None:
    with without_cycle_collector():
        descriptors, threads = num_descriptors(), num_threads()
        for number in range(100):
            ends = connect()
            if number % 2:
                ends.worker_control.end()
            else:
                threading.Timer(0.01, ends.worker_control.end).start()
            with pytest.raises(ConnectionError):
                ends.server.connect()
        wait_until(lambda: num_descriptors() <= descriptors and num_threads() <= threads)


def test_a_message_that_was_announced_and_never_comes_is_waited_for_so_long_as_its_size_needs(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sender gives signs of life, so the silence that counts as death never comes."""
    monkeypatch.setattr(peer_module, "SLOWEST_BYTES_PER_SECOND", 1000)
    ends = connect().form()
    control = ends.server._control
    receive = control.receive
    monkeypatch.setattr(control, "receive", lambda seconds: receive(60.0))  # or a late sign of life would end it
    ends.server._silence_seconds = 0.5
    ends.worker_control.send(message="Finish", num_bytes=500)
    started = time.monotonic()
    with pytest.raises(PeerLostError, match=r"a message of 500 bytes was announced and did not arrive within 1 s"):
        ends.server.receive()
    assert 0.9 <= time.monotonic() - started < 100
    with pytest.raises(PeerLostError, match="it dropped this worker: a message of 500 bytes"):
        ends.worker.receive()


@pytest.mark.parametrize(
    ("kind", "num_bytes"),
    [
        ("Finish", 2**20 + 1),
        ("PartialSum", 2**20 + 8 * NUM_PARAMETERS + 1),
        ("Finish", 0),
        ("Finish", -5),
        ("Finish", True),
        ("Finish", "100"),
        ("Finish", None),
        (7, 100),
        ([], 100),
    ],
)
def test_a_message_larger_than_any_that_is_expected_is_not_waited_for(
    connect: Connect, kind: object, num_bytes: object
) -> None:
    """Before anything is allocated for it."""
    ends = connect()
    ends.worker_control.send(message=kind, num_bytes=num_bytes)
    with pytest.raises(PeerLostError, match="it announces a message"):
        ends.server.receive()


def test_no_message_with_parameters_is_taken_before_the_model_is_known(connect: Connect) -> None:
    ends = connect()
    ends.server.num_parameters = None
    ends.worker_control.send(message="PartialSum", num_bytes=100)
    with pytest.raises(PeerLostError, match="it announces a message PartialSum of 100 bytes"):
        ends.server.receive()


@pytest.mark.parametrize(
    "slices", [[1, -2], [5], [4, 1], [4, 1, 3], [-4, 1, -4], [1, 2**30], [3, 1, 3, 2, -1], [-1, 0]]
)
def test_slices_that_describe_no_tensors_are_refused(slices: list[int]) -> None:
    """[1, -2] steps back by as much as it steps on, and would be read for ever."""
    with pytest.raises(ValueError, match="describe no tensor"):
        sizes_of(slices)


def test_slices_as_fedlab_writes_them_are_understood() -> None:
    package = to_package(PartialSum(1, 2, [], torch.arange(5)))
    assert sum(sizes_of(package.slices)) == package.content.numel()
    assert sizes_of([6, 2, 2, 3, 1, 0, 4, 1, 4]) == [6, 1, 4]


def test_a_package_that_is_not_the_announced_one_is_refused(connect: Connect) -> None:
    ends = connect().form()
    package = to_package(Finish())
    ends.worker_control.send(message="Finish", num_bytes=package.content.nbytes + 1)
    with pytest.raises(ValueError, match=f"{package.content.nbytes + 1} bytes was announced"):
        _exchange(ends, package)


def test_a_message_of_another_kind_than_announced_is_refused(connect: Connect) -> None:
    ends = connect().form()
    package = to_package(Finish())
    ends.worker_control.send(message="Join", num_bytes=package.content.nbytes)
    with pytest.raises(ValueError, match="a Join message was announced, and a Finish came"):
        _exchange(ends, package)


def send_often(end: Peer, message: Message) -> None:
    for _ in range(100):
        end.send(message)


def _exchange(ends: Ends, package: object) -> None:
    """Let the worker send a package that it has announced, and the server receive it."""
    thread = threading.Thread(target=_send, args=(ends, package), daemon=True)
    thread.start()
    ends.server.receive()


def _send(ends: Ends, package: object) -> None:
    with contextlib.suppress(TransferError):
        ends.worker._tensors.send(package)  # type: ignore[arg-type]


def test_a_peer_that_takes_nothing_does_not_fill_the_memory(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "MAX_UNSENT_BYTES", 100_000)
    ends = connect().form()
    message = StartTraining(1, 1, 1, torch.zeros(NUM_PARAMETERS))
    with pytest.raises(PeerLostError, match="it takes nothing of what it is sent"):
        send_often(ends.server, message)


def test_links_that_are_formed_at_once_share_the_looks_at_the_descriptors(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look takes a millisecond where there are thousands: 500 workers that came at once would all time out."""
    waits: list[float] = []

    def recorded(futures: Any, timeout: float, *how: Any) -> Any:
        if how:
            waits.append(timeout)
        return wait(futures, timeout, *how)

    form = GroupConnection.form

    def form_late(connection: GroupConnection) -> None:
        wait_until(lambda: bool(waits))
        form(connection)

    monkeypatch.setattr(GroupConnection, "form", form_late)
    monkeypatch.setattr(peer_module, "wait", recorded)
    monkeypatch.setattr(peer_module, "_connecting", {cast(Any, number) for number in range(100)})
    connect().form()
    assert waits
    assert min(waits) > 100 * peer_module.WATCH_SECONDS
    assert peer_module._connecting == set(range(100)), "it is formed, and looks no more"


def test_a_shortage_of_memory_is_not_taken_for_a_lost_peer(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker would join anew for ever, and nobody would hear why."""
    ends = connect().form()

    def refuse(connection: GroupConnection, size: int) -> torch.Tensor:
        raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {size} bytes")

    monkeypatch.setattr(GroupConnection, "_receive_buffer", refuse)
    ends.server.send(StartTraining(1, 1, 1, torch.zeros(NUM_PARAMETERS)))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        ends.worker.receive()


def test_control_messages_may_follow_however_large_a_model(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is handed out right after the parameters, which are still on their way then."""
    monkeypatch.setattr(peer_module, "MAX_UNSENT_BYTES", 100)
    ends = connect()  # not formed, so nothing leaves
    ends.server.send(StartTraining(1, 1, 1, torch.zeros(NUM_PARAMETERS)))
    ends.server.send(AssignGroups([[1]]))
    assert ends.server.lost_reason is None


def test_what_the_clients_in_hand_keep_may_follow_at_once(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with many slots is handed as many clients, each with a model of its own."""
    monkeypatch.setattr(peer_module, "MAX_UNSENT_BYTES", 100)
    ends = connect()  # not formed, so nothing leaves
    state = {"model": torch.zeros(NUM_PARAMETERS)}
    ends.server.max_states_bytes, ends.server.num_in_hand = state["model"].nbytes, 5
    for client_id in range(9):  # four messages, and five clients
        ends.server.send(KeptStates({client_id: state}))
    assert ends.server.lost_reason is None
    with pytest.raises(PeerLostError, match="it takes nothing of what it is sent"):
        ends.server.send(KeptStates({9: state}))


def test_as_many_reports_as_there_are_clients_find_room(connect: Connect) -> None:
    """One worker may train a whole cohort, and each update may be refused."""
    ends = connect()
    ends.server.num_clients = 10_000
    reason = "client {}: its update is refused, because its largest entry is nan (the limit is 1024): training diverged"
    reports = [ClientReport(client_id, 100, 1 / 3, 1 / 3, reason.format(client_id)) for client_id in range(10_000)]
    package = to_package(PartialSum(0, 1, reports, torch.zeros(NUM_PARAMETERS, dtype=torch.int64)))
    assert package.content.nbytes > 2**20 + 8 * NUM_PARAMETERS
    ends.server._announce("PartialSum", package.content.nbytes)
    with pytest.raises(ProtocolError, match="it announces a message"):
        ends.server._announce("PartialSum", 2**20 + 1024 * 10_000 + 8 * NUM_PARAMETERS + 1)


def test_a_content_may_be_larger_than_an_int32_can_say(connect: Connect) -> None:
    """A sum over 268 million parameters has 2^31 bytes."""
    pair = connect().server._tensors
    assert isinstance(pair, GroupConnection)
    sent: list[torch.Tensor] = []

    class Recording:
        def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Recording:
            sent.extend(tensors)
            return self

        def wait(self, timeout: timedelta) -> None:
            pass

    package = to_package(Finish())
    package.slices = [2**31, 1, 2**31]
    pair._gloo = cast(Any, Recording())
    pair.send(package)
    _, slices, content = sent
    assert slices.tolist() == [2**31, 1, 2**31]
    assert content is package.content


def test_a_peer_that_says_more_than_anybody_hears_does_not_fill_the_memory(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "MAX_UNRECEIVED", 50)
    ends = connect()
    with contextlib.suppress(ConnectionError):
        for _ in range(200):
            ends.worker_control.send(control="GroupTrained", values={"first": 1})
    wait_until(lambda: ends.server.lost_reason is not None)
    assert str(ends.server.lost_reason) == "worker 1 is gone: it sent 50 messages at once"


def test_keys_are_taken_in_only_while_a_pair_is_formed(connect: Connect) -> None:
    """They would be kept for as long as the peer is there."""
    ends = connect().form()
    ends.worker_control.send(key="another", value="AAAA")
    with pytest.raises(PeerLostError, match="it sets a key for a process group that is formed"):
        ends.server.receive()


@pytest.mark.parametrize(
    ("key", "value", "text"), [("a" * 5000, "AAAA", "more than 16 keys of up to 4096 bytes"), (5, "AAAA", "no text")]
)
def test_keys_that_no_group_needs_are_refused(connect: Connect, key: object, value: object, text: str) -> None:
    ends = connect()
    ends.worker_control.send(key=key, value=value)
    with pytest.raises(PeerLostError, match=text):
        ends.server.receive()


def test_an_address_whose_lengths_do_not_fit_is_refused(connect: Connect) -> None:
    """gloo reads as many bytes as it says, wherever they are."""
    ends = connect().form()
    assert isinstance(ends.server._tensors, GroupConnection)
    address = ends.server._tensors.store.value_of("gloo/0/1")
    size = int.from_bytes(address[:8], sys.byteorder)
    host_at, address_at = 8, 8 + size
    for told in (
        b"",
        address[:-1],
        address + b"\0",
        (size + 1).to_bytes(8, sys.byteorder) + address[host_at:],
        (2**64 - 1).to_bytes(8, sys.byteorder) + address[host_at:],
        address[:address_at] + (2**63).to_bytes(8, sys.byteorder) + address[address_at + 8 :],
    ):
        fresh = store.ControlStore(ends.worker_control)
        with pytest.raises(ProtocolError, match="an address for gloo that is none"):
            fresh.set_by_peer("gloo/0/1", base64.b64encode(told).decode())
        fresh.set_by_peer("gloo/0/1", base64.b64encode(address).decode())


def test_an_error_of_a_transfer_does_not_keep_what_was_to_be_sent(connect: Connect) -> None:
    """A model's bytes, until Python's cycle collector comes."""
    connection = connect().form().server._tensors
    assert isinstance(connection, GroupConnection)

    class Package:
        pass

    def fail(package: Package) -> None:
        raise TransferError("it is gone")

    package = Package()
    is_kept = weakref.ref(package)
    with without_cycle_collector():
        with pytest.raises(TransferError, match="it is gone"):
            connection._in_own_thread(partial(fail, package))
        del package
        wait_until(lambda: is_kept() is None)


def test_too_many_keys_are_refused(connect: Connect) -> None:
    pair = connect().server._tensors
    assert isinstance(pair, GroupConnection)
    store = pair.store
    for number in range(MAX_KEYS):
        store.set_by_peer(str(number), "AAAA")
    with pytest.raises(ProtocolError, match="more than 16 keys"):
        store.set_by_peer("one more", "AAAA")
