"""Entry point: the whole experiment in one process, without a network."""

from __future__ import annotations

import sys

import utils
from launch.paths import ROOT
from perfedavg.machine.kernels import pin_kernels_or_restart
from perfedavg.terminal.entry_point import run_entry_point


def main() -> None:
    args = utils.get_args("single")
    pin_kernels_or_restart(args.experiment.portable_kernels, ROOT / "single_process.py", sys.argv[1:])

    from perfedavg.recorded_run import run_and_record
    from perfedavg.training.compute import use_reproducible_kernels
    from reporting.run_plots import draw_run_plots

    use_reproducible_kernels()
    folder = utils.open_run_folder(args)
    run_and_record(*utils.prepare_local(args, folder, sys.argv))
    draw_run_plots(folder.path)


if __name__ == "__main__":
    run_entry_point(main)
