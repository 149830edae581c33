"""Entry point: a worker, rank 1 or more. It gets the experiment's configuration from the server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import utils
from launch.commands import to_argv
from launch.paths import ROOT
from launch.settings import LAUNCHER_RANK, ServerOrWorker, Worker
from perfedavg.machine.kernels import UnpinnedKernelsError, restart_pinned
from perfedavg.terminal.console import say
from perfedavg.terminal.entry_point import run_entry_point

if TYPE_CHECKING:
    from torch import nn

    from perfedavg.contracts import FederatedDataset
    from perfedavg.settings import ExperimentConfig


def main() -> None:
    args = utils.get_args("worker")
    if args.rank == 0 and os.environ.get(LAUNCHER_RANK) == "0":
        raise ValueError(
            f"{LAUNCHER_RANK} 0 in the environment is the server's, and this is a worker; start server.py with it, or "
            f"{ServerOrWorker.script} with every rank"
        )

    from multi_process.transport.settings import NetworkSettings
    from multi_process.transport.worker_network import WorkerNetwork
    from multi_process.worker import WorkerManager
    from perfedavg.training.compute import resolve_device, use_reproducible_kernels

    device = resolve_device(args.device)
    use_reproducible_kernels()

    def build_workload(config: ExperimentConfig) -> tuple[nn.Module, FederatedDataset]:
        dataset = utils.get_datasets(config, args.data_root)
        return utils.get_model(config, dataset), dataset

    settings = NetworkSettings(
        (args.ip, args.port), args.world_size, args.ethernet, args.backend, device, args.token_file, args.keys
    )
    network = WorkerNetwork(settings, args.rank, args.join_timeout_seconds, args.server_wait_seconds)
    try:
        WorkerManager(network, build_workload, device, args.threads).run()
    except UnpinnedKernelsError as error:
        say(f"worker {args.rank}: starts again with --portable_kernels {error.portable}")
        restart_pinned(error.portable, ROOT / "client_worker.py", to_argv(args, Worker))


if __name__ == "__main__":
    run_entry_point(main)
