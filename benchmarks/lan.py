"""Hosts that share a network and nothing else, on this machine: network namespaces, joined by a bridge or by a relay.

Needs root and the commands `ip` and `tc` (iproute2), and `nft` (nftables) for packets that get lost. The addresses are
known in there only. A host's cable can be pulled, made slow, and made to lose packets; the relay makes all cables long.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import select
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOSTS = ("alpha", "beta", "gamma")
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MAX_PACKET_BYTES = 65536
_ETH_P_ALL, _SO_RCVBUFFORCE = 0x0003, 33
_BURST = "32kb"
"""That a slow cable lets through at once."""


class Lan:
    """Hosts on one bridge, which is in a namespace of its own. Everything is gone when the block is left.

    address: of each host.
    """

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
            self._connect(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def _connect(self, undo: contextlib.ExitStack) -> None:
        """Give each host its interface eth0."""
        ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._switch, "link", "set", "bridge", "up")
        for host, namespace in self._namespaces.items():
            peer = ("type", "veth", "peer", "name", "eth0", "netns", namespace)
            ip("-n", self._switch, "link", "add", host, *peer)
            ip("-n", self._switch, "link", "set", host, "master", "bridge", "up")
            self._bring_up(host)

    def _bring_up(self, host: str) -> None:
        namespace = self._namespaces[host]
        ip("-n", namespace, "address", "add", f"{self.address[host]}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", namespace, "link", "set", "eth0", "up")

    def namespace(self, host: str) -> str:
        return self._namespaces[host]

    def unplug(self, host: str) -> None:
        ip("-n", self._switch, "link", "set", host, "down")

    def plug_in(self, host: str) -> None:
        ip("-n", self._switch, "link", "set", host, "up")

    def slow_down(self, megabits_per_second: float) -> None:
        """Let no host send or receive more than so many bits."""
        shape = ("root", "tbf", "rate", f"{megabits_per_second}mbit", "burst", _BURST, "latency", "400ms")
        for host, namespace in self._namespaces.items():
            run("tc", "-n", namespace, "qdisc", "add", "dev", "eth0", *shape)
            run("tc", "-n", self._switch, "qdisc", "add", "dev", host, *shape)

    def lose_packets(self, percent: int) -> None:
        """Drop so many of all packets that come to a host, at random."""
        for host, namespace in self._namespaces.items():
            ip("-n", namespace, "link", "set", "eth0", "gso_max_segs", "1")  # or what is dropped is many at once
            ip("-n", self._switch, "link", "set", host, "gso_max_segs", "1")
            drop = f'iifname "eth0" numgen random mod 100 < {percent} drop'
            rules = f"table inet lossy {{\nchain input {{\ntype filter hook input priority 0;\n{drop}\n}}\n}}\n"
            run("ip", "netns", "exec", namespace, "nft", "-f", "-", text=rules)

    @contextlib.contextmanager
    def only_port(self, port: int, of_others: int = 0) -> Iterator[None]:
        """Within the block, drop everything between the hosts but TCP to and from this port of the first one.

        of_others: a port of the others that stays open too.
        """
        server, *others = self._namespaces.values()
        rules = {server: (f"tcp sport {of_others} accept", f"tcp dport != {port} drop")}
        rules |= dict.fromkeys(others, (f"tcp dport {of_others} accept", f"tcp sport != {port} drop"))
        for namespace, words in rules.items():
            each = "".join(f'iifname "eth0" {rule}\n' for rule in (*words, "meta l4proto udp drop"))
            chain = f"type filter hook input priority 0;\n{each}"
            table = f"table inet firewall {{\nchain input {{\n{chain}\n}}\n}}\n"
            run("ip", "netns", "exec", namespace, "nft", "-f", "-", text=table)
        try:
            yield
        finally:
            for namespace in rules:
                run("ip", "netns", "exec", namespace, "nft", "delete", "table", "inet", "firewall")

    @contextlib.contextmanager
    def behind(self, router: str, host: str) -> Iterator[None]:
        """Within the block, a host has an address that no other knows, and another one speaks in its name (NAT)."""
        inside, outside = self._namespaces[host], self._namespaces[router]
        rule = 'oifname "eth0" ip saddr 10.76.0.0/24 masquerade'
        table = f"table ip translation {{\nchain out {{\ntype nat hook postrouting priority 100;\n{rule}\n}}\n}}\n"
        # Both are on one bridge; told so, the host would go there by itself, and the server could not answer it.
        settings = {"ip_forward": 1, "conf/all/send_redirects": 0, "conf/eth0/send_redirects": 0}
        with contextlib.ExitStack() as undo:
            ip("-n", inside, "address", "del", f"{self.address[host]}/24", "dev", "eth0")
            undo.callback(ip, "-n", inside, "address", "add", f"{self.address[host]}/24", "dev", "eth0")
            ip("-n", inside, "address", "add", "10.76.0.2/24", "dev", "eth0")
            undo.callback(ip, "-n", inside, "address", "del", "10.76.0.2/24", "dev", "eth0")
            ip("-n", outside, "address", "add", "10.76.0.1/24", "dev", "eth0")
            undo.callback(ip, "-n", outside, "address", "del", "10.76.0.1/24", "dev", "eth0")
            ip("-n", inside, "route", "add", "default", "via", "10.76.0.1")  # goes with the address
            for name, value in settings.items():
                self._set(router, name, value)
                undo.callback(self._set, router, name, 1 - value)
            run("ip", "netns", "exec", outside, "nft", "-f", "-", text=table)
            undo.callback(run, "ip", "netns", "exec", outside, "nft", "delete", "table", "ip", "translation")
            yield

    def _set(self, host: str, name: str, value: int) -> None:
        """One of the kernel's settings of IPv4."""
        path = Path("/proc/sys/net/ipv4") / name
        _in_namespace(self._namespaces[host], lambda: path.write_text(str(value)))

    @contextlib.contextmanager
    def overhear(self) -> Iterator[bytearray]:
        """Within the block, take in every packet that passes the bridge. Yields what has come."""
        heard = bytearray()
        listener = _in_namespace(self._switch, _open_packet_socket)
        listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 2**27)
        listener.settimeout(0.1)
        is_over = threading.Event()

        def listen() -> None:
            while not is_over.is_set():
                with contextlib.suppress(TimeoutError):
                    while True:
                        heard.extend(listener.recv(_MAX_PACKET_BYTES + 100))

        thread = threading.Thread(target=listen, name="overhear", daemon=True)
        thread.start()
        try:
            yield heard
        finally:
            is_over.set()
            thread.join()
            listener.close()


class LongLan(Lan):
    """The same hosts, between which every packet is on its way for a while: a relay in this process holds it."""

    def __init__(self, delay_seconds: float) -> None:
        super().__init__()
        self._delay_seconds = delay_seconds
        self._ports: dict[bytes, int] = {}  # descriptors of the hosts' interfaces, by address
        self._end, self._ending = os.pipe()
        self._relay = threading.Thread(target=self._pass_on, name="relay", daemon=True)

    def _connect(self, undo: contextlib.ExitStack) -> None:
        for host, namespace in self._namespaces.items():
            port = _in_namespace(namespace, _open_interface)
            undo.callback(os.close, port)
            self._ports[socket.inet_aton(self.address[host])] = port
            self._bring_up(host)
        self._relay.start()
        undo.callback(self._stop)

    def _stop(self) -> None:
        os.close(self._ending)
        self._relay.join()
        os.close(self._end)

    def _pass_on(self) -> None:
        held: deque[tuple[float, int, bytes]] = deque()
        while True:
            wait_seconds = max(0.0, held[0][0] - time.monotonic()) if held else None
            ready, _, _ = select.select([self._end, *self._ports.values()], [], [], wait_seconds)
            if self._end in ready:
                return
            now = time.monotonic()
            for port in ready:
                packet = os.read(port, _MAX_PACKET_BYTES)
                target = self._ports.get(packet[16:20])  # of IPv4's header; others are for nobody here
                if target is not None and packet[0] >> 4 == 4:
                    held.append((now + self._delay_seconds, target, packet))
            while held and held[0][0] <= now:
                _, target, packet = held.popleft()
                os.write(target, packet)


def ip(*words: str) -> None:
    run("ip", *words)


def run(*words: str, text: str | None = None) -> None:
    """Raises subprocess.CalledProcessError, with what the command said in `stderr`."""
    subprocess.run(words, check=True, capture_output=True, text=True, input=text)


def enter_network_namespace(name: str) -> None:
    """Of the thread that calls it, and of the processes that it starts."""
    library = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as namespace:
        if library.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def _in_namespace(name: str, function: Any) -> Any:
    """What a function returns that is called in a namespace."""
    results: list[Any] = []

    def call() -> None:
        enter_network_namespace(name)
        results.append(function())

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if not results:
        raise OSError(f"nothing could be done in the network namespace {name}")
    return results[0]


def _open_packet_socket() -> socket.socket:
    return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))


def _open_interface() -> int:
    """A new interface eth0: the descriptor from which its packets are read, and to which those for it are written."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", b"eth0", _IFF_TUN | _IFF_NO_PI))
    return descriptor
