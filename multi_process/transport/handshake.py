"""The handshake with which a connection to the server's port begins: who may join.

    server -> worker   Hello: protocol, nonce, the terms of the run, whether a token is asked for
    worker -> server   JoinRequest: protocol, nonce, rank, GPU, proof that it knows the token
    server -> worker   JoinAccepted: generation, ticket, proof that the server knows the token too; or a refusal

A worker's second connection, for tensors, begins with the same Hello, an AttachRequest that names the ticket, and a
line that takes it in. Where the run has keys, TLS has proven them before any of this.

A proof is an HMAC-SHA256 (RFC 2104) under the token over both nonces and everything else that was said, so it is good
for this one conversation. What does not speak this protocol is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

from multi_process.boundary import clean_text
from multi_process.transport.control import PROTOCOL_VERSION, ControlConnection, ProtocolError
from multi_process.transport.wire import Wire
from perfedavg.plain_values import from_plain

HANDSHAKE_SECONDS = 10.0
"""For each line of it. A peer that takes longer is dropped."""
MAX_SILENCE_SECONDS = 24 * 3600.0
_SERVICE = "personalized-fedavg"

Handshake = TypeVar("Handshake", "Hello", "JoinRequest", "AttachRequest", "JoinAccepted")


class RefusedError(ValueError):
    """The server will not have this worker, and says why."""


class FinishedError(Exception):
    """The run has come to its end, and has no more work for this worker."""


@dataclass(frozen=True)
class Hello:
    """The terms of a run.

    nonce: fresh for each connection.
    asks_token: whether a worker must prove that it knows the server's token.
    beat_seconds: between two signs of life.
    silence_seconds: after which a peer without one is declared dead.
    portable_kernels: see `ExperimentConfig`; a worker must know it before it loads torch.
    """

    nonce: str
    asks_token: bool
    world_size: int
    backend: str
    beat_seconds: float
    silence_seconds: float
    portable_kernels: str = "false"
    service: str = _SERVICE
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class JoinRequest:
    """gpu: identity of the GPU from which the worker sends, with nccl; empty otherwise."""

    protocol: int
    nonce: str
    rank: int
    gpu: str
    proof: str


@dataclass(frozen=True)
class AttachRequest:
    """ticket: of the worker whose tensors the connection is to carry."""

    protocol: int
    nonce: str
    ticket: str
    proof: str


@dataclass(frozen=True)
class JoinAccepted:
    """generation: counts admissions.  ticket: what the worker shows on the tensors' connection, to be known there."""

    generation: int
    ticket: str
    proof: str


def receive_request(control: ControlConnection, token: bytes | None, hello: Hello) -> JoinRequest | AttachRequest:
    """Server: say hello to whoever connected, and return what it asks for once it has proven who it is.

    token: from `keys.read_token`; None where every worker is welcome.
    Raises RefusedError, having told the other side, where it is a worker that cannot join, ProtocolError or
    ConnectionError where it is none.
    """
    control.send(**vars(hello))
    fields = control.receive_handshake(HANDSHAKE_SECONDS)
    if isinstance(fields.get("protocol"), int) and fields["protocol"] != PROTOCOL_VERSION:
        version = clean_text(fields["protocol"], 20)
        refuse(control, f"its protocol version {version} differs from the server's {PROTOCOL_VERSION}")
    request = _parse(AttachRequest, fields) if "ticket" in fields else _parse(JoinRequest, fields)
    if token is not None and not _is_proof(request.proof, _worker_proof(token, hello, request)):
        refuse(control, "it does not know the server's token; give both the same --token_file or PERFEDAVG_TOKEN")
    return request


def refuse(control: ControlConnection, reason: str, is_finished: bool = False) -> NoReturn:
    """Tell a worker why it cannot join, or that the run is finished. Raises RefusedError with the same reason."""
    with contextlib.suppress(ConnectionError):
        control.send(**{"finished" if is_finished else "refused": reason})
    raise RefusedError(reason)


def accept(
    control: ControlConnection, token: bytes | None, hello: Hello, request: JoinRequest, generation: int
) -> JoinAccepted:
    """Server: take the worker in. Raises ConnectionError where it has left."""
    ticket = secrets.token_hex(32)
    proof = "" if token is None else _server_proof(token, hello, request, generation, ticket)
    accepted = JoinAccepted(generation, ticket, proof)
    control.send(**vars(accepted))
    return accepted


def accept_for_tensors(control: ControlConnection) -> Wire:
    """Server: from now on the connection carries tensors. Raises ConnectionError where the worker has left."""
    control.send(attached=True)
    return control.release()


def receive_hello(control: ControlConnection) -> Hello:
    """Worker: what the server says first.

    Raises ProtocolError or ConnectionError where it is no server of this project, RefusedError where it is one of
    another version.
    """
    fields = control.receive_handshake(HANDSHAKE_SECONDS)
    if fields.get("service") != _SERVICE:
        raise ProtocolError("what answers there says something else")
    if fields.get("protocol") != PROTOCOL_VERSION:
        raise RefusedError(
            f"this worker's protocol version {PROTOCOL_VERSION} differs from the server's "
            f"{clean_text(fields.get('protocol'), 20)}; use the same version of this project on both"
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
        request = replace(request, proof=_worker_proof(token, hello, request))
    control.send(**vars(request))
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


def request_to_attach(control: ControlConnection, token: bytes | None, hello: Hello, ticket: str) -> Wire:
    """Worker: let a second connection carry the tensors of the worker with this ticket.

    Raises RefusedError, ProtocolError or ConnectionError where the server will not.
    """
    request = AttachRequest(PROTOCOL_VERSION, secrets.token_hex(32), ticket, "")
    if token is not None:
        request = replace(request, proof=_worker_proof(token, hello, request))
    control.send(**vars(request))
    fields = control.receive_handshake(HANDSHAKE_SECONDS)
    if "refused" in fields:
        raise RefusedError(clean_text(fields["refused"]))
    if fields != {"attached": True}:
        raise ProtocolError("it said what is not of this protocol")
    return control.release()


def _worker_proof(token: bytes, hello: Hello, request: JoinRequest | AttachRequest) -> str:
    return _proof(token, "worker", vars(hello), {**vars(request), "proof": ""})


def _server_proof(token: bytes, hello: Hello, request: JoinRequest, generation: int, ticket: str) -> str:
    return _proof(token, "server", vars(hello), {**vars(request), "proof": ""}, [generation, ticket])


def _proof(token: bytes, *said: Any) -> str:
    return hmac.new(token, json.dumps(said, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _is_proof(said: str, expected: str) -> bool:
    return hmac.compare_digest(said.encode(errors="replace"), expected.encode())


def _parse(kind: type[Handshake], fields: dict[str, Any]) -> Handshake:
    try:
        return from_plain(kind, fields)
    except ValueError as error:
        raise ProtocolError(f"what it sent is no {kind.__name__} of this protocol: {clean_text(error)}") from error
