"""A FedAvg round in FedLab's own cross-process pattern: SGDSerialClientTrainer behind PassiveClientManager.

python benchmarks/rivals/fedlab_processes.py WORKLOAD.npz ROUNDS WORKERS       (started by benchmarks/round.py)

Starts WORKERS processes, each of which trains its share of the clients, and serves them with FedLab's
SynchronousServerManager and SyncServerHandler. FedLab's handler takes the plain mean; the clients here have equal
weight. Bytes are FedLab's own count of the tensors that its server sends and receives.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

from rival import Clock, Workload, read_workload, report

import compat

compat.import_fedlab("fedlab.contrib.algorithm.basic_server")

from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer  # noqa: E402
from fedlab.contrib.algorithm.basic_server import SyncServerHandler  # noqa: E402
from fedlab.contrib.dataset.basic_dataset import FedDataset  # noqa: E402
from fedlab.core.client.manager import PassiveClientManager  # noqa: E402
from fedlab.core.network import DistNetwork  # noqa: E402
from fedlab.core.server.manager import SynchronousServerManager  # noqa: E402

LOOPBACK = "lo"


class Clients(FedDataset):
    """A worker's share of the clients, which FedLab numbers from 0."""

    def __init__(self, workload: Workload, first: int) -> None:
        super().__init__()
        self._workload = workload
        self._first = first

    def get_dataloader(self, id: int, batch_size: int, type: str = "train") -> Any:
        return self._workload.client_loader(self._first + id)


class TimedHandler(SyncServerHandler):
    """FedLab's handler, with a clock, and FedLab's count of bytes as it was after each round."""

    def __init__(self, workload: Workload, num_rounds: int, network: DistNetwork) -> None:
        super().__init__(workload.new_model(), num_rounds, sample_ratio=1.0)
        self.clock = Clock()
        self.bytes_after: list[int] = []
        self._own_network = network

    def sample_clients(self) -> list[int]:
        self.clock.start_round()
        return list(super().sample_clients())

    def global_update(self, buffer: Any) -> None:
        super().global_update(buffer)
        self.clock.end_round()
        self.bytes_after.append(self._own_network.send_volume_intotal + self._own_network.recv_volume_intotal)


def main() -> None:
    path, num_rounds, num_workers, *rank = sys.argv[1:]
    workload = read_workload(path)
    if rank:
        work(workload, int(num_workers), int(rank[0]), int(rank[1]))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-W", "ignore", *sys.argv]
    workers = [
        subprocess.Popen([*command, str(number), str(port)], stdout=subprocess.DEVNULL)
        for number in range(1, int(num_workers) + 1)
    ]
    network = DistNetwork(("127.0.0.1", str(port)), int(num_workers) + 1, 0, LOOPBACK)
    handler = TimedHandler(workload, int(num_rounds), network)
    SynchronousServerManager(network, handler).run()
    if any(worker.wait() for worker in workers):
        sys.exit("a worker failed")
    first, last = handler.bytes_after[0], handler.bytes_after[-1]
    round_bytes = (last - first) / (int(num_rounds) - 1)
    report(handler.clock, handler.model, workload, round_bytes, "FedLab's own count of tensors, at its server")


def work(workload: Workload, num_workers: int, rank: int, port: int) -> None:
    """Be worker number `rank`, from 1."""
    share = workload.num_clients // num_workers
    trainer = SGDSerialClientTrainer(workload.new_model(), share)
    trainer.setup_dataset(Clients(workload, share * (rank - 1)))
    trainer.setup_optim(workload.local_epochs, workload.batch_size, workload.local_lr)
    network = DistNetwork(("127.0.0.1", str(port)), num_workers + 1, rank, LOOPBACK)
    PassiveClientManager(network, trainer).run()


if __name__ == "__main__":
    main()
