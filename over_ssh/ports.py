"""Whether hosts and this machine reach each other's TCP ports."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from over_ssh.parallel import in_parallel
from over_ssh.session import HostError, Session
from perfedavg.machine.processes import SignalWatch

ATTEMPT_SECONDS = 5.0
"""For a connection to be made, before a firewall is taken to swallow it."""


@dataclass(frozen=True)
class Reach:
    """What a host and this machine reach of each other. None where it is reached, otherwise what is wrong.

    server: the server's port, from the host.
    tensors: a port that the system picks, from the side with the higher address to the other, as gloo connects.
    own: the host's address on this way; None where there is none.
    """

    server: str | None
    tensors: str | None
    own: str | None


@contextlib.contextmanager
def answering(ip: str, port: int) -> Iterator[int]:
    """Answer whoever connects to a port, 0 for one that the system picks, with what it says, in reverse.

    Yields the port.  Raises ValueError where the address is not this machine's or the port is in use.
    """
    try:
        listener = socket.create_server((ip, port), backlog=1024)
    except OSError as error:
        reason = (error.strerror or "").partition(" (while")[0]
        raise ValueError(
            f"cannot listen on --ip {ip} --port {port} ({reason}); use an address of this machine and a port "
            "that is free"
        ) from error
    thread = threading.Thread(target=_answer, args=(listener,), daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread that accepts
        listener.close()
        thread.join()


def _answer(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.settimeout(ATTEMPT_SECONDS)
            connection.sendall(connection.recv(1024)[::-1])


def find_port_faults(
    sessions: Sequence[Session], ip: str, port: int, needs_more_ports: bool, signals: SignalWatch
) -> list[HostError | None]:
    """What keeps a worker on each host from this machine's server, with the way out; None where nothing does.

    ip: of this machine; empty for all of its addresses, where there are no sessions.
    needs_more_ports: whether those that gloo picks have to be open too.
    Raises ValueError as `answering` does, StoppedError.
    """
    with answering(ip, port), answering(ip, 0) as tensor_port:

        def find_fault(session: Session) -> HostError | None:
            try:
                reach = try_ports(session, ip, port, tensor_port if needs_more_ports else None)
            except HostError as error:
                return error
            return explain(session, reach, ip, port)

        return in_parallel(find_fault, {session.host.name: session for session in sessions}, signals, sessions)


def try_ports(session: Session, ip: str, port: int, tensor_port: int | None) -> Reach:
    """Try what a worker there will need.

    ip, port, tensor_port: of this machine, where `answering` answers. No tensor_port: none but the server's is needed.
    Raises HostError.
    """
    answer = _connect_there(session, ip, port)
    own = answer["own"]
    if own is None:
        return Reach(answer["reason"], None, None)
    if tensor_port is None:
        return Reach(None, None, own)
    if _is_higher(own, ip):
        tensors = _connect_there(session, ip, tensor_port)
        return Reach(None, None if tensors["own"] else tensors["reason"], own)
    return Reach(None, _connect_here(session, own), own)


def _is_higher(first: str, second: str) -> bool:
    """Of two IPv4 addresses or names."""
    numbers = [int(ipaddress.IPv4Address(socket.gethostbyname(address))) for address in (first, second)]
    return numbers[0] > numbers[1]


def _connect_there(session: Session, ip: str, port: int) -> dict[str, str | None]:
    nonce = secrets.token_hex(16)
    return session.ask("connect", address=[ip, port], nonce=nonce, seconds=ATTEMPT_SECONDS)


def _connect_here(session: Session, own: str) -> str | None:
    """From this machine to a port of the host."""
    nonce, reason = secrets.token_hex(16), "something else answers there"
    answer = session.ask("listen", address=own, nonce=nonce, seconds=ATTEMPT_SECONDS)
    try:
        with socket.create_connection((own, answer["port"]), timeout=ATTEMPT_SECONDS) as connection:
            connection.sendall(nonce.encode())
    except OSError as error:
        reason = error.strerror or "no answer"
    return None if session.receive()["is_reached"] else reason


def explain(session: Session, reach: Reach, ip: str, port: int) -> HostError | None:
    """What is wrong, with the way out; None where nothing is."""
    host = session.host
    if reach.server is not None:
        return HostError(
            host,
            f"does not reach {ip}:{port} of this machine ({reach.server})",
            f"open the port in this machine's firewall (nft add rule inet filter input tcp dport {port} accept), or "
            "give another address of it with --ip",
        )
    if reach.tensors is not None:
        assert reach.own is not None
        first, second = (host.name, "this machine") if _is_higher(reach.own, ip) else ("this machine", host.name)
        return HostError(
            host,
            f"{first} does not reach the ports that {second} picks for tensors ({reach.tensors})",
            "open those of /proc/sys/net/ipv4/ip_local_port_range there (docs/several-machines.md, Firewalls), or "
            "leave --backend out",
        )
    return None
