"""The control connection: who may join, and what becomes of everybody else."""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from multi_process.transport import handshake
from multi_process.transport.control import PROTOCOL_VERSION, ControlConnection, ProtocolError
from multi_process.transport.handshake import (
    Hello,
    JoinAccepted,
    JoinRequest,
    RefusedError,
    accept,
    receive_hello,
    receive_request,
    request_to_join,
)
from multi_process.transport.keys import TOKEN_VARIABLE, read_token
from multi_process.transport.wire import Wire

TOKEN, OTHER = b"a secret of 16 or more", b"another secret of 16 or more"


class Pair:
    """The two ends of a connection over the loopback interface, and the worker's bare socket."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.wire = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        self.server, self.worker = ControlConnection(Wire(accepted)), ControlConnection(Wire(self.wire))

    def close(self) -> None:
        self.server.close()
        self.worker.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = Pair()
    yield ends
    ends.close()


@contextlib.contextmanager
def beside(body: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run a function in a thread beside the block. Yields what will hold its result, or its error."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(body())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield outcome
    thread.join(120)
    assert not thread.is_alive()


def serve(end: ControlConnection, token: bytes | None) -> tuple[JoinRequest, JoinAccepted]:
    hello = Hello(secrets.token_hex(32), token is not None, 3, "gloo", 1.0, 30.0)
    request = receive_request(end, token, hello)
    return request, accept(end, token, hello, request, 7)


def join(end: ControlConnection, token: bytes | None) -> tuple[Hello, JoinAccepted]:
    hello = receive_hello(end)
    return hello, request_to_join(end, token, hello, 2, "a GPU")


@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_worker_is_told_the_terms_and_admitted(pair: Pair, token: bytes | None) -> None:
    with beside(lambda: serve(pair.server, token)) as served:
        hello, accepted = join(pair.worker, token)
    ((request, admitted),) = served
    assert (hello.world_size, hello.backend, hello.silence_seconds) == (3, "gloo", 30.0)
    assert (request.rank, request.gpu) == (2, "a GPU")
    assert accepted == admitted
    assert accepted.generation == 7


@pytest.mark.parametrize("token", [None, OTHER])
def test_who_does_not_know_the_token_is_refused(pair: Pair, token: bytes | None) -> None:
    with beside(lambda: serve(pair.server, TOKEN)) as served:
        with pytest.raises(RefusedError, match="token"):
            join(pair.worker, token)
        pair.worker.close()
    assert isinstance(served[0], RefusedError if token else ConnectionError)


def test_a_server_that_asks_for_no_token_is_refused_by_a_worker_that_has_one(pair: Pair) -> None:
    with beside(lambda: serve(pair.server, None)), pytest.raises(RefusedError, match="the server does not know"):
        join(pair.worker, TOKEN)


def test_a_proof_is_good_for_one_conversation_and_one_side() -> None:
    """It depends on both nonces, the rank and the terms, so none that was overheard is of use elsewhere."""
    hello = Hello("a", True, 3, "gloo", 1.0, 30.0)
    request = JoinRequest(PROTOCOL_VERSION, "b", 1, "", "")
    proofs = {
        handshake._worker_proof(token, said, answered)
        for token in (TOKEN, OTHER)
        for said in (hello, replace(hello, nonce="c"), replace(hello, world_size=4))
        for answered in (request, replace(request, nonce="d"), replace(request, rank=2))
    }
    assert len(proofs) == 18
    from_server = {
        handshake._server_proof(TOKEN, hello, request, generation, ticket)
        for generation in (1, 2)
        for ticket in ("e", "f")
    }
    assert len(from_server) == 4
    assert not proofs & from_server
    assert not any(TOKEN.decode() in proof for proof in proofs | from_server)


def test_every_handshake_has_a_nonce_and_a_ticket_of_its_own() -> None:
    """A nonce that comes again would let a proof be used again."""
    nonces, tickets = set(), set()
    for _ in range(3):
        ends = Pair()
        with beside(lambda ends=ends: serve(ends.server, TOKEN)) as served:  # type: ignore[misc]
            hello, _ = join(ends.worker, TOKEN)
        ((request, accepted),) = served
        ends.close()
        nonces |= {hello.nonce, request.nonce}
        tickets.add(accepted.ticket)
    assert (len(nonces), len(tickets)) == (6, 3)


def line(**changes: Any) -> bytes:
    request = asdict(JoinRequest(PROTOCOL_VERSION, "nonce", 1, "", "proof"))
    return json.dumps({**request, **changes}).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not a line of JSON"),
        (b"\xff\xfe\n", "not a line of JSON"),
        (b"\n", "not a line of JSON"),
        (b"[" * 60_000 + b"\n", "not a line of JSON"),
        (b"1" * 60_000 + b"\n", "not a line of JSON"),
        (b"[1, 2]\n", "not a JSON object"),
        (b"{}\n", "no JoinRequest"),
        (line(extra=1), "no JoinRequest"),
        (line(rank="1"), "rank is"),
        (line(rank=1.5), "rank is"),
        (line(nonce=None), "nonce is null, must be a text"),
        (line(proof=["proof"]), "proof is an array, must be a text"),
        (b"A" * 70_000, "more than 65536 bytes"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_what_does_not_speak_the_protocol_is_dropped(pair: Pair, content: bytes, reason: str) -> None:
    """With this very error, which the network drops it for: any other would end its thread with a traceback."""
    with beside(lambda: serve(pair.server, TOKEN)) as served:
        pair.wire.sendall(content)
    (error,) = served
    assert type(error) is ProtocolError
    assert reason in str(error)


@pytest.mark.parametrize("proof", ["", "0" * 64, "\u00e4", "\ud800"])
def test_a_made_up_proof_is_refused(pair: Pair, proof: str) -> None:
    with beside(lambda: serve(pair.server, TOKEN)) as served:
        pair.wire.sendall(line(proof=proof))
    assert type(served[0]) is RefusedError


def test_another_version_is_named_on_both_sides(pair: Pair) -> None:
    """Whatever else it says: its other messages may have changed too."""
    with beside(lambda: serve(pair.server, TOKEN)) as served:
        pair.wire.sendall(b'{"protocol": 99, "new": true}\n')
    assert isinstance(served[0], RefusedError)
    assert receive_hello(pair.worker).protocol == PROTOCOL_VERSION
    expected = f"its protocol version 99 differs from the server's {PROTOCOL_VERSION}"
    assert pair.worker.receive(5) == {"refused": expected}
    pair.server.send(service="personalized-fedavg", protocol=99, new=True)
    with pytest.raises(RefusedError, match="server's 99; use the same version"):
        receive_hello(pair.worker)


@pytest.mark.parametrize(
    "said", [{"service": "ssh"}, {}, {"service": "personalized-fedavg", "protocol": PROTOCOL_VERSION}]
)
def test_what_is_no_server_of_ours_is_told_from_one(pair: Pair, said: dict[str, Any]) -> None:
    pair.server.send(**said)
    with pytest.raises(ProtocolError):
        receive_hello(pair.worker)


def test_nobody_stays_in_the_handshake_longer_than_is_due(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then gains no time, or a few such connections would keep the workers out for good."""
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 0.5)
    with beside(lambda: serve(pair.server, TOKEN)) as served:
        deadline = time.monotonic() + 120
        while not served and time.monotonic() < deadline:
            with contextlib.suppress(ConnectionError):
                pair.wire.sendall(b"{")
            time.sleep(0.05)
    assert isinstance(served[0], ConnectionError)
    assert "no sign of life for 0.5 s" in str(served[0])


def test_objects_arrive_whole_in_whatever_pieces(pair: Pair) -> None:
    pair.worker.beat()
    pair.worker.send(message="one", number=1)
    for byte in b'{"two": "\xc3\xa4"}\n{"three"':
        pair.wire.sendall(bytes([byte]))
    assert pair.server.receive(5) == {"message": "one", "number": 1}
    assert pair.server.receive(5) == {"two": "\u00e4"}
    pair.wire.sendall(b": 3}\n")
    assert pair.server.receive(5) == {"three": 3}


def test_signs_of_life_keep_a_silent_worker_alive(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each starts the time anew."""
    wire = pair.server._wire
    receive = wire.receive
    waits: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()

    def recorded(most_bytes: int, deadline: float) -> bytes:
        waits.put((time.monotonic(), deadline))
        return receive(most_bytes, deadline)

    monkeypatch.setattr(wire, "receive", recorded)
    asked = time.monotonic()
    with beside(lambda: pair.server.receive(60)) as received:
        for _ in range(5):
            now, deadline = waits.get(timeout=120)
            assert asked + 60 <= deadline <= now + 60
            assert not received
            asked = time.monotonic()
            pair.worker.beat()
        pair.worker.send(at="last")
    assert received == [{"at": "last"}]
    assert pair.server.last_heard > asked


def test_silence_and_an_end_are_told_apart(pair: Pair) -> None:
    with pytest.raises(ConnectionError, match=r"no sign of life for 0\.2 s"):
        pair.server.receive(0.2)
    pair.worker.close()
    with pytest.raises(ConnectionError, match="the connection was closed"):
        pair.server.receive(5)
    pair.server.close()
    pair.server.close()  # may be closed again
    with pytest.raises(ConnectionError):
        pair.server.send(more=1)


def test_closing_wakes_whoever_receives(pair: Pair) -> None:
    with beside(lambda: pair.server.receive(60)) as received:
        pair.server.close()
    assert isinstance(received[0], ConnectionError)


def test_the_address_is_that_of_this_end(pair: Pair) -> None:
    assert pair.server.local_host == pair.worker.local_host == "127.0.0.1"


def test_the_token_comes_from_the_file_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, OTHER.decode())
    assert read_token(None) == OTHER
    file = tmp_path / "token"
    file.write_bytes(b"\n" + TOKEN + b"\r\n")
    assert read_token(file) == TOKEN


def test_a_token_that_is_no_secret_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file or variable is a mistake; to go on without a token would open the door."""
    file = tmp_path / "token"
    file.write_text("  \n")
    with pytest.raises(ValueError, match=r"--token_file .*token has 0 characters, fewer than 16"):
        read_token(file)
    file.write_bytes(b"\xff" * 32)
    with pytest.raises(ValueError, match=r"cannot be read \(not text\)"):
        read_token(file)
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        read_token(tmp_path)
    for value in ("", "short"):
        monkeypatch.setenv(TOKEN_VARIABLE, value)
        with pytest.raises(ValueError, match=f"in PERFEDAVG_TOKEN has {len(value)} characters"):
            read_token(None)
