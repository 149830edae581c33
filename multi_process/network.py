"""FedLab's network with the ways out that a run needs: a clear line where joining fails, typed messages, exact sizes.

Joining goes over a TCPStore that the server opens on its own address, before any process group exists: there a
worker learns the protocol and the world size, claims its rank, and waits for the others. Only when every process
is there is the group formed, so nobody hangs in it.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from fedlab.core.communicator import (
    HEADER_DATA_TYPE_IDX,
    HEADER_RECEIVER_RANK_IDX,
    HEADER_SIZE,
    Package,
    PackageProcessor,
    dtype_flab2torch,
    dtype_torch2flab,
)
from fedlab.core.network import DistNetwork
from fedlab.utils import MessageCode
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from multi_process.messages import PROTOCOL_VERSION, Message, from_package, to_package
from perfedavg.console import LOGGER, say

POLL_SECONDS = 0.05
REMINDER_SECONDS = 10.0
STORE_TIMEOUT = timedelta(seconds=5)
"""For one answer of the store; it answers in milliseconds where it is alive."""
FORMATION_TIMEOUT = timedelta(seconds=30)
"""For each step of forming the group, once all workers have joined."""
NO_TIMEOUT = timedelta(days=365)
"""A receive waits as long as its peer lives: when the peer's process ends, the receive fails at once."""

_HELLO, _GO = "perfedavg/hello", "perfedavg/go"


class ExactPackageProcessor(PackageProcessor):
    """FedLab's exchange of a package in three parts (header, slices, content), without its two limits.

    The receive buffer has the content's size (FedLab's adds the shapes, and so allocates twice as much), and a
    transfer waits as long as its peer lives. The content travels on `content_device`: the CPU with gloo, this
    process's GPU with nccl; header and slices always on the CPU.
    """

    def __init__(self, content_device: torch.device) -> None:
        self._content_device = content_device
        self._buffers: dict[int, Tensor] = {}

    def send(self, package: Package, rank: int) -> None:
        package.header[HEADER_RECEIVER_RANK_IDX] = rank
        package.header[HEADER_DATA_TYPE_IDX] = dtype_torch2flab(package.dtype)
        slices = torch.tensor(package.slices, dtype=torch.int32)
        for part in (package.header, slices, package.content.to(self._content_device)):
            _wait(dist.isend(part, dst=rank))

    def receive(self, rank: int) -> tuple[MessageCode, list[Tensor]]:
        """Message code and content of the next package from a rank. The content is valid until the next one."""
        header = _receive_into(torch.empty(HEADER_SIZE, dtype=torch.int32), rank)
        _, _, num_slices, code, data_type = Package.parse_header(header)
        slices = _receive_into(torch.empty(num_slices, dtype=torch.int32), rank).tolist()
        content = _receive_into(self._buffer(rank, sum(_sizes(slices)), dtype_flab2torch(data_type)), rank)
        return code, Package.parse_content(slices, content.cpu())

    def _buffer(self, rank: int, size: int, dtype: torch.dtype) -> Tensor:
        """Room for a content; the same memory for every package of a rank, because rounds are alike."""
        buffer = self._buffers.get(rank)
        if buffer is None or buffer.dtype != dtype or buffer.numel() < size:
            buffer = self._buffers[rank] = torch.empty(size, dtype=dtype, device=self._content_device)
        return buffer[:size]


class TypedNetwork(DistNetwork):
    """A FedLab network that exchanges `messages` and forms its group over a store of its own.

    address: (host, port) of the server.  world_size: the server and its workers.  rank: 0 is the server.
    ethernet: interface for tensors, or None for the one that leads to the server.  backend: `gloo` or `nccl`.
    join_timeout_seconds: the server's, for all workers to join; a worker's, for the server to be reached.
    device: on which the process computes; with nccl the tensors travel from and to it.

    Raises ValueError where these cannot be.
    """

    def __init__(
        self,
        address: tuple[str, int],
        world_size: int,
        rank: int,
        ethernet: str | None,
        backend: str,
        join_timeout_seconds: float,
        device: torch.device,
    ) -> None:
        super().__init__(address, world_size, rank, ethernet, backend)
        if world_size < 2:
            raise ValueError(f"--world_size {world_size} leaves no worker; it counts the server too, so use 2 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"--rank {rank} is not in 1 .. {world_size - 1}, as --world_size {world_size} asks for")
        if ethernet is not None and ethernet not in psutil.net_if_addrs():
            raise ValueError(f"--ethernet {ethernet} is not here; use one of {', '.join(psutil.net_if_addrs())}")
        if backend == "nccl" and device.type != "cuda":
            raise ValueError(
                f"--backend nccl needs a GPU for each process, this one computes on {device} "
                f"(GPUs found: {torch.cuda.device_count()}); use --backend gloo"
            )
        self._join_timeout_seconds = join_timeout_seconds
        self._device = device
        self._processor = ExactPackageProcessor(device if backend == "nccl" else torch.device("cpu"))
        self._count_lock = threading.Lock()  # the server talks to each worker in a thread of its own
        self._store: TCPStore | None = None

    def listen(self) -> None:
        """Server: open the store on the server's address only, so that workers can begin to join.

        Raises ValueError where the address is not this machine's or the port is in use.
        """
        listener = _listen(self.address)
        host = listener.getsockname()[0]
        self._store = TCPStore(
            host,
            self.address[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            timeout=STORE_TIMEOUT,
        )
        self._store.set(_HELLO, json.dumps(self._terms()))

    def init_network_connection(self) -> None:
        """Join, and form the process group. Raises ValueError or ConnectionError where that cannot be."""
        store = self._wait_for_workers() if self.rank == 0 else self._join_server()
        os.environ["GLOO_SOCKET_IFNAME"] = self.ethernet or interface_towards(self.address)
        backend = self.dist_backend
        if backend == "nccl":
            backend = "cpu:gloo,cuda:nccl"  # FedLab's headers are tensors of the CPU
            torch.cuda.set_device(self._device)
        with _connection_errors("the process group could not be formed; check --ethernet and the firewall"):
            dist.init_process_group(
                backend,
                store=PrefixStore("perfedavg/group", store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=FORMATION_TIMEOUT,
            )

    def close_network_connection(self) -> None:
        LOGGER.info("sent %d bytes, received %d bytes", self.send_volume_intotal, self.recv_volume_intotal)
        if dist.is_initialized():
            dist.destroy_process_group()

    def send_message(self, message: Message, rank: int) -> None:
        """Raises ConnectionError where the peer is gone."""
        package = to_package(message)
        with _connection_errors(f"{_peer(rank)} is gone"):
            self._processor.send(package, rank)
        with self._count_lock:
            self.send_volume_intotal += package.content.nbytes

    def receive_message(self, rank: int) -> Message:
        """The next message from a rank. Raises ConnectionError where the peer is gone, ValueError for a bad message."""
        with _connection_errors(f"{_peer(rank)} is gone"):
            code, content = self._processor.receive(rank)
        with self._count_lock:
            self.recv_volume_intotal += sum(part.nbytes for part in content)
        return from_package(code, content)

    def _terms(self) -> dict[str, int | str]:
        """What server and workers must agree on before they can talk, under names that a user knows."""
        return {
            "protocol version": PROTOCOL_VERSION,
            "--world_size": self.world_size,
            "--backend": self.dist_backend,
        }

    def _wait_for_workers(self) -> TCPStore:
        """Wait until every rank is claimed, then until each worker has confirmed that it still waits."""
        assert self._store is not None, "the server listens before it waits"
        store, workers = self._store, range(1, self.world_size)
        say(f"server: listening on {self.address[0]}:{self.address[1]} for {len(workers)} worker(s)")
        missing = _wait_for_keys(store, workers, _rank_key, self._join_timeout_seconds, say_missing=True)
        if missing:
            raise ValueError(
                f"{_ranks(missing)} did not join within {self._join_timeout_seconds} s (--join_timeout_seconds); start "
                f"each with: python client_worker.py --ip {self.address[0]} --port {self.address[1]} "
                f"--world_size {self.world_size} --rank R"
            )
        store.set(_GO, "1")
        gone = _wait_for_keys(store, workers, _confirm_key, FORMATION_TIMEOUT.total_seconds())
        if gone:
            raise ConnectionError(f"{_ranks(gone)} joined, but ended before the group was formed; start the run again")
        return store

    def _join_server(self) -> TCPStore:
        where = f"{self.address[0]}:{self.address[1]}"
        _wait_until_reachable(self.address, self._join_timeout_seconds)
        store = _open_store(self.address)
        with _connection_errors(f"the server at {where} is gone"):
            hello = json.loads(store.get(_HELLO))
        for name, own in self._terms().items():
            if hello.get(name) != own:
                raise ValueError(
                    f"this worker's {name} {own} differs from the server's {hello.get(name)}; make them equal"
                )
        claim = secrets.token_hex(8)
        with _connection_errors(f"the server at {where} is gone"):
            if store.compare_set(_rank_key(self.rank), "", claim).decode() != claim:
                raise ValueError(f"--rank {self.rank} is taken by another worker; give each worker a rank of its own")
            while not store.check([_GO]):
                time.sleep(POLL_SECONDS)
            store.set(_confirm_key(self.rank), "1")
        return store


def interface_towards(address: tuple[str, int]) -> str:
    """The network interface that leads to an address, from the route that the kernel would take. Sends nothing.

    gloo's own choice, the interface of this machine's host name, is often one that other machines cannot reach.
    Raises ValueError where there is no route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_resolve(address))
        except OSError as error:
            raise ValueError(f"there is no route to --ip {address[0]} ({error.strerror})") from error
        own: str = probe.getsockname()[0]
    name: str
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return name
    raise ValueError(f"no network interface has the address {own}, from which --ip {address[0]} is reached")


def _listen(address: tuple[str, int]) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(_resolve(address))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on --ip {address[0]} --port {address[1]} ({error.strerror}); "
            "use an address of this machine and a port that is free"
        ) from error
    return listener


def _resolve(address: tuple[str, int]) -> tuple[str, int]:
    try:
        host = socket.gethostbyname(address[0])
    except OSError as error:
        raise ValueError(f"--ip {address[0]} is neither an IPv4 address nor a known host name") from error
    if host == "0.0.0.0":
        raise ValueError(f"--ip {address[0]} is not an address that workers can reach; name the server's own")
    return host, address[1]


def _wait_until_reachable(address: tuple[str, int], timeout_seconds: float) -> None:
    """Wait until something accepts connections there. Raises ConnectionError after the timeout."""
    resolved, where = _resolve(address), f"{address[0]}:{address[1]}"
    deadline = time.monotonic() + timeout_seconds
    said = False
    while True:
        remaining = deadline - time.monotonic()
        try:
            with socket.create_connection(resolved, timeout=max(remaining, POLL_SECONDS)):
                return
        except OSError as error:
            reason = error.strerror or "no answer"
        if time.monotonic() >= deadline:
            raise ConnectionError(
                f"no server at {where} within {timeout_seconds} s ({reason}); start server.py there first, "
                "or check --ip, --port and the firewall"
            )
        if not said:
            say(f"worker: no server at {where} yet ({reason}); trying for {timeout_seconds} s")
            said = True
        time.sleep(POLL_SECONDS)


def _open_store(address: tuple[str, int]) -> TCPStore:
    """Connect to a server's store. Raises ConnectionError where what answers there is not one.

    The store's own timeout does not cover its handshake, in which a stranger that says nothing would hold it for
    ever; so that takes place in a thread, which is then left behind.
    """
    opened: queue.SimpleQueue[TCPStore | None] = queue.SimpleQueue()

    def open_it() -> None:
        try:
            store = TCPStore(address[0], address[1], is_master=False, timeout=STORE_TIMEOUT)
            store.wait([_HELLO])  # a server that has just begun to listen sets it in the next moment
        except RuntimeError:
            opened.put(None)
        else:
            opened.put(store)

    threading.Thread(target=open_it, name="store", daemon=True).start()
    try:
        store = opened.get(timeout=2 * STORE_TIMEOUT.total_seconds())
    except queue.Empty:
        store = None
    if store is None:
        raise ConnectionError(
            f"what answers at {address[0]}:{address[1]} is not a server of this project; check --ip and --port"
        )
    return store


def _wait_for_keys(
    store: TCPStore,
    ranks: range,
    key: Callable[[int], str],
    timeout_seconds: float,
    say_missing: bool = False,
) -> list[int]:
    """Wait until the store has every rank's key, and return the ranks whose key is missing after the timeout."""
    started = last_said = time.monotonic()
    while missing := [rank for rank in ranks if not store.check([key(rank)])]:
        now = time.monotonic()
        if now - started >= timeout_seconds:
            break
        if say_missing and now - last_said >= REMINDER_SECONDS:
            say(f"server: waiting for {_ranks(missing)}, {timeout_seconds - (now - started):.0f} s left")
            last_said = now
        time.sleep(POLL_SECONDS)
    return missing


def _receive_into(buffer: Tensor, rank: int) -> Tensor:
    _wait(dist.irecv(buffer, src=rank))
    return buffer


def _wait(work: dist.Work | None) -> None:
    assert work is not None, "this process is a member of the group"
    work.wait(NO_TIMEOUT)


def _sizes(slices: list[int]) -> Iterator[int]:
    """The number of elements of each tensor, from FedLab's layout: size, number of dimensions, the dimensions."""
    position = 0
    while position < len(slices):
        size, num_dimensions = slices[position : position + 2]
        position += 2 + num_dimensions
        yield size


@contextmanager
def _connection_errors(message: str) -> Iterator[None]:
    """torch.distributed reports every failure as a RuntimeError of many lines; here it becomes one line."""
    try:
        yield
    except RuntimeError as error:  # DistError, DistStoreError and gloo's errors among them
        raise ConnectionError(message) from error


def _peer(rank: int) -> str:
    return "the server" if rank == 0 else f"worker {rank}"


def _ranks(ranks: list[int]) -> str:
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _rank_key(rank: int) -> str:
    return f"perfedavg/rank/{rank}"


def _confirm_key(rank: int) -> str:
    return f"perfedavg/confirm/{rank}"
