"""Entry point: a worker, rank 1 .. world_size - 1. It gets the experiment's configuration from the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import utils
from perfedavg.console import run_entry_point

if TYPE_CHECKING:
    from torch import nn

    from perfedavg.client_data import FederatedDataset
    from perfedavg.config import ExperimentConfig


def main() -> None:
    args = utils.get_args("worker")
    if args.rank == 0:
        raise ValueError("--rank 0 is the server's; a worker's is in 1 .. world_size - 1")

    from multi_process.network import TypedNetwork
    from multi_process.worker import WorkerManager
    from perfedavg.compute import resolve_device, use_reproducible_kernels

    device = resolve_device(args.device)
    use_reproducible_kernels()

    def set_up(config: ExperimentConfig) -> tuple[nn.Module, FederatedDataset]:
        dataset = utils.get_datasets(config, args.data_root)
        return utils.get_model(config, dataset), dataset

    network = TypedNetwork(
        (args.ip, args.port), args.world_size, args.rank, args.ethernet, args.backend, args.join_timeout_seconds, device
    )
    WorkerManager(network, set_up, device, args.threads).run()


if __name__ == "__main__":
    run_entry_point(main)
