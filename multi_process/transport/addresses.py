"""Addresses and interfaces of this machine, checked before anything is opened."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from perfedavg.machine.interfaces import own_addresses


def check_interface(ethernet: str | None) -> None:
    """Raises ValueError where this machine has no such network interface."""
    if ethernet is not None and ethernet not in psutil.net_if_addrs():
        raise ValueError(f"--ethernet {ethernet} is not here; use one of {', '.join(psutil.net_if_addrs())}")


def listen_on(address: tuple[str, int]) -> socket.socket:
    """Raises ValueError where the address is not this machine's or is in use."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(resolve(address))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on --ip {address[0]} --port {address[1]} ({error.strerror}); "
            "use an address of this machine and a port that is free"
        ) from error
    return listener


def resolve(address: tuple[str, int]) -> tuple[str, int]:
    """The IPv4 address and port. Raises ValueError for what other machines could not reach, or nobody knows.

    Many systems give their own host name an address of the loopback network (127.0.1.1); what listens or connects
    there finds no other machine, so only `localhost` and plain addresses may mean this machine alone.
    """
    name, port = address
    try:
        host = socket.gethostbyname(name)
    except OSError as error:
        raise ValueError(f"--ip {name} is neither an IPv4 address nor a known host name") from error
    if host == "0.0.0.0":
        raise ValueError(f"--ip {name} is not an address that workers can reach; name the server's own")
    if ipaddress.ip_address(host).is_loopback and name not in (host, "localhost"):
        raise ValueError(
            f"--ip {name} means {host} on this machine, which other machines cannot reach; give the server's address "
            f"as a number (this machine has {', '.join(own_addresses()) or 'none'}), or 127.0.0.1 for it alone"
        )
    return host, port
