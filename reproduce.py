"""Entry point of reproduce.sh: the rows of a table, each row and seed a run of its own."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

from experiments.rows import select_rows, table_names
from experiments.runner import list_jobs, plan_jobs, run_jobs, write_tables
from launch import paths
from launch.commands import restart_command
from launch.flags import parse
from launch.paths import ROOT
from launch.settings import Checked, Data
from perfedavg.fields import setting
from perfedavg.machine.cores import usable_cores
from perfedavg.machine.processes import SignalWatch
from perfedavg.settings import Compute
from perfedavg.terminal.console import show
from perfedavg.terminal.entry_point import USER_ERRORS, end_process, prepare_process, report


@dataclass(frozen=True, kw_only=True)
class Reproduce(Compute, Data, Checked):
    """Run the rows of a table, each row and seed a run of its own."""

    program: ClassVar[str] = "sh reproduce.sh"
    script: ClassVar[str] = "reproduce.py"
    heading = "options"
    table: str = setting(MISSING, "whose rows", choices=table_names(), aliases=("dataset",))
    rows: tuple[str, ...] = setting(("all",), "rows, groups of them such as main, or all", metavar="NAME", many=True)
    seeds: tuple[int, ...] = setting((0, 1, 2), "a run each", metavar="N", many=True)
    results: Path = setting(
        ROOT / "results",
        "where results and tables are kept; a row whose result is there is not run again",
        parse=paths.folder,
        metavar="FOLDER",
        absent="results",
    )
    runs: Path = setting(
        ROOT / "runs" / "reproduce",
        "where the runs' folders are",
        parse=paths.folder,
        metavar="FOLDER",
        absent="runs/reproduce",
    )
    list: bool = setting(False, "say what is done and what is to do, with the commands, and run nothing")
    jobs: int = setting(1, "runs at a time, which share the machine's cores", at_least=1)


def main() -> int:
    try:
        args = parse(Reproduce)
        threads = max(1, usable_cores() // args.jobs) if args.threads is None and args.jobs > 1 else args.threads
        machine = ["--data_root", str(args.data_root), "--device", args.device]
        machine += [] if threads is None else ["--threads", str(threads)]
        runs, results = args.runs / args.table, args.results / args.table
        jobs = plan_jobs(select_rows(args.table, args.rows), args.seeds, runs, results)
        if args.list:
            show(list_jobs(jobs, machine))
            return 0
        signals = SignalWatch()
        status = run_jobs(jobs, machine, signals, args.jobs, restart_command(args))
        return status or write_tables(args.table, runs, results, signals)
    except USER_ERRORS as error:
        return report(error)


if __name__ == "__main__":
    prepare_process()
    end_process(main())
