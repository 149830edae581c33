"""The control connection between a worker and the server: who may join, and who is still alive.

It is a TCP connection to the server's port, beside the one that carries tensors, so that a sign of life gets through
while a client trains and while 13 MB are on their way; so does a `messages.ControlMessage`. It carries JSON objects,
one a line; an empty line is a sign of life. It begins with a handshake:

    server -> worker   Hello: protocol, nonce, the terms of the run, whether a token is asked for
    worker -> server   JoinRequest: protocol, nonce, rank, GPU, proof that it knows the token
    server -> worker   JoinAccepted: generation, ticket, proof that the server knows the token too; or a refusal

A proof is an HMAC-SHA256 (RFC 2104) under the token over both nonces and everything else that was said, so it is good
for this one conversation. What does not speak this protocol is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import select
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from multi_process.boundary import clean_text
from perfedavg.terminal.console import command_line

PROTOCOL_VERSION = 6
"""Raised with every change of a message or of the way workers join."""

HANDSHAKE_SECONDS = 10.0
"""For each line of the hello. Who takes longer is not one of ours."""
SEND_SECONDS = 10.0
"""For a line to leave this machine. Lines are short enough that it takes longer only where the peer is gone."""
LAST_LINE_SECONDS = 1.0
"""For the line with which the other side is told why the connection ends."""
MAX_SILENCE_SECONDS = 24 * 3600.0
MAX_RANK = 2**31 - 1
MAX_HANDSHAKE_BYTES = 64 * 1024
"""In a line of the hello, in which anybody may say anything."""
MAX_LINE_BYTES = 16 * 2**20
"""In a line after it. The longest ones hold the scores of a group of clients, 250 bytes each."""
TOKEN_VARIABLE = "PERFEDAVG_TOKEN"
_SERVICE = "personalized-fedavg"
_MIN_TOKEN_CHARACTERS = 16

Handshake = TypeVar("Handshake", "Hello", "JoinRequest", "JoinAccepted")


class RefusedError(ValueError):
    """The server will not have this worker, and says why."""


class FinishedError(Exception):
    """The run has come to its end, and has no more work for this worker."""


class ProtocolError(ValueError):
    """What is at the other end does not speak this protocol."""


@dataclass(frozen=True)
class Hello:
    """asks_token: whether a worker must prove that it knows the server's token.

    beat_seconds: between two signs of life.  silence_seconds: after which a peer without one counts as dead.
    portable_kernels: see `config.ExperimentConfig`; a worker must know it before it loads torch.
    """

    service: str
    protocol: int
    nonce: str
    asks_token: bool
    world_size: int
    backend: str
    beat_seconds: float
    silence_seconds: float
    portable_kernels: str = "false"


@dataclass(frozen=True)
class JoinRequest:
    """gpu: identity of the GPU from which the worker sends, with nccl; empty otherwise."""

    protocol: int
    nonce: str
    rank: int
    gpu: str
    proof: str


@dataclass(frozen=True)
class JoinAccepted:
    """generation: counts admissions.  ticket: what the worker shows on the tensors' connection, to be known there."""

    generation: int
    ticket: str
    proof: str


class ControlConnection:
    """Lines of JSON over a socket. Sending and receiving may go on in different threads."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._socket.settimeout(SEND_SECONDS)
        self._poll = select.poll()  # not select.select, which takes no descriptor above 1023
        self._poll.register(connected, select.POLLIN)
        self._received = bytearray()
        self._sending = threading.Lock()
        self._last_heard = time.monotonic()

    @property
    def local_host(self) -> str:
        """The address at this end, the one that the route to the peer starts from."""
        return str(self._socket.getsockname()[0])

    @property
    def peer_host(self) -> str:
        return str(self._socket.getpeername()[0])

    @property
    def last_heard(self) -> float:
        """When the last bytes came, on the clock of `time.monotonic`."""
        return self._last_heard

    def send(self, **fields: Any) -> None:
        """Raises ConnectionError where the peer is gone."""
        self._send(json.dumps(fields).encode() + b"\n")

    def beat(self) -> None:
        """A sign of life. Raises ConnectionError where the peer is gone."""
        self._send(b"\n")

    def send_last(self, **fields: Any) -> None:
        """As `send`, where nothing comes after it and nobody may be held up by a peer that does not listen."""
        self._send(json.dumps(fields).encode() + b"\n", LAST_LINE_SECONDS)

    def receive(self, silence_seconds: float) -> dict[str, Any]:
        """The next object. Signs of life are passed over, and start the time anew.

        Raises ConnectionError where the peer ended the connection or was silent for so long, ProtocolError where what
        it says is not a JSON object in a line.
        """
        while not (line := self._receive_line(silence_seconds, MAX_LINE_BYTES).strip()):
            pass
        return _parse_line(line)

    def receive_handshake(self, timeout_seconds: float) -> dict[str, Any]:
        """The next line, an object: as `receive`, for the hello, in which nobody may gain time by signs of life."""
        return _parse_line(self._receive_line(timeout_seconds, MAX_HANDSHAKE_BYTES))

    def end(self) -> None:
        """End the connection, for both sides and for whatever thread receives on it. May be called again."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and give its descriptor back: the last thing to be done. May be called again."""
        self.end()
        self._socket.close()

    def _send(self, line: bytes, timeout_seconds: float = SEND_SECONDS) -> None:
        if not self._sending.acquire(timeout=timeout_seconds):
            raise ConnectionError("the connection does not take what is sent")
        try:
            self._socket.settimeout(timeout_seconds)
            self._socket.sendall(line)
        except OSError as error:
            raise ConnectionError(error.strerror or "the connection does not take what is sent") from error
        finally:
            self._sending.release()

    def _receive_line(self, timeout_seconds: float, max_bytes: int) -> bytes:
        deadline = time.monotonic() + timeout_seconds
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > max_bytes:
                raise ProtocolError(f"it sent more than {max_bytes} bytes without the end of a line")
            try:
                is_ready = self._poll.poll(1000 * max(0.0, deadline - time.monotonic()))
                received = self._socket.recv(MAX_HANDSHAKE_BYTES) if is_ready else None
            except OSError as error:
                raise ConnectionError(error.strerror or "the connection was closed") from error
            if received is None:
                raise ConnectionError(f"no sign of life for {timeout_seconds:g} s")
            if not received:
                raise ConnectionError("the connection was closed")
            self._last_heard = time.monotonic()
            self._received += received
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line


def receive_join_request(
    control: ControlConnection,
    token: bytes | None,
    world_size: int,
    backend: str,
    beat_seconds: float,
    silence_seconds: float,
    portable_kernels: str = "false",
) -> tuple[Hello, JoinRequest]:
    """Server: greet whoever connected, and return what was said once the worker has proven who it is.

    token: from `read_token`; None where every worker is welcome.
    Raises RefusedError, having told the other side, where it is a worker that cannot join, ProtocolError or
    ConnectionError where it is none.
    """
    hello = Hello(
        _SERVICE,
        PROTOCOL_VERSION,
        secrets.token_hex(32),
        token is not None,
        world_size,
        backend,
        beat_seconds,
        silence_seconds,
        portable_kernels,
    )
    control.send(**asdict(hello))
    fields = control.receive_handshake(HANDSHAKE_SECONDS)
    if isinstance(fields.get("protocol"), int) and fields["protocol"] != PROTOCOL_VERSION:
        version = clean_text(fields["protocol"], 20)
        refuse(control, f"its protocol version {version} differs from the server's {PROTOCOL_VERSION}")
    request = _parse(JoinRequest, fields)
    if token is not None and not _is_proof(request.proof, _worker_proof(token, hello, request)):
        refuse(control, "it does not know the server's token; give both the same --token_file or PERFEDAVG_TOKEN")
    return hello, request


def refuse(control: ControlConnection, reason: str) -> None:
    """Tell a worker why it cannot join. Raises RefusedError with the same reason."""
    with contextlib.suppress(ConnectionError):
        control.send(refused=reason)
    raise RefusedError(reason)


def finish(control: ControlConnection, reason: str) -> None:
    """Tell a worker that the run has come to its end. Raises RefusedError with the reason."""
    with contextlib.suppress(ConnectionError):
        control.send(finished=reason)
    raise RefusedError(reason)


def accept(
    control: ControlConnection, token: bytes | None, hello: Hello, request: JoinRequest, generation: int
) -> JoinAccepted:
    """Server: take the worker in. Raises ConnectionError where it has left."""
    ticket = secrets.token_hex(32)
    proof = "" if token is None else _server_proof(token, hello, request, generation, ticket)
    accepted = JoinAccepted(generation, ticket, proof)
    control.send(**asdict(accepted))
    return accepted


def receive_hello(control: ControlConnection) -> Hello:
    """Worker: what the server says first. Raises ProtocolError or ConnectionError where it is no server of ours.

    Raises RefusedError where it is one of another version.
    """
    fields = control.receive_handshake(HANDSHAKE_SECONDS)
    if fields.get("service") != _SERVICE:
        raise ProtocolError("what answers there says something else")
    if fields.get("protocol") != PROTOCOL_VERSION:
        raise RefusedError(
            f"this worker's protocol version {PROTOCOL_VERSION} differs from the server's "
            f"{clean_text(fields.get('protocol'), 20)}; "
            "use the same version of this project on both"
        )
    hello = _parse(Hello, fields)
    if not 0 < hello.beat_seconds <= hello.silence_seconds <= MAX_SILENCE_SECONDS:
        raise ProtocolError("what it says of its signs of life cannot be")
    return hello


def request_to_join(control: ControlConnection, token: bytes | None, hello: Hello, rank: int, gpu: str) -> JoinAccepted:
    """Worker: ask to be taken in. Raises RefusedError where the server will not, or does not know the token either.

    Raises FinishedError where the run is over.
    """
    if hello.asks_token and token is None:
        raise RefusedError("the server asks for a token; give the server's with --token_file or PERFEDAVG_TOKEN")
    request = JoinRequest(PROTOCOL_VERSION, secrets.token_hex(32), rank, gpu, "")
    if hello.asks_token and token is not None:
        request = JoinRequest(
            **{**asdict(request), "proof": _worker_proof(token, hello, request)},
        )
    control.send(**asdict(request))
    fields = control.receive_handshake(hello.silence_seconds + HANDSHAKE_SECONDS)
    if "finished" in fields:
        raise FinishedError(clean_text(fields["finished"]))
    if "refused" in fields:
        raise RefusedError(clean_text(fields["refused"]))
    accepted = _parse(JoinAccepted, fields)
    if token is not None:
        expected = _server_proof(token, hello, request, accepted.generation, accepted.ticket)
        if not _is_proof(accepted.proof, expected):
            raise RefusedError(
                "the server does not know this worker's token; give both the same --token_file or PERFEDAVG_TOKEN"
            )
    return accepted


def read_token(token_file: Path | None) -> bytes | None:
    """The token in a file, else in the environment's PERFEDAVG_TOKEN; None where there is neither.

    Raises ValueError where the file cannot be read or the token is too short to be a secret.
    """
    if token_file is not None:
        source = f"--token_file {token_file}"
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} cannot be read ({getattr(error, 'strerror', 'not text')})") from error
    elif TOKEN_VARIABLE in os.environ:
        source, token = TOKEN_VARIABLE, os.environ[TOKEN_VARIABLE].strip()
    else:
        return None
    if len(token) < _MIN_TOKEN_CHARACTERS:
        raise ValueError(
            f"the token in {source} has {len(token)} characters, fewer than {_MIN_TOKEN_CHARACTERS}; make one with: "
            f"{command_line([sys.executable, '-c', 'import secrets; print(secrets.token_hex(32))'])}"
        )
    return token.encode()


def _worker_proof(token: bytes, hello: Hello, request: JoinRequest) -> str:
    return _proof(token, "worker", asdict(hello), {**asdict(request), "proof": ""})


def _server_proof(token: bytes, hello: Hello, request: JoinRequest, generation: int, ticket: str) -> str:
    return _proof(token, "server", asdict(hello), {**asdict(request), "proof": ""}, [generation, ticket])


def _proof(token: bytes, *said: Any) -> str:
    return hmac.new(token, json.dumps(said, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _is_proof(said: str, expected: str) -> bool:
    return hmac.compare_digest(said.encode(errors="replace"), expected.encode())


def _parse_line(line: bytes) -> dict[str, Any]:
    """The object in a line. Raises ProtocolError where there is none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or thousands of brackets
        raise ProtocolError("what it sent is not a line of JSON") from error
    if not isinstance(fields, dict):
        raise ProtocolError("what it sent is not a JSON object")
    return fields


def _parse(kind: type[Handshake], fields: dict[str, Any]) -> Handshake:
    """The fields as one of the three things that are said. Raises ProtocolError where they are not."""
    try:
        spoken = kind(**fields)
    except TypeError as error:
        raise ProtocolError(f"what it sent is no {kind.__name__} of this protocol") from error
    expected = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}
    for name, type_name in kind.__annotations__.items():
        if type(getattr(spoken, name)) not in expected[type_name]:
            raise ProtocolError(f"what it sent is no {kind.__name__} of this protocol: {name} is not {type_name}")
    return spoken
