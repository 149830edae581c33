"""Entry point: the FedLab parameter server, rank 0."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial

import utils
from launch.commands import worker_command
from launch.paths import ROOT
from launch.settings import LAUNCHER_ADDRESS, LAUNCHER_PORT, LAUNCHER_RANK, LAUNCHER_SIZE, Server, ServerOrWorker
from perfedavg.machine.kernels import pin_kernels_or_restart
from perfedavg.terminal.entry_point import run_entry_point


def main() -> None:
    args = utils.get_args("server")
    config = args.experiment
    refuse_rank_of_worker(args, os.environ)
    pin_kernels_or_restart(config.portable_kernels, ROOT / "server.py", sys.argv[1:])
    utils.check_num_workers(args, args.world_size - 1)

    from multi_process.server import WorkerPool
    from multi_process.transport.server_network import ServerNetwork
    from multi_process.transport.settings import NetworkSettings
    from perfedavg.metrics import find_metrics
    from perfedavg.recorded_run import run_and_record
    from perfedavg.training.client_batching import choose_group_size
    from perfedavg.training.compute import resolve_device, return_freed_memory, use_reproducible_kernels
    from perfedavg.training.flat_model import flatten
    from reporting.run_plots import draw_run_plots

    find_metrics(config.own_metrics)  # what is wrong with a user's own is said before anybody waits
    use_reproducible_kernels()
    return_freed_memory()
    device = resolve_device("auto" if args.backend == "nccl" else "cpu")
    settings = NetworkSettings(
        (args.ip, args.port), args.world_size, args.ethernet, args.backend, device, args.token_file, args.keys
    )
    network = ServerNetwork(settings, args.worker_timeout_seconds, config.portable_kernels)
    network.listen()
    folder = utils.open_run_folder(args)
    dataset = utils.get_datasets(config, args.data_root)
    model = utils.get_model(config, dataset)
    config = utils.load_initial_model(args, config, model, folder.has_checkpoint)
    run_settings = {"command": sys.argv, "world_size": args.world_size, "backend": args.backend}
    with WorkerPool(
        network,
        dataset,
        partial(choose_group_size, config, model, dataset),
        flatten(model).numel(),
        args.join_timeout_seconds,
        args.worker_wait_seconds,
        command_for_workers(args, os.environ),
    ) as pool:
        run_and_record(pool.config, pool, dataset, model, folder, run_settings)
    draw_run_plots(folder.path)  # now that no worker waits


def command_for_workers(args: Server, environment: Mapping[str, str]) -> str | None:
    """What starts a worker, but for its --rank; None where a launcher starts them, with keys and a token of its own."""
    return None if environment.get(utils.RESTART_VARIABLE) else worker_command(args)


def refuse_rank_of_worker(args: Server, environment: Mapping[str, str]) -> None:
    """Raise ValueError where a launcher's environment says who is in the run, and that this process is a worker."""
    said = {LAUNCHER_ADDRESS: args.ip, LAUNCHER_PORT: args.port, LAUNCHER_SIZE: args.world_size}
    said = {name: str(value) for name, value in said.items() if environment.get(name)}
    rank = environment.get(LAUNCHER_RANK) or "0"
    if said and rank != "0" and all(environment[name] == value for name, value in said.items()):
        raise ValueError(
            f"{LAUNCHER_RANK} {rank} in the environment is a worker's, and this is the server, rank 0; start "
            f"client_worker.py with it, or {ServerOrWorker.script} with every rank"
        )


if __name__ == "__main__":
    run_entry_point(main)
