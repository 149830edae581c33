"""Which address the hosts are to reach this machine by."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from over_ssh.session import Session
from perfedavg.machine.interfaces import own_addresses

LOOPBACK = "127.0.0.1"


def choose_address(given: str | None, sessions: Sequence[Session]) -> str:
    """The given one, or else that from which all hosts see ssh come.

    Raises ValueError where they see different ones, or none of this machine's.
    """
    if given is not None:
        return given
    seen = {
        session.host.name: session.facts["seen_from"]
        for session in sessions
        if not session.host.is_this_machine and not _is_loopback(session.facts["seen_from"])  # by another name of it
    }
    if not seen:
        return LOOPBACK
    own = own_addresses()
    here = f"this machine has {', '.join(own) or 'none'}"
    for name, address in seen.items():
        if address not in own:
            behind = "ssh goes by another machine, or IPv6" if address else "there is no SSH_CONNECTION there"
            raise ValueError(
                f"{name} sees ssh come from {address or 'nowhere'}, which is no IPv4 address of this machine "
                f"({behind}); give the one that the hosts reach with --ip ({here})"
            )
    if len(set(seen.values())) > 1:
        said = ", ".join(f"{name} as {address}" for name, address in seen.items())
        raise ValueError(f"the hosts see this machine under different addresses ({said}); choose with --ip ({here})")
    (address,) = set(seen.values())
    return str(address)


def _is_loopback(address: str) -> bool:
    return address != "" and ipaddress.ip_address(address.partition("%")[0]).is_loopback
