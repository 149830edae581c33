"""The control connection between a worker and the server: who may join, and who is still alive.

It is a TCP connection to the server's port, beside the one that carries tensors, so that a sign of life gets through
while a client trains and while 13 MB are on their way; so does what is said of single clients (`messages.Word`). It
carries JSON objects, one a line; an empty line is a sign of life. Before anything else the two sides greet each other:

    server -> worker   Greeting: protocol, nonce, the terms of the run, whether a token is asked for
    worker -> server   Application: protocol, nonce, rank, GPU, proof that it knows the token
    server -> worker   Admission: generation, ticket, proof that the server knows the token too; or a refusal

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

PROTOCOL_VERSION = 5
"""Raised with every change of a message or of the way workers join."""

GREETING_SECONDS = 10.0
"""For each line of the greeting. Who takes longer is not one of ours."""
SEND_SECONDS = 10.0
"""For a line to leave this machine. Lines are short enough that it takes longer only where the peer is gone."""
LAST_WORD_SECONDS = 1.0
"""For the line with which the other side is told why the connection ends."""
MAX_SILENCE_SECONDS = 24 * 3600.0
MAX_RANK = 2**31 - 1
MAX_GREETING_BYTES = 64 * 1024
"""In a line of the greeting, in which anybody may say anything."""
MAX_LINE_BYTES = 16 * 2**20
"""In a line after it. The longest ones hold the scores of a group of clients, 250 bytes each."""
TOKEN_VARIABLE = "PERFEDAVG_TOKEN"
_SERVICE = "personalized-fedavg"
_MIN_TOKEN_CHARACTERS = 16

Spoken = TypeVar("Spoken", "Greeting", "Application", "Admission")


class RefusedError(ValueError):
    """The server will not have this worker, and says why."""


class FinishedError(Exception):
    """The run has come to its end, and has no more work for this worker."""


class NotOursError(ValueError):
    """What is at the other end does not speak this protocol."""


@dataclass(frozen=True)
class Greeting:
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
class Application:
    """gpu: identity of the GPU from which the worker sends, with nccl; empty otherwise."""

    protocol: int
    nonce: str
    rank: int
    gpu: str
    proof: str


@dataclass(frozen=True)
class Admission:
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

    def say_last(self, **fields: Any) -> None:
        """As `send`, where nothing comes after it and nobody may be held up by a peer that does not listen."""
        self._send(json.dumps(fields).encode() + b"\n", LAST_WORD_SECONDS)

    def receive(self, silence_seconds: float) -> dict[str, Any]:
        """The next object. Signs of life are passed over, and start the time anew.

        Raises ConnectionError where the peer ended the connection or was silent for so long, NotOursError where what
        it says is not a JSON object in a line.
        """
        while not (line := self._receive_line(silence_seconds, MAX_LINE_BYTES).strip()):
            pass
        return _parse_line(line)

    def receive_at_once(self, timeout_seconds: float) -> dict[str, Any]:
        """The next line, an object: as `receive`, for the greeting, in which nobody may gain time by signs of life."""
        return _parse_line(self._receive_line(timeout_seconds, MAX_GREETING_BYTES))

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
                raise NotOursError(f"it sent more than {max_bytes} bytes without the end of a line")
            try:
                is_ready = self._poll.poll(1000 * max(0.0, deadline - time.monotonic()))
                received = self._socket.recv(MAX_GREETING_BYTES) if is_ready else None
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


def greet(
    control: ControlConnection,
    token: bytes | None,
    world_size: int,
    backend: str,
    beat_seconds: float,
    silence_seconds: float,
    portable_kernels: str = "false",
) -> tuple[Greeting, Application]:
    """Server: greet whoever connected, and return what was said once the worker has proven who it is.

    token: from `read_token`; None where every worker is welcome.
    Raises RefusedError, having told the other side, where it is a worker that cannot join, NotOursError or
    ConnectionError where it is none.
    """
    greeting = Greeting(
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
    control.send(**asdict(greeting))
    fields = control.receive_at_once(GREETING_SECONDS)
    if isinstance(fields.get("protocol"), int) and fields["protocol"] != PROTOCOL_VERSION:
        version = clean_text(fields["protocol"], 20)
        refuse(control, f"its protocol version {version} differs from the server's {PROTOCOL_VERSION}")
    application = _parse(Application, fields)
    if token is not None and not _is_proof(application.proof, _worker_proof(token, greeting, application)):
        refuse(control, "it does not know the server's token; give both the same --token_file or PERFEDAVG_TOKEN")
    return greeting, application


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


def admit(
    control: ControlConnection, token: bytes | None, greeting: Greeting, application: Application, generation: int
) -> Admission:
    """Server: take the worker in. Raises ConnectionError where it has left."""
    ticket = secrets.token_hex(32)
    proof = "" if token is None else _server_proof(token, greeting, application, generation, ticket)
    admission = Admission(generation, ticket, proof)
    control.send(**asdict(admission))
    return admission


def receive_greeting(control: ControlConnection) -> Greeting:
    """Worker: what the server says first. Raises NotOursError or ConnectionError where it is no server of ours.

    Raises RefusedError where it is one of another version.
    """
    fields = control.receive_at_once(GREETING_SECONDS)
    if fields.get("service") != _SERVICE:
        raise NotOursError("what answers there says something else")
    if fields.get("protocol") != PROTOCOL_VERSION:
        raise RefusedError(
            f"this worker's protocol version {PROTOCOL_VERSION} differs from the server's "
            f"{clean_text(fields.get('protocol'), 20)}; "
            "use the same version of this project on both"
        )
    greeting = _parse(Greeting, fields)
    if not 0 < greeting.beat_seconds <= greeting.silence_seconds <= MAX_SILENCE_SECONDS:
        raise NotOursError("what it says of its signs of life cannot be")
    return greeting


def apply(control: ControlConnection, token: bytes | None, greeting: Greeting, rank: int, gpu: str) -> Admission:
    """Worker: ask to be taken in. Raises RefusedError where the server will not, or does not know the token either.

    Raises FinishedError where the run is over.
    """
    if greeting.asks_token and token is None:
        raise RefusedError("the server asks for a token; give the server's with --token_file or PERFEDAVG_TOKEN")
    application = Application(PROTOCOL_VERSION, secrets.token_hex(32), rank, gpu, "")
    if greeting.asks_token and token is not None:
        application = Application(
            **{**asdict(application), "proof": _worker_proof(token, greeting, application)},
        )
    control.send(**asdict(application))
    fields = control.receive_at_once(greeting.silence_seconds + GREETING_SECONDS)
    if "finished" in fields:
        raise FinishedError(clean_text(fields["finished"]))
    if "refused" in fields:
        raise RefusedError(clean_text(fields["refused"]))
    admission = _parse(Admission, fields)
    if token is not None:
        expected = _server_proof(token, greeting, application, admission.generation, admission.ticket)
        if not _is_proof(admission.proof, expected):
            raise RefusedError(
                "the server does not know this worker's token; give both the same --token_file or PERFEDAVG_TOKEN"
            )
    return admission


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


def _worker_proof(token: bytes, greeting: Greeting, application: Application) -> str:
    return _proof(token, "worker", asdict(greeting), {**asdict(application), "proof": ""})


def _server_proof(token: bytes, greeting: Greeting, application: Application, generation: int, ticket: str) -> str:
    return _proof(token, "server", asdict(greeting), {**asdict(application), "proof": ""}, [generation, ticket])


def _proof(token: bytes, *said: Any) -> str:
    return hmac.new(token, json.dumps(said, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _is_proof(said: str, expected: str) -> bool:
    return hmac.compare_digest(said.encode(errors="replace"), expected.encode())


def _parse_line(line: bytes) -> dict[str, Any]:
    """The object in a line. Raises NotOursError where there is none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or thousands of brackets
        raise NotOursError("what it sent is not a line of JSON") from error
    if not isinstance(fields, dict):
        raise NotOursError("what it sent is not a JSON object")
    return fields


def _parse(kind: type[Spoken], fields: dict[str, Any]) -> Spoken:
    """The fields as one of the three things that are said. Raises NotOursError where they are not."""
    try:
        spoken = kind(**fields)
    except TypeError as error:
        raise NotOursError(f"what it sent is no {kind.__name__.lower()} of this protocol") from error
    expected = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}
    for name, type_name in kind.__annotations__.items():
        if type(getattr(spoken, name)) not in expected[type_name]:
            raise NotOursError(
                f"what it sent is no {kind.__name__.lower()} of this protocol: {name} is not {type_name}"
            )
    return spoken
