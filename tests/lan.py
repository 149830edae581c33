"""Hosts that share a network and nothing else: a network namespace is a machine, a port of a bridge its cable.

The addresses exist only in there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator

import pytest

HOSTS = ("alpha", "beta", "gamma")
"""The server's host and the two workers'."""


class Lan:
    """Hosts on one bridge, which is in a namespace of its own. Everything is gone when the block is left."""

    def __init__(self) -> None:
        suffix = secrets.token_hex(3)
        self._switch = f"pfa-{suffix}-switch"
        self._namespaces = {host: f"pfa-{suffix}-{host}" for host in HOSTS}
        self.address = {host: f"10.77.0.{number}" for number, host in enumerate(HOSTS, start=1)}

    def __enter__(self) -> Lan:
        with contextlib.ExitStack() as undo:
            for namespace in (self._switch, *self._namespaces.values()):
                ip("netns", "add", namespace)
                undo.callback(ip, "netns", "del", namespace)
            ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self._switch, "link", "set", "bridge", "up")
            for host, namespace in self._namespaces.items():
                peer = ("type", "veth", "peer", "name", "eth0", "netns", namespace)
                ip("-n", self._switch, "link", "add", host, *peer)
                ip("-n", self._switch, "link", "set", host, "master", "bridge", "up")
                ip("-n", namespace, "address", "add", f"{self.address[host]}/24", "dev", "eth0")
                ip("-n", namespace, "link", "set", "lo", "up")
                ip("-n", namespace, "link", "set", "eth0", "up")
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def namespace(self, host: str) -> str:
        return self._namespaces[host]

    def unplug(self, host: str) -> None:
        ip("-n", self._switch, "link", "set", host, "down")

    def plug_in(self, host: str) -> None:
        ip("-n", self._switch, "link", "set", host, "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def lan_or_skip() -> Iterator[Lan]:
    """The hosts; skips the test, with the reason, where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip (iproute2)")
    with contextlib.ExitStack() as stack:
        try:
            lan = stack.enter_context(Lan())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield lan
