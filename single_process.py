"""Entry point: the whole experiment in one process, without a network."""

from __future__ import annotations

import sys

import utils
from launch.flags import ROOT
from perfedavg.machine.kernels import pin_kernels_or_restart
from perfedavg.terminal.console import say
from perfedavg.terminal.entry_point import run_entry_point


def main() -> None:
    args = utils.get_args("single")
    config = args.experiment
    pin_kernels_or_restart(config.portable_kernels, ROOT / "single_process.py", sys.argv[1:])

    from perfedavg.engine.executor import LocalExecutor
    from perfedavg.machine.cores import usable_cores
    from perfedavg.run import run_and_record
    from perfedavg.training.client_batching import choose_group_size, default_num_slots, say_idle_slots
    from perfedavg.training.compute import describe_device, resolve_device, use_reproducible_kernels
    from reporting.run_plots import draw_run_plots

    device = resolve_device(args.device)
    use_reproducible_kernels()
    folder = utils.open_run_folder(args)
    dataset = utils.get_datasets(config, args.data_root)
    model = utils.get_model(config, dataset)
    config = utils.load_initial_model(args, config, model, folder.has_checkpoint)
    config = choose_group_size(config, model, dataset, [describe_device(device, args.threads)])
    num_slots = args.threads or default_num_slots(config, device.type, usable_cores())
    say_idle_slots(config, num_slots)
    executor = LocalExecutor(config, model, dataset, device, num_slots)
    for warning in executor.warnings:
        say(warning)
    run_settings = {"command": sys.argv, "world_size": 1, "device": str(device), "threads": num_slots}
    run_and_record(config, executor, dataset, model, folder, run_settings)
    draw_run_plots(folder.path)


if __name__ == "__main__":
    run_entry_point(main)
