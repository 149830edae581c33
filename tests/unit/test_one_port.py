"""Everything over the server's one port, with keys and without: who gets in, and who does not."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import wait_until
from test_network import CPU, Run, beside, join_message, next_event, resources

from multi_process.messages import StartTraining
from multi_process.transport import server_network, worker_network
from multi_process.transport.control import PROTOCOL_VERSION, ControlConnection, ProtocolError
from multi_process.transport.handshake import JoinRequest, RefusedError, receive_hello, request_to_attach
from multi_process.transport.keys import OF_WORKERS, make_keys, tls_context
from multi_process.transport.process_group import GroupConnection
from multi_process.transport.settings import NetworkSettings
from multi_process.transport.wire import UnknownKeyError, Wire

SOON = 60.0
"""Seconds, for what takes next to none."""


@pytest.fixture
def one_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    yield from opened_run(monkeypatch, Run("tcp"))


@pytest.fixture
def with_keys(monkeypatch: pytest.MonkeyPatch, keys: Path) -> Iterator[Run]:
    yield from opened_run(monkeypatch, Run("auto", keys))


@pytest.fixture
def either(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    yield from opened_run(monkeypatch, Run("auto"))


def opened_run(monkeypatch: pytest.MonkeyPatch, run: Run) -> Iterator[Run]:
    monkeypatch.delenv("PERFEDAVG_TOKEN", raising=False)
    for module in ("server_network", "worker_network", "stream"):
        monkeypatch.setattr(f"multi_process.transport.{module}.say", run.said.append)
    yield run
    run.close()


def exchange(run: Run) -> None:
    """A worker joins, and tensors go both ways."""
    server = run.server()
    worker = run.joined(1)
    worker.peer.send(join_message(worker))
    connected, event = next_event(server)
    assert event == join_message(worker)
    parameters = torch.randn(1_000_000)
    worker.peer.num_parameters = len(parameters)
    connected.peer.send(StartTraining(1, 2, 3, parameters))
    start = worker.peer.receive()
    assert isinstance(start, StartTraining)
    assert torch.equal(start.parameters, parameters)


def test_tensors_go_over_the_port_alone(one_port: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GroupConnection, "_meet")  # nothing tries gloo
    exchange(one_port)


@pytest.mark.parametrize("has_address", [True, False])
@pytest.mark.parametrize("side", [0, 1])
def test_where_gloo_does_not_reach_the_other_side_the_port_serves(
    either: Run, monkeypatch: pytest.MonkeyPatch, side: int, has_address: bool
) -> None:
    """Both sides must come to the same choice, also where only one of them has failed, or has no address to tell, for
    which the other side's gloo waits."""
    form_gloo = GroupConnection._form_gloo

    def fail_on_one_side(group: GroupConnection, timeout_seconds: float) -> object:
        formed = form_gloo(group, timeout_seconds) if has_address or group._side != side else None
        if group._side == side:
            raise RuntimeError("[/pytorch/gloo/device.cc:10] It is down")
        return formed

    monkeypatch.setattr(GroupConnection, "_form_gloo", fail_on_one_side)
    exchange(either)
    assert "server: worker 1's tensors go over --port, because gloo does not connect (It is down)" in either.said


def test_where_gloo_reaches_the_other_side_it_serves(either: Run) -> None:
    exchange(either)
    assert not [line for line in either.said if "--port" in line]


def test_a_ticket_that_nobody_has_and_one_that_was_used_are_refused(one_port: Run) -> None:
    """Who has overheard a ticket comes too late with it, and disturbs nobody."""
    server = one_port.server()
    worker = one_port.joined(1)
    wait_until(lambda: all(one.peer.is_connected for one in server.present))
    for ticket, error in (("0" * 64, RefusedError), ("\u00e4", RefusedError), (worker.ticket, ConnectionError)):
        with pytest.raises(error):
            attach(one_port.stranger(), ticket)
    worker.peer.send(join_message(worker))
    assert next_event(server)[1] == join_message(worker)


def attach(control: ControlConnection, ticket: str) -> None:
    """Show a ticket, and listen until the server ends the connection: it may let it in for a moment."""
    request_to_attach(control, None, receive_hello(control), ticket)
    control.receive(SOON)


def test_who_has_shown_its_ticket_is_not_pushed_out_by_strangers(
    one_port: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_for_tensors = server_network.handshake.accept_for_tensors

    def beside_a_stranger(control: ControlConnection) -> Wire:
        wire = accept_for_tensors(control)
        receive_hello(one_port.stranger())  # for whom the oldest one has had to go
        return wire

    monkeypatch.setattr(server_network, "MAX_PENDING_HANDSHAKES", 1)
    monkeypatch.setattr(server_network.handshake, "accept_for_tensors", beside_a_stranger)
    exchange(one_port)


def test_who_has_proven_the_keys_is_not_pushed_out_by_strangers(
    with_keys: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_network, "MAX_PENDING_HANDSHAKES", 1)
    with_keys.server()
    tls = tls_context(with_keys.keys, is_server=False)  # type: ignore[arg-type]
    with contextlib.closing(ControlConnection(Wire(socket.create_connection(with_keys.address), tls))) as control:
        control.begin(SOON)
        receive_hello(control)
        with contextlib.ExitStack() as stack:
            first, _ = (stack.enter_context(socket.create_connection(with_keys.address)) for _ in range(2))
            assert not first.recv(1), "the second one has pushed it out"
            control.send(**vars(JoinRequest(PROTOCOL_VERSION, "nonce", 1, "", "")))
            assert "ticket" in control.receive(SOON)


def test_who_does_not_know_the_token_cannot_attach_either(one_port: Run, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a secret of 16 or more")
    one_port.server(token_file=tmp_path / "token")
    control = one_port.stranger()
    with pytest.raises(RefusedError, match="does not know the server's token"):
        request_to_attach(control, b"another secret of 16 or more", receive_hello(control), "0" * 64)


def test_a_worker_whose_second_connection_never_comes_is_let_go(one_port: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multi_process.transport.peer.FORMATION_SECONDS", 0.5)
    server = one_port.server()
    one_port.silent_worker(1)
    _, event = next_event(server)
    assert isinstance(event, ConnectionError)
    assert "no connection for tensors with worker 1 could be formed" in str(event)


def test_keys_that_were_not_made_together_are_refused_by_both_sides(with_keys: Run, tmp_path: Path) -> None:
    """The server's certificate is right for the first worker, which has a key of its own making."""
    make_keys(tmp_path / "other")
    server = with_keys.server()
    own = tmp_path / "own"
    shutil.copytree(tmp_path / "other", own)
    shutil.copy(with_keys.keys / "server.crt", own)  # type: ignore[operator]
    for folder, reason in ((own, "it does not know this side's key"), (tmp_path / "other", "its key is not the one")):
        with_keys.keys = folder
        with pytest.raises(ValueError, match=f"refuses worker 1: {reason}.*; give both the keys"):
            with_keys.worker(1).init_network_connection()
    wait_until(lambda: server._num_dropped["127.0.0.1"] == 2)


def test_a_side_without_keys_is_told_that_the_other_has_some(with_keys: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server = with_keys.server()
    with_keys.keys, keys = None, with_keys.keys
    with monkeypatch.context() as patch:  # where both wait for the other to speak
        for module in (server_network, worker_network):
            patch.setattr(module, "HANDSHAKE_SECONDS", 0.5)
        patch.setattr("multi_process.transport.handshake.HANDSHAKE_SECONDS", 0.5)
        with pytest.raises(ConnectionError, match="or it has --keys, and this worker has none"):
            with_keys.worker(1, join=0.1).init_network_connection()
    server.close_network_connection()
    with_keys.server()
    with_keys.keys = keys
    with pytest.raises(ConnectionError, match="is not TLS of this run"):
        with_keys.worker(1, join=0.1).init_network_connection()


def test_whoever_has_no_key_learns_nothing_and_leaves_nothing_behind(
    with_keys: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage, a scanner that leaves, a request of ours in plain text, half a greeting, silence."""
    monkeypatch.setattr(server_network, "HANDSHAKE_SECONDS", 0.5)
    server = with_keys.server()
    worker = with_keys.joined(1)
    greeting = overheard_greeting(with_keys)
    before = resources()
    spoken = [b"A" * 100_000, b"GET / HTTP/1.1\r\n\r\n", b'{"protocol": 8}\n', greeting[:50], greeting, b"", None]
    for number, content in enumerate(spoken * 20, start=1):
        with contextlib.suppress(OSError), socket.create_connection(with_keys.address) as wire:
            if content is not None:
                wire.sendall(content)
                wire.shutdown(socket.SHUT_WR)
                while received := wire.recv(65536):
                    assert b"personalized" not in received
        wait_until(lambda number=number: server._num_dropped["127.0.0.1"] >= number)  # type: ignore[misc]
    wait_until(lambda: resources() <= before)
    worker.peer.send(join_message(worker))
    assert next_event(server)[1] == join_message(worker)


def overheard_greeting(run: Run) -> bytes:
    """What a worker with the right keys says first, which somebody may say again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = Wire(socket.create_connection(listener.getsockname()), tls_context(run.keys, False))  # type: ignore[arg-type]
        accepted, _ = listener.accept()
        with accepted, contextlib.closing(dialled):
            with pytest.raises(TimeoutError):
                dialled.begin(time.monotonic() + 0.01)
            return accepted.recv(65536)


def test_an_idle_connection_is_dropped_before_it_has_proven_a_key(
    with_keys: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_network, "HANDSHAKE_SECONDS", 0.5)
    with_keys.server()
    with socket.create_connection(with_keys.address, timeout=SOON) as wire:
        assert not wire.recv(100)
    wait_until(lambda: any("no sign of life for 0.5 s" in line for line in with_keys.said))


class Pair:
    """The two ends of an encrypted connection."""

    def __init__(self, keys: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            dialled = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        self.bare = accepted.dup()
        self.server = Wire(accepted, tls_context(keys, is_server=True), is_server=True)
        self.worker = Wire(dialled, tls_context(keys, is_server=False))
        with beside(lambda: self.server.begin(time.monotonic() + SOON)):
            self.worker.begin(time.monotonic() + SOON)

    def close(self) -> None:
        for wire in (self.server, self.worker, self.bare):
            wire.close()


@pytest.fixture
def pair(keys: Path) -> Iterator[Pair]:
    ends = Pair(keys)
    yield ends
    ends.close()


def test_both_directions_at_once_arrive_whole(pair: Pair) -> None:
    """OpenSSL lets only one thread in at a time; a connection whose two threads met in there would be broken."""
    contents = [os.urandom(20_000_000) for _ in range(2)]
    arrived = [bytearray(len(content)) for content in contents]
    deadline = time.monotonic() + SOON
    with contextlib.ExitStack() as stack:
        for end, content, buffer in zip((pair.server, pair.worker), contents, reversed(arrived), strict=True):
            stack.enter_context(beside(lambda end=end, content=content: end.send(memoryview(content), deadline)))  # type: ignore[misc]
            stack.enter_context(beside(lambda end=end, buffer=buffer: end.receive_into(memoryview(buffer), deadline)))  # type: ignore[misc]
    assert [bytes(buffer) for buffer in arrived] == contents


def test_an_end_wakes_whoever_sends_and_receives_and_nothing_goes_on_in_plain_text(pair: Pair) -> None:
    """Python's SSLSocket goes on in plain text once it was shut down."""
    secret = b"a secret" * 4_000_000
    errors: list[BaseException] = []

    def attempt(transfer: object) -> None:
        try:
            transfer()  # type: ignore[operator]
        except ConnectionError as error:
            errors.append(error)

    deadline = time.monotonic() + SOON
    with (
        beside(lambda: attempt(lambda: pair.worker.send(memoryview(secret), deadline))),
        beside(lambda: attempt(lambda: pair.worker.receive(100, deadline))),
    ):
        wait_until(lambda: not select.select([], [pair.worker._descriptor], [], 0)[1])  # the connection holds no more
        pair.worker.end()
    assert len(errors) == 2
    with pytest.raises(ConnectionError):
        pair.worker.send(memoryview(secret), deadline)
    pair.bare.setblocking(False)
    seen = b""
    with contextlib.suppress(BlockingIOError):
        while received := pair.bare.recv(2**20):
            seen += received
    assert seen
    assert b"secret" not in seen


def test_the_keys_are_readable_by_their_owner_alone_and_are_not_overwritten(tmp_path: Path) -> None:
    files = make_keys(tmp_path / "keys")
    assert sorted(file.name for file in files) == ["server.crt", "server.key", "worker.crt", "worker.key"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    contents = [file.read_bytes() for file in files]
    with pytest.raises(ValueError, match=r"server\.key is there already"):
        make_keys(tmp_path / "keys")
    assert [file.read_bytes() for file in files] == contents


def test_a_workers_machine_needs_three_files_and_cannot_pose_as_the_server(keys: Path, tmp_path: Path) -> None:
    for name in OF_WORKERS:
        shutil.copy(keys / name, tmp_path)
    tls_context(tmp_path, is_server=False)
    with pytest.raises(ValueError, match=r"has no server\.key"):
        tls_context(tmp_path, is_server=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shutil.copy(keys / "worker.key", tmp_path / "server.key")
        shutil.copy(keys / "worker.crt", tmp_path / "server.crt")
        impostor = tls_context(tmp_path, is_server=True)
        dialled = Wire(socket.create_connection(listener.getsockname()), tls_context(keys, is_server=False))
        accepted = Wire(listener.accept()[0], impostor, is_server=True)
        thread = threading.Thread(target=lambda: contextlib.suppress(OSError).__enter__() or _try(accepted))
        thread.start()
        with contextlib.closing(dialled), pytest.raises(UnknownKeyError):
            dialled.begin(time.monotonic() + SOON)
        thread.join(SOON)
        accepted.close()


def _try(wire: Wire) -> None:
    with contextlib.suppress(OSError):
        wire.begin(time.monotonic() + SOON)


def test_files_that_are_no_keys_are_refused_in_a_line(keys: Path, tmp_path: Path) -> None:
    shutil.copytree(keys, tmp_path, dirs_exist_ok=True)
    (tmp_path / "worker.crt").write_text("nothing")
    with pytest.raises(ValueError, match=r"--keys .* cannot be used \(.*\); make new ones with make_keys\.py"):
        tls_context(tmp_path, is_server=True)
    make_keys(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "server.key", tmp_path)
    with pytest.raises(ValueError, match="cannot be used"):
        tls_context(tmp_path, is_server=True)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"backend": "gloo"}, "--backend gloo sends tensors in plain text, which --keys is there to prevent"),
        ({"ethernet": "lo"}, "--ethernet lo has no effect with --keys"),
    ],
)
def test_what_keys_cannot_go_with_is_said(keys: Path, changes: dict[str, str], text: str) -> None:
    given = {"ethernet": None, "backend": "auto", **changes}
    with pytest.raises(ValueError, match=text):
        NetworkSettings(("127.0.0.1", 3002), 3, device=CPU, token_file=None, keys=keys, **given)  # type: ignore[arg-type]


def test_what_is_said_too_early_is_no_tensor(one_port: Run) -> None:
    """It would be lost in the buffer of lines."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    control = ControlConnection(Wire(accepted))
    with dialled:
        dialled.sendall(b'{"protocol": 8}\nand more')
        control.receive_handshake(SOON)
        with pytest.raises(ProtocolError, match="before it was asked to"):
            control.release()
    control.close()
