"""What a server and its workers need to find each other, checked before anything is opened."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from perfedavg.machine.interfaces import own_addresses

BACKENDS = ("auto", "gloo", "tcp", "nccl")
"""What may carry tensors: gloo where that works and else tcp, gloo, the server's port, nccl beside gloo."""
POLL_SECONDS = 0.05
REMINDER_SECONDS = 10.0
"""Between two lines about what is waited for."""


@dataclass(frozen=True)
class NetworkSettings:
    """What a server and a worker both need. Raises ValueError where it cannot be.

    address: (host, port) of the server.
    world_size: the server and the workers to start with; None for a worker that takes whatever it is.
    ethernet: interface for tensors, or None for the one by which the other side is reached.
    backend: what carries tensors, of BACKENDS; a worker takes the server's, and one that it names must be the same.
    device: with nccl, whose memory tensors are sent from.
    token_file: see `keys.read_token`.
    keys: folder of the run's keys, see `keys.tls_context`; None for plain text.
    """

    address: tuple[str, int]
    world_size: int | None
    ethernet: str | None
    backend: str
    device: torch.device
    token_file: Path | None
    keys: Path | None = None

    def __post_init__(self) -> None:
        if self.world_size is not None and self.world_size < 2:
            raise ValueError(
                f"--world_size {self.world_size} leaves no worker; it counts the server too, so use 2 or more"
            )
        check_interface(self.ethernet)
        if self.keys is not None and self.backend in ("gloo", "nccl"):
            raise ValueError(
                f"--backend {self.backend} sends tensors in plain text, which --keys is there to prevent; leave one of "
                "the two out"
            )
        if self.ethernet is not None and (self.keys is not None or self.backend == "tcp"):
            raise ValueError(
                f"--ethernet {self.ethernet} has no effect with {'--keys' if self.keys else '--backend tcp'}, which "
                "sends tensors to --ip too; leave it out"
            )
        if self.backend == "nccl" and self.device.type != "cuda":
            raise ValueError(
                f"--backend nccl needs a GPU for each process, this one computes on {self.device} "
                f"(GPUs found: {torch.cuda.device_count()}); use --backend gloo"
            )

    @property
    def chosen_backend(self) -> str:
        """The server's choice. With keys all goes over TLS."""
        return "tcp" if self.keys is not None else self.backend

    @property
    def nccl_device(self) -> torch.device | None:
        return self.device if self.backend == "nccl" else None

    @property
    def gpu(self) -> str:
        """The identity of the GPU from which nccl sends, empty with gloo."""
        return "" if self.nccl_device is None else gpu_identity(self.nccl_device)


def check_interface(ethernet: str | None) -> None:
    """Raises ValueError where this machine has no such network interface, or none with an address."""
    usable = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if {address.family for address in addresses} & {socket.AF_INET, socket.AF_INET6}
    ]
    if ethernet is not None and ethernet not in usable:
        raise ValueError(
            f"--ethernet {ethernet} is no interface of this machine that has an address; use one of {', '.join(usable)}"
        )


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


def gpu_identity(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
