"""Entry point of reproduce.sh: the rows of the papers' tables on one data set, each row and seed a run of its own."""

from __future__ import annotations

import argparse
import sys

import paths
import utils
from experiments.rows import dataset_names, select_rows
from experiments.runner import ROOT, list_jobs, plan_jobs, run_jobs, write_tables
from perfedavg.machine.cores import usable_cores
from perfedavg.machine.processes import SignalWatch
from perfedavg.terminal.console import command_line, show
from perfedavg.terminal.entry_point import USER_ERRORS, end_process, prepare_process, report


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sh reproduce.sh", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", required=True, choices=dataset_names())
    add("--rows", nargs="+", default=["all"], metavar="NAME", help="rows, or main, extra, all (default: all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add(
        "--data_root",
        type=paths.folder,
        default=paths.default_data_root(),
        metavar="FOLDER",
        help="folder of the data sets (default: PERFEDAVG_DATA, or datasets/data)",
    )
    add(
        "--results",
        type=paths.folder,
        default=ROOT / "results",
        metavar="FOLDER",
        help="where results and tables are kept; a row whose result is there is not run again (default: results)",
    )
    add(
        "--runs",
        type=paths.folder,
        default=ROOT / "runs" / "reproduce",
        metavar="FOLDER",
        help="where the runs' folders are (default: runs/reproduce)",
    )
    add("--list", action="store_true", help="say what is done and what is to do, with the commands, and run nothing")
    add("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:i (default: auto)")
    add("--jobs", type=utils.positive, default=1, metavar="N", help="runs at a time (default: 1)")
    add(
        "--threads",
        type=utils.positive,
        metavar="N",
        help="clients that a run trains side by side (default: the machine's cores, shared out among the runs)",
    )
    return parser


def main() -> int:
    args = build_parser().parse_args()
    argv = utils.differing_argv(build_parser(), args, without=())
    restart_command = command_line([sys.executable, ROOT / "reproduce.py", *argv])
    machine = ["--data_root", str(args.data_root), "--device", args.device]
    if args.threads is None and args.jobs > 1:
        args.threads = max(1, usable_cores() // args.jobs)
    if args.threads is not None:
        machine += ["--threads", str(args.threads)]
    runs, results = args.runs / args.dataset, args.results / args.dataset
    try:
        jobs = plan_jobs(select_rows(args.dataset, args.rows), args.seeds, runs, results)
        if args.list:
            show(list_jobs(jobs, machine))
            return 0
        signals = SignalWatch()
        status = run_jobs(jobs, machine, signals, args.jobs, restart_command)
        return status or write_tables(args.dataset, runs, results, signals)
    except USER_ERRORS as error:
        return report(error)


if __name__ == "__main__":
    prepare_process()
    end_process(main())
