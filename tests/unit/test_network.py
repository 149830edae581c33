"""Joining: the server's door opens for its workers only, stays open, and says what it turns away."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import re
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from helpers import free_port, wait_until
from torch import device

from multi_process.messages import Finish, Join, KeptStates, Message
from multi_process.transport import server_network
from multi_process.transport.control import PROTOCOL_VERSION, ControlConnection
from multi_process.transport.handshake import FinishedError, Hello, JoinRequest, receive_hello
from multi_process.transport.peer import PEER_DESCRIPTORS, PeerLostError, RunEndedError
from multi_process.transport.server_network import BEATS, MAX_BEAT_SECONDS, ConnectedWorker, ServerNetwork
from multi_process.transport.settings import NetworkSettings, gpu_identity, listen_on, resolve
from multi_process.transport.wire import Wire
from multi_process.transport.worker_network import WorkerNetwork
from perfedavg.machine.descriptors import num_spare
from perfedavg.machine.interfaces import own_addresses

CPU = device("cpu")
TOKEN = "a secret of 16 or more"


class Run:
    """A server's network in this process, and what joins it. The address is the loopback interface's.

    said: the lines that either has for the person at the terminal.
    """

    def __init__(self, backend: str = "gloo", keys: Path | None = None) -> None:
        self.backend = backend
        self.keys = keys
        self.address = ("127.0.0.1", free_port())
        self.said: list[str] = []
        self._opened: list[Any] = []

    def server(self, world_size: int = 3, silence: float = 60.0, token_file: Path | None = None) -> ServerNetwork:
        server = ServerNetwork(self._settings(world_size, token_file), silence)
        server.listen()
        self._opened.append(server.close_network_connection)
        return server

    def worker(self, rank: int, world_size: int | None = None, join: float = 20.0, wait: float = 5.0) -> WorkerNetwork:
        return WorkerNetwork(self._settings(world_size), rank, join, wait)

    def _settings(self, world_size: int | None, token_file: Path | None = None) -> NetworkSettings:
        return NetworkSettings(self.address, world_size, None, self.backend, CPU, token_file, self.keys)

    def joined(self, rank: int) -> WorkerNetwork:
        worker = self.worker(rank)
        worker.init_network_connection()
        self._opened.append(worker.close_network_connection)
        return worker

    def silent_worker(self, rank: int) -> ControlConnection:
        """One that is admitted, and gives no sign of life from then on."""
        control = self.stranger()
        receive_hello(control)
        control.send(**asdict(JoinRequest(PROTOCOL_VERSION, "nonce", rank, "", "")))
        assert "ticket" in control.receive(10)
        return control

    def stranger(self) -> ControlConnection:
        control = ControlConnection(Wire(socket.create_connection(self.address)))
        self._opened.append(control.close)
        return control

    def close(self) -> None:
        for close in reversed(self._opened):
            close()
        for thread in threading.enumerate():
            if thread.name.startswith("serve "):
                thread.join(120)
                assert not thread.is_alive(), "a connection that was closed keeps its thread"


@pytest.fixture
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, keys: Path) -> Iterator[Run]:
    """With gloo, or with what a test names: another backend, or `keys`."""
    monkeypatch.delenv("PERFEDAVG_TOKEN", raising=False)
    transport = getattr(request, "param", "gloo")
    opened = Run("auto", keys) if transport == "keys" else Run(transport)
    for module in ("server_network", "worker_network"):
        monkeypatch.setattr(f"multi_process.transport.{module}.say", opened.said.append)
    yield opened
    opened.close()


@contextlib.contextmanager
def beside(body: Callable[[], object]) -> Iterator[None]:
    """Run a function in a thread beside the block, and wait for its end."""
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    yield
    thread.join(120)
    assert not thread.is_alive()


def next_event(server: ServerNetwork) -> tuple[ConnectedWorker, Message | Exception]:
    """What a worker says next. One that is gone is let go, as the pool of workers does."""
    connected, event = server.events.get(timeout=120)
    if isinstance(event, Exception):
        connected.peer.close("it is gone")
    return connected, event


on_every_transport = pytest.mark.parametrize("run", ["gloo", "tcp", "auto", "keys"], indirect=True)


def join_message(worker: WorkerNetwork) -> Join:
    return Join(worker.ticket, "a machine", 1, None, "cpu", 0, {})


@on_every_transport
def test_what_a_worker_says_comes_as_events_and_its_end_is_the_last(run: Run) -> None:
    server = run.server()
    worker = run.joined(2)
    worker.peer.send(join_message(worker))
    connected, event = next_event(server)
    assert event == join_message(worker)
    assert (connected.rank, connected.ticket) == (2, worker.ticket)
    connected.peer.send(Finish())
    assert worker.peer.receive() == Finish()
    worker.close_network_connection()
    connected, event = next_event(server)
    assert isinstance(event, PeerLostError)
    assert worker.send_volume_intotal > 0


def test_what_clients_keep_is_not_overwritten_by_what_comes_next(run: Run) -> None:
    """A worker sends it client by client, faster than the pool may take it; all come through one buffer."""
    server = run.server()
    worker = run.joined(1)
    worker.peer.send(join_message(worker))
    connected, _ = next_event(server)
    connected.peer.num_parameters, connected.peer.num_clients, connected.peer.max_states_bytes = 1, 10, 10_000
    for client_id in range(10):
        worker.peer.send(KeptStates({client_id: {"rounds": torch.tensor([client_id])}}))
    wait_until(lambda: server.events.qsize() == 10)
    for client_id in range(10):
        _, event = next_event(server)
        assert isinstance(event, KeptStates)
        assert event.states[client_id]["rounds"].tolist() == [client_id]


@on_every_transport
def test_every_admission_has_a_generation_and_a_ticket_of_its_own(run: Run) -> None:
    """By which what a worker left behind is told from what it sends when it has joined anew."""
    server = run.server()
    tickets, generations = set(), set()
    for _ in range(3):
        worker = run.joined(1)
        worker.peer.send(join_message(worker))
        connected, _ = next_event(server)
        tickets.add(connected.ticket)
        generations.add(connected.generation)
        worker.close_network_connection()
        assert isinstance(next_event(server)[1], PeerLostError)
    assert (len(tickets), len(generations)) == (3, 3)


def test_more_workers_than_the_run_began_with_may_join(run: Run) -> None:
    run.server(world_size=2)
    for rank in (1, 2, 7):
        run.joined(rank)


def test_a_worker_that_comes_before_its_server_waits_for_it(run: Run) -> None:
    with beside(lambda: run.joined(1)):
        wait_until(lambda: bool(run.said))
        run.server()
    start = f"worker 1: no server at 127.0.0.1:{run.address[1]} yet (Connection refused); trying for "
    found = re.fullmatch(re.escape(start) + r"(\d+) s more", run.said[0])
    assert found is not None
    assert 0 < int(found[1]) <= 20


def test_a_worker_that_lost_its_server_waits_for_it_for_another_time(run: Run) -> None:
    """--join_timeout_seconds before it has met it, --server_wait_seconds afterwards."""
    with pytest.raises(ConnectionError, match=r"within 0 s .*--join_timeout_seconds"):
        run.worker(1, join=0.0).init_network_connection()
    server = run.server()
    worker = run.worker(1, wait=0.0)
    worker.init_network_connection()
    server.close_network_connection()
    with pytest.raises(ConnectionError, match=r"within 0 s .*--server_wait_seconds"):
        worker.init_network_connection()
    run.server()
    worker.init_network_connection()
    worker.close_network_connection()


def test_no_attempt_to_connect_takes_longer_than_is_left(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that swallows packets answers nothing at all."""
    timeouts = []

    def swallow(address: object, timeout: float) -> None:
        timeouts.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", swallow)
    with pytest.raises(ConnectionError, match="within 1 s"):
        run.worker(1, join=1.0).init_network_connection()
    assert max(timeouts) <= 1.0


def test_a_rank_in_use_is_refused_and_that_of_a_silent_worker_is_not(run: Run) -> None:
    """A machine that was switched off and on again comes back before anybody has missed it."""
    server = run.server()
    run.joined(1)
    with pytest.raises(ValueError, match="refuses worker 1: --rank 1 is taken by another worker"):
        run.joined(1)
    server.close_network_connection()
    server = run.server(silence=1.0)
    run.silent_worker(2)
    run.joined(2)
    ends = []
    while not any("another worker came with its rank" in str(end) or "no sign of life" in str(end) for end in ends):
        ends.append(next_event(server)[1])


@pytest.mark.parametrize(
    ("rank", "world_size", "text"), [(1, 4, "its --world_size is 3, this worker's 4"), (1, 2, "is 3, this worker's 2")]
)
def test_what_differs_from_the_servers_is_named(run: Run, rank: int, world_size: int, text: str) -> None:
    run.server(world_size=3)
    with pytest.raises(ValueError, match=text):
        run.worker(rank, world_size).init_network_connection()


def test_a_made_up_rank_is_refused_by_the_server_too(run: Run) -> None:
    run.server()
    control = run.stranger()
    receive_hello(control)
    control.send(**asdict(JoinRequest(PROTOCOL_VERSION, "nonce", 0, "", "")))
    assert control.receive(10) == {"refused": "--rank 0 is not a worker's; use 1 or more"}


def test_who_is_dismissed_does_not_come_back(run: Run) -> None:
    server = run.server()
    worker = run.joined(1)
    server.dismiss("it was stopped by SIGINT")
    with pytest.raises(RunEndedError, match="the server ended the run: it was stopped by SIGINT"):
        worker.peer.receive()


def test_signs_of_life_come_several_times_within_the_silence_that_counts_as_death(run: Run) -> None:
    """One that is late or lost on the way must not cost a worker."""
    for silence in (0.4, 2.0, 4.0, 600.0):
        server = run.server(silence=silence)
        hello = receive_hello(run.stranger())
        server.close_network_connection()
        assert hello.silence_seconds == silence
        assert hello.beat_seconds * BEATS <= silence
        assert hello.beat_seconds <= MAX_BEAT_SECONDS


def test_a_host_that_is_dropped_again_and_again_does_not_fill_the_log(run: Run) -> None:
    server = run.server()
    for number in range(1, 101):
        run.stranger().close()
        wait_until(lambda number=number: server._num_dropped["127.0.0.1"] >= number)  # type: ignore[misc]
    said = [line for line in run.said if "dropped" in line]
    assert [re.findall(r"number (\d+)", line) for line in said] == [[str(2**power)] for power in range(7)]
    assert all(line.startswith("server: dropped a connection from 127.0.0.1 (number ") for line in said)


def test_no_more_than_so_many_handshakes_are_pending_and_the_first_ones_have_to_go(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes a thread. Whoever kept all the places would keep the workers out."""
    monkeypatch.setattr(server_network, "MAX_PENDING_HANDSHAKES", 2)
    server = run.server()
    early = [run.stranger() for _ in range(2)]
    for stranger in early:
        receive_hello(stranger)
    late = run.stranger()
    receive_hello(late)
    with pytest.raises(ConnectionError):
        early[0].receive(10)
    run.joined(1)
    with pytest.raises(ConnectionError):
        early[1].receive(10)
    assert list(server._handshakes.values()) == ["127.0.0.1"], "the last one is still welcome"
    assert "server: dropped a connection from 127.0.0.1 (number 1): 2 others came during its handshake" in run.said


def test_handshakes_are_limited_while_they_see_to_themselves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of them may be through just when it is to go. The thread that accepts must outlive that."""

    class Vanishing(dict[Any, str]):
        """In which the others' threads are always a step ahead."""

        def items(self) -> Any:
            found = list(super().items())
            self.clear()
            return found

    monkeypatch.setattr(server_network, "MAX_PENDING_HANDSHAKES", 1)
    server = run.server()
    server._handshakes = Vanishing({cast(Any, "a connection"): "its host"})
    server._limit_handshakes()
    assert not any("others came during its handshake" in line for line in run.said)


def test_a_sign_of_life_from_before_a_worker_asked_anew_does_not_keep_it_out(run: Run) -> None:
    """It comes late, and only after it the news that the old connection was closed."""

    class ClosedLate:
        last_heard = time.monotonic() + 0.5
        bytes_sent = bytes_received = 0
        ends = iter([None, PeerLostError("worker 1", "the connection was closed")])

        @property
        def lost_reason(self) -> Exception | None:
            return next(self.ends)

    server = run.server()
    server._connected[1] = ConnectedWorker(cast(Any, ClosedLate()), 1, 1, "its ticket", "")
    server._wait_for_rank(run.stranger(), 1)
    assert not server._connected, "the rank is free"


def test_a_connection_that_cannot_be_accepted_does_not_close_the_door(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that left in the queue, or a moment without free file descriptors."""
    failures = [OSError(24, "Too many open files"), ConnectionAbortedError(103, "Software caused connection abort")]
    accept = socket.socket.accept

    def accept_at_last(listener: socket.socket) -> tuple[socket.socket, Any]:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_at_last)
    run.server()
    run.joined(1)
    text = "server: dropped a connection from an unknown host (number 2): not accepted (Too many open files)"
    assert text in run.said


def test_strangers_hear_nothing_but_the_hello(run: Run, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    run.server(token_file=tmp_path / "token")
    with socket.create_connection(run.address) as wire:
        wire.sendall(b"GET / HTTP/1.1\r\n")
        with wire.makefile("rb") as heard:
            hello = json.loads(heard.readline())
    assert set(hello) == set(Hello.__annotations__)
    assert TOKEN not in str(hello)


def test_the_server_listens_on_its_address_only(run: Run) -> None:
    run.server()
    listening = {
        entry.laddr.ip
        for entry in psutil.Process().net_connections("inet")
        if entry.status == psutil.CONN_LISTEN and entry.laddr.port == run.address[1]
    }
    assert listening == {"127.0.0.1"}


def test_a_port_is_free_again_when_the_network_is_closed(run: Run) -> None:
    """A run that is resumed at once takes the same one."""
    run.server().close_network_connection()
    run.server()


def test_an_address_or_port_that_cannot_be_had(run: Run) -> None:
    run.server()
    with pytest.raises(ValueError, match=rf"--port {run.address[1]} \(Address already in use\)"):
        run.server()
    with pytest.raises(ValueError, match=r"--ip 203\.0\.113\.77 .*use an address of this machine"):
        listen_on(("203.0.113.77", run.address[1]))


def settings(world_size: int | None = 2, ethernet: str | None = None, backend: str = "gloo") -> NetworkSettings:
    return NetworkSettings(("", 1), world_size, ethernet, backend, CPU, None)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: settings(world_size=1), "--world_size 1 leaves no worker"),
        (lambda: settings(ethernet="eth99"), "--ethernet eth99 is no interface .*; use one of .*lo"),
        (lambda: settings(backend="nccl"), "--backend nccl needs a GPU"),
        (lambda: ServerNetwork(settings(), 0.0), "--worker_timeout_seconds 0 must be above"),
        (lambda: WorkerNetwork(settings(world_size=None), 0, 1, 1), r"--rank 0 .*\(0 is the server\)"),
    ],
)
def test_settings_that_cannot_be_are_named_before_anything_is_opened(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("name", "host"),
    [("10.1.2.3", "10.1.2.3"), ("127.0.0.1", "127.0.0.1"), ("127.0.1.1", "127.0.1.1"), ("localhost", "127.0.0.1")],
)
def test_addresses_mean_what_they_say(name: str, host: str) -> None:
    """Who gives a loopback address as such, or `localhost`, wants this machine alone."""
    assert resolve((name, 5)) == (host, 5)


def test_a_name_that_means_the_loopback_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian gives a machine's own name 127.0.1.1: a server there waits for workers that cannot come."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(
        "multi_process.transport.settings.own_addresses", lambda: {"10.1.2.3": "eth0", "192.168.0.7": "eth1"}
    )
    text = r"--ip node7 means 127\.0\.1\.1 on this machine.*this machine has 10\.1\.2\.3, 192\.168\.0\.7\), or 127\."
    with pytest.raises(ValueError, match=text):
        resolve(("node7", 5))


def test_names_and_addresses_that_lead_nowhere_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--ip no\.such\.host\.invalid is neither"):
        resolve(("no.such.host.invalid", 5))
    with pytest.raises(ValueError, match=r"--ip 0\.0\.0\.0 is not an address that workers can reach"):
        resolve(("0.0.0.0", 5))


def test_own_addresses_are_those_that_others_may_reach() -> None:
    assert "127.0.0.1" not in own_addresses()


def test_a_paused_worker_keeps_its_rank_for_as_long_as_the_timeout_asked_for(run: Run) -> None:
    """A second worker of its rank waits, however long it takes, and is refused as soon as the first one is heard."""
    server = run.server(silence=30.0)
    paused = run.silent_worker(1)
    wait_until(lambda: bool(server._connected))
    (connected,) = server._connected.values()
    errors: list[str] = []

    def join() -> None:
        try:
            run.worker(1, join=60.0).init_network_connection()
        except ValueError as error:
            errors.append(str(error))

    with beside(join):
        listen_for(paused, seconds=6.0)  # more than four signs of life take, of which it gives one in a second
        assert connected.peer.lost_reason is None
        assert not errors
        wait_until(lambda: paused.beat() or bool(errors))  # type: ignore[func-returns-value]
    assert "--rank 1 is taken by another worker" in errors[0]


def test_who_joins_when_the_run_is_over_is_told(run: Run) -> None:
    """Or it would try for a server that does not come back."""
    server = run.server()
    server._end("finished", "the run is over")
    with pytest.raises(FinishedError, match="the run is over"):
        run.worker(1).init_network_connection()
    run.close()
    other = run.server()
    other.dismiss("it was stopped by SIGINT")
    with pytest.raises(ValueError, match="refuses worker 1: it was stopped by SIGINT"):
        run.worker(1).init_network_connection()


@on_every_transport
def test_who_has_joined_and_got_no_work_is_told_that_the_run_is_over(run: Run) -> None:
    server = run.server()
    worker = run.joined(1)
    server.close_network_connection()
    with pytest.raises(FinishedError, match="the run is over"):
        worker.peer.receive()


def test_a_worker_is_refused_where_file_descriptors_run_short(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo ends the process that runs out of them, and with it the run of all others."""
    server = run.server()
    run.joined(1)
    spare = [1000, PEER_DESCRIPTORS - 1]  # the worker's own look at it, and the server's
    for module in ("server_network", "worker_network"):
        name = f"multi_process.transport.{module}.num_spare"
        monkeypatch.setattr(name, lambda: spare.pop(0) if len(spare) > 1 else spare[0])
    with pytest.raises(ValueError, match="refuses worker 2: the server has no file descriptors left"):
        run.worker(2).init_network_connection()
    assert (server.num_refused_for_room, len(server.present)) == (1, 1)
    with pytest.raises(ValueError, match="worker 3 has too few file descriptors left"):
        run.worker(3).init_network_connection()


def test_none_is_left_where_not_even_the_open_ones_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes one. The thread that accepts connections would end, and nobody could join any more."""

    def fail(path: str) -> list[str]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "listdir", fail)
    assert num_spare() < 0


def test_an_interface_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is down has none but its hardware's, to which gloo cannot bind."""
    hardware, address = (types.SimpleNamespace(family=family) for family in (psutil.AF_LINK, socket.AF_INET))
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"ib0": [hardware], "lo": [address, hardware]})
    settings(ethernet="lo")
    with pytest.raises(ValueError, match=r"--ethernet ib0 is no interface .* has an address; use one of lo"):
        settings(ethernet="ib0")


def test_hosts_without_number_do_not_fill_the_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine alone has 16 million loopback addresses to come from."""
    monkeypatch.setattr(server_network, "MAX_COUNTED_HOSTS", 3)
    server = run.server()
    for number in range(100):
        server._log_dropped(f"127.0.1.{number}", "it said \x1b[31mnothing")
    said = [line for line in run.said if "dropped" in line]
    assert len(said) == 3 + 7, "97 others: the 1st, 2nd, 4th .. 64th"
    assert said[-1].startswith("server: dropped a connection from further hosts (number 64): it said \\x1b[31m")


@on_every_transport
def test_a_worker_that_loses_its_server_again_and_again_keeps_nothing_of_it(run: Run) -> None:
    """Nor does the server of the workers that it lost."""
    server = run.server()
    worker = run.worker(1)
    gc.collect()
    gc.disable()
    try:
        before = None
        for number in range(40):
            worker.init_network_connection()
            if number % 2:
                worker.peer.close("it had enough")
            else:
                (connected,) = server._connected.values()
                connected.peer.close("other data", farewell="dropped")
            while not isinstance(next_event(server)[1], ConnectionError):  # lost, or lost before they could reach it
                pass
            wait_until(lambda: not server._connected)
            if number == 1:
                before = wait_until_settled()
        wait_until(lambda: resources() <= before)
    finally:
        gc.enable()


def listen_for(control: ControlConnection, seconds: float) -> None:
    """Raises ConnectionError where the other end closes the connection meanwhile, which gives signs of life."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        control._receive_line(30, 1000)


def resources() -> tuple[int, int]:
    """Descriptors, and threads (gloo's included)."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def wait_until_settled() -> tuple[int, int]:
    seen = resources()
    wait_until(lambda: not any("worker 1:" in thread.name for thread in threading.enumerate()))
    wait_until(lambda: not any("the server:" in thread.name for thread in threading.enumerate()))
    return min(seen, resources())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_an_identity() -> None:
    assert gpu_identity(device("cuda", 0))
