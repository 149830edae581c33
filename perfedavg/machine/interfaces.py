"""The addresses of this machine. Imports nothing heavy."""

from __future__ import annotations

import ipaddress
import socket


def own_addresses() -> dict[str, str]:
    """By IPv4 address, the network interface that has it; without those that are for this machine alone."""
    import psutil

    found = {}
    for interface, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback:
                found[str(entry.address)] = str(interface)
    return found
