"""Entry point of reproduce.sh: the rows of the papers' tables on one data set, each row and seed a run of its own.

What a row is stands in `rows_of`, as flags of single_process.py. docs/reproduction.md says what each is for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import paths
import utils
from perfedavg.machine.cores import usable_cores
from perfedavg.plain_values import from_plain, parse_json
from perfedavg.recording.files import replace_file
from perfedavg.recording.runs import RecordedRun, make_folder, read_object, remove_empty
from perfedavg.settings import num_unseen_clients
from perfedavg.terminal.console import USER_ERRORS, command_line, end_process, prepare_process, report, say, show
from quick_start import SignalWatch, end_processes, exit_status

ROOT = utils.ROOT
POLL_SECONDS = 0.1
NUM_LAST_LINES = 10
"""Of the output of a run that failed, which are shown."""

Flags = dict[str, str]
"""Of single_process.py, by their names without the dashes."""

COMMON: Flags = {
    "client_num_in_total": "3400",
    "unseen_fraction": "0.2",
    "batch_size": "20",
    "local_lr": "0.02",
    "pers_round": "5",
    "pers_curve": "20",
    "eval_every": "20",
    "eval_clients": "50",
}
PHASE_1: Flags = {"epochs": "500", "server_optimizer": "momentum", "server_lr": "1.0", "server_momentum": "0.9"}
REPTILE: Flags = {
    "fine_tune_method": "reptile",
    "fine_tune_outer_loops": "100",
    "fine_tune_inner_loops": "10",
    "fine_tune_local_lr": "0.02",
    "fine_tune_server_optimizer": "sgd",
    "fine_tune_server_lr": "1.0",
    "fine_tune_server_schedule": "linear",
}
META: Flags = {
    "fine_tune_outer_loops": "100",
    "fine_tune_inner_steps": "5",
    "fine_tune_local_lr": "0.02",
    "fine_tune_support_fraction": "0.5",
    "fine_tune_server_optimizer": "sgd",
    "fine_tune_server_lr": "0.1",
    "fine_tune_server_schedule": "linear",
}
"""Phase 2 by MAML or FOMAML; the server's rate was chosen on validation clients, as Reptile's (docs/decisions.md)."""
PLAIN_SERVER: Flags = {"epochs": "500", "server_optimizer": "sgd", "fine_tune_method": "none"}
"""A server without momentum, and no phase 2."""


def _phase_1(num_epochs: int, num_clients: int) -> Flags:
    return {**PHASE_1, "inner_loops": str(num_epochs), "client_num_per_round": str(num_clients)}


MAIN: dict[str, Flags] = {
    f"E{num_epochs}-C{num_clients}": {
        **_phase_1(num_epochs, num_clients),
        **REPTILE,
        "pers_curve": "20" if num_clients == 20 else "0",  # a curve of 20 epochs takes longer than a row of few clients
    }
    for num_clients in (20, 5)
    for num_epochs in (20, 10, 5, 2)
}
EXTRA: dict[str, Flags] = {
    "tail": {**MAIN["E5-C20"], "local_split": "tail"},
    "local-only": {"epochs": "0", "fine_tune_method": "none", "pers_round": "50", "pers_curve": "50"},
    "fedsgd": {**PLAIN_SERVER, "server_lr": "15.0", "inner_steps": "1", "client_num_per_round": "20"},
    "joint": {**PLAIN_SERVER, "server_lr": "1.0", "inner_steps": "100", "client_num_per_round": "1", "joint": "true"},
    "fomaml": {**_phase_1(5, 20), **META, "fine_tune_method": "fomaml"},
    "maml": {**_phase_1(5, 20), **META, "fine_tune_method": "maml"},
}

SINE_COMMON: Flags = {
    "client_num_in_total": "30600",
    "unseen_fraction": "1/51",
    "batch_size": "10",
    "pers_round": "10",
    "pers_curve": "32",
    "eval_every": "1000",
    "eval_clients": "100",
    "checkpoint_every": "1000",
}
SINE_META: Flags = {
    "epochs": "0",
    "client_num_per_round": "10",
    "client_batching": "10",
    "local_lr": "0.02",
    "fine_tune_inner_steps": "5",
    "fine_tune_local_lr": "0.02",
    "fine_tune_support_fraction": "0.2",
    "fine_tune_server_optimizer": "adam",
    "fine_tune_server_lr": "0.003",
    "fine_tune_server_schedule": "linear",
}
"""Ten points to adapt on, as both papers give; the rest was chosen with another seed (docs/reproduction.md)."""
SINE: dict[str, Flags] = {
    "maml": {**SINE_META, "fine_tune_method": "maml", "fine_tune_outer_loops": "6000"},
    "fomaml": {**SINE_META, "fine_tune_method": "fomaml", "fine_tune_outer_loops": "6000"},
    "reptile": {**SINE_META, "fine_tune_method": "reptile", "fine_tune_outer_loops": "8000"},
    "joint": {
        **PLAIN_SERVER,
        "client_num_per_round": "1",
        "client_batching": "1",
        "local_lr": "0.02",
        "server_lr": "1.0",
        "inner_steps": "100",
        "joint": "true",
    },
}


def rows_of(dataset: str) -> dict[str, Flags]:
    """The rows of a data set's table, in its order: by name, all flags but --seed that make the row what it is."""
    if dataset == "sine":
        return {name: {"dataset": dataset, **SINE_COMMON, **flags} for name, flags in SINE.items()}
    common = {"dataset": dataset, **COMMON}
    if dataset != "synthetic_writers":  # whose clients are natural
        common["partition"] = "shards:2"
    return {name: {**common, **flags} for name, flags in {**MAIN, **EXTRA}.items()}


def select_rows(dataset: str, names: Sequence[str]) -> dict[str, Flags]:
    """Those rows, in the table's order. names: of rows, or `main`, `extra`, `all`. Raises ValueError for another."""
    rows = rows_of(dataset)
    main = [name for name in rows if name in MAIN] or list(rows)
    groups = {"main": main, "extra": [name for name in rows if name not in main], "all": list(rows)}
    groups = {name: members for name, members in groups.items() if members}
    chosen: set[str] = set()
    for name in names:
        if name not in rows and name not in groups:
            raise ValueError(f"--rows {name} is none of {dataset}'s; use {', '.join(groups)}, or of {', '.join(rows)}")
        chosen.update(groups.get(name, [name]))
    return {name: flags for name, flags in rows.items() if name in chosen}


@dataclass(frozen=True)
class Job:
    """A row with a seed.

    flags: that decide its result, the data set and the seed among them.
    run_dir: the folder of its run.
    result_dir: where that part of the run's folder is kept, when it has ended, from which tables are made.
    """

    row: str
    flags: Flags
    run_dir: Path
    result_dir: Path

    @property
    def label(self) -> str:
        return f"{self.row}, seed {self.flags['seed']}"

    @property
    def argv(self) -> list[str]:
        return [word for name, value in self.flags.items() for word in (f"--{name}", value)]

    @property
    def is_done(self) -> bool:
        return (self.result_dir / "result.json").exists()

    @property
    def has_begun(self) -> bool:
        return (self.run_dir / "config.json").exists()

    @property
    def has_ended(self) -> bool:
        return (self.run_dir / "result.json").exists()

    def command(self, machine: Sequence[str]) -> list[str]:
        """What starts its run, or goes on with it, from any folder.

        machine: flags of single_process.py that do not change the result.
        """
        where = ["--resume" if self.has_begun else "--run_dir", str(self.run_dir)]
        return [sys.executable, str(ROOT / "single_process.py"), *self.argv, *machine, *where]


def plan_jobs(rows: Mapping[str, Flags], seeds: Sequence[int], runs: Path, results: Path) -> list[Job]:
    """Every row with every seed, all rows with the first seed before any with the second.

    runs, results: the data set's folders, absolute.
    Raises ValueError where a row is no experiment, or where a folder holds a run with other flags than the row's.
    """
    jobs = []
    for seed in dict.fromkeys(seeds):
        for row, flags in rows.items():
            place = Path(row, f"seed{seed}")
            jobs.append(Job(row, {**flags, "seed": str(seed)}, runs / place, results / place))
    for job in jobs:
        utils.config_from_args(utils.get_args("single", job.argv))
        if job.is_done:
            check_flags(job, job.result_dir, "--results")
        elif job.has_begun:
            check_flags(job, job.run_dir, "--runs")
    return jobs


def check_flags(job: Job, folder: Path, folder_flag: str) -> None:
    """Raises ValueError, naming the first difference, where the run in a folder had other flags than the job's.

    A flag that the run did not know yet counts as having had its default.
    """
    asked = utils.experiment_flags(utils.get_args("single", job.argv))
    recorded = _recorded_flags(folder)
    for name, value in asked.items():
        if recorded[name] != value:
            raise ValueError(
                f"{_from_root(folder)} holds a run with --{name} {recorded[name]}, not {value}; move it away, or name "
                f"another folder with {folder_flag}"
            )


def _recorded_flags(folder: Path) -> dict[str, Any]:
    try:
        return utils.complete_flags(RecordedRun.read(folder).flags)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{_from_root(folder)}/config.json is missing or damaged; move that folder away ({error})"
        ) from error


def run_jobs(
    jobs: Sequence[Job],
    machine: Sequence[str],
    signals: SignalWatch,
    num_at_once: int = 1,
    restart_command: str = "sh reproduce.sh",
) -> int:
    """Run what is not done yet, so many at a time and in the order of the jobs; say how far it is.

    When a run fails or a signal comes, the others that run save a checkpoint and end.
    Returns the exit status: 0, or that of the run that failed, or 128 + n after signal n.
    """
    pace = Pace(jobs, num_at_once)
    waiting = deque((f"[{number}/{len(jobs)}] {job.label}", job) for number, job in enumerate(jobs, 1))
    running: list[Run] = []
    failed: list[Run] = []

    def keep(title: str, job: Job) -> None:
        result = keep_results(job)
        pace.job_ended(job, result["seconds"])
        show(f"{title}: {describe(result)}; about {_duration(pace.seconds_left)} to go")

    try:
        while (waiting or running) and not failed and not signals.received:
            if waiting and len(running) < num_at_once:
                title, job = waiting.popleft()
                if job.is_done:
                    show(f"{title}: done before, in {_from_root(job.result_dir)}")
                elif job.has_ended:
                    keep(title, job)
                else:
                    command = job.command(machine)
                    show(f"{title}: {command_line(command)}")
                    running.append(Run(title, job, command))
                continue
            ended = [run for run in running if run.process.poll() is not None]
            running = [run for run in running if run not in ended]
            for run in ended:
                if run.process.returncode:
                    failed.append(run)
                else:
                    keep(run.title, run.job)
            time.sleep(POLL_SECONDS)
    finally:
        end_processes([run.process for run in running])
    how = f"stopped by {signals.received.name}" if signals.received else "stopped"
    for run in running:
        say(run.last_words(how, 1))
    for run in failed:
        how = f"ended with status {exit_status(run.process)}"
        end = "" if run.discard_unless_begun() else f"; the end of {_from_root(run.log)}"
        say(run.last_words(f"{how}{end}:", NUM_LAST_LINES))
    if not failed and not signals.received:
        return 0
    say(f"go on with: {restart_command}")
    return 128 + signals.received if signals.received else exit_status(failed[0].process)


class Run:
    """A job's run, or the rest of one, in a process of its own, which begins at once.

    log: what it prints is added to, beside its folder.
    """

    def __init__(self, title: str, job: Job, command: Sequence[str]) -> None:
        self.title = title
        self.job = job
        self.log = job.run_dir.with_name(f"{job.run_dir.name}.log")
        self._made = make_folder(self.log.parent)
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        self._discarded: list[str] | None = None
        with open(self.log, "ab") as file:
            self.process = _start(command, file)

    def last_words(self, how: str, num_lines: int) -> str:
        """How it ended, and the last lines of what it printed."""
        return "\n".join([f"{self.job.label}: {how}", *self._lines()[-num_lines:]])

    def discard_unless_begun(self) -> bool:
        """Leave nothing of a run that never began, if all that it printed can be shown; returns whether it was so."""
        if self._begin or self.job.has_begun or len(self._lines()) > NUM_LAST_LINES:
            return False
        self._discarded = self._lines()
        self.log.unlink()
        remove_empty(self._made)
        return True

    def _lines(self) -> list[str]:
        if self._discarded is not None:
            return self._discarded
        return self.log.read_bytes()[self._begin :].decode(errors="replace").splitlines()


def _start(command: Sequence[str], output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a command in the project's root, and in a process group of its own, so that Ctrl-C does not reach it.

    output: where what it prints goes, or None to show it.
    """
    errors = None if output is None else subprocess.STDOUT
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
    )


def keep_results(job: Job) -> dict[str, Any]:
    """Copy from the run's folder what tables are made of; return the content of result.json.

    Of metrics.jsonl the lines of rounds with a point of the curve.
    result.json comes last: it marks the row as done.
    Raises OSError where there is no room.
    """
    config, result = read_object(job.run_dir / "config.json"), read_object(job.run_dir / "result.json")
    kept = {
        "config.json": f"{json.dumps(without_machine_paths(config), indent=2)}\n".encode(),
        "metrics.jsonl": "".join(_lines_with_evaluation(job.run_dir / "metrics.jsonl")).encode(),
        "clients.csv": (job.run_dir / "clients.csv").read_bytes(),
        "result.json": (job.run_dir / "result.json").read_bytes(),
    }
    job.result_dir.mkdir(parents=True, exist_ok=True)
    for name, content in kept.items():
        replace_file(job.result_dir / name, [content])
    return result


def _lines_with_evaluation(path: Path) -> Iterator[str]:
    """Raises ValueError where a line is none of a run's."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            record = from_plain(dict[str, Any], parse_json(line))
        except ValueError as error:
            raise ValueError(f"{path} is damaged (line {number}: {error}); repeat the run") from error
        if record.get("evaluation") is not None:
            yield line


def without_machine_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config.json with the commands that it was run by shortened so that they do not tell where.

    A path in the project becomes relative to its root; of another one, the last part remains.
    """

    def shorten(word: str) -> str:
        flag, equals, value = word.rpartition("=")
        path = Path(value)
        if path.is_absolute():
            value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f".../{path.name}"
        return f"{flag}{equals}{value}"

    def shortened(entry: dict[str, Any]) -> dict[str, Any]:
        run = from_plain(dict[str, Any], entry.get("run"), "config.json: run")
        command = from_plain(list[str], run.get("command"), "config.json: run.command")
        return {**entry, "run": {**run, "command": [shorten(word) for word in command]}}

    entries = from_plain(list[dict[str, Any]], config.get("resumed", []), "config.json: resumed")
    resumed = {"resumed": [shortened(entry) for entry in entries]} if "resumed" in config else {}
    return {**shortened(config), **resumed}


class Pace:
    """How long the rest takes, judged by the runs that have ended."""

    def __init__(self, jobs: Sequence[Job], num_at_once: int = 1) -> None:
        self._num_at_once = num_at_once
        self._passes_left = sum(num_passes(job) for job in jobs if not job.is_done)
        self._passes_made = 0
        self._seconds = 0.0

    def job_ended(self, job: Job, seconds: float) -> None:
        """seconds: of the job's run, over all processes that took part in it."""
        self._passes_left -= num_passes(job)
        self._passes_made += num_passes(job)
        self._seconds += seconds

    @property
    def seconds_left(self) -> float:
        return self._seconds / self._passes_made * self._passes_left / self._num_at_once


def num_passes(job: Job) -> int:
    """Passes over one client's data that a run makes, to train and to score: roughly what its time is proportional to.

    A local step counts as a pass.
    """
    config = utils.config_from_args(utils.get_args("single", job.argv))
    assert config.num_clients is not None, "every row says how many clients it has"
    num_unseen = num_unseen_clients(config.num_clients, config.unseen_fraction)
    passes = 0
    for phase in config.phases.values():
        passes += phase.num_rounds * config.cohort_size * (phase.num_local_steps or phase.num_local_epochs)
        passes += phase.num_rounds // config.eval_every * config.eval_clients * config.num_personalization_epochs
        passes += num_unseen * max(config.num_personalization_epochs, config.num_curve_epochs)
    return passes


def describe(result: Mapping[str, Any]) -> str:
    """How long a run took, and what came of it, in a line."""
    parts = [_duration(result["seconds"])]
    phase_1 = "after FedAvg" if result["rounds"] else "untrained"
    for key, label in (("after_fedavg", phase_1), ("after_fine_tune", "after fine-tuning")):
        if key in result:
            initial, personalized = (_score(result[key][name]) for name in ("initial", "personalized"))
            parts.append(f"{label} {initial}, personalized {personalized}")
    return "; ".join(parts)


def _score(summary: Mapping[str, Any]) -> str:
    """The accuracy, or the loss where there are no classes."""
    if summary["accuracy"] is not None:
        return f"{summary['accuracy']:.2%}"
    return "no finite loss" if summary["loss"] is None else f"loss {summary['loss']:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _from_root(path: Path) -> Path:
    """The same path relative to the project's root, where it lies in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def list_jobs(jobs: Sequence[Job], machine: Sequence[str]) -> str:
    """What is done and what is to do, and each row's command with its first seed."""
    rows: dict[str, list[Job]] = {}
    for job in jobs:
        rows.setdefault(job.row, []).append(job)
    entries = []
    for row, members in rows.items():
        states = "; ".join(f"seed {job.flags['seed']} {_state(job)}" for job in members)
        entries.append(f"{row}: {states}\n    {command_line(members[0].command(machine))}")
    return "\n".join(entries)


def _state(job: Job) -> str:
    if job.is_done:
        return "done"
    return "unfinished" if job.has_begun else "to do"


def write_tables(dataset: str, runs: Path, results: Path, signals: SignalWatch) -> int:
    """Have the data set's tables and plots made from its results. Returns the exit status, as `run_jobs` does."""
    folder = str(_from_root(results))
    scripts = [["report.py", folder, "--output", f"{folder}/report"]]
    if dataset == "sine":
        scripts.append(["sine.py", folder, "--output", f"{folder}/report", "--models", str(_from_root(runs))])
    for script in scripts:
        process = _start([sys.executable, *script])
        try:
            while process.poll() is None and not signals.received:
                time.sleep(POLL_SECONDS)
        finally:
            end_processes([process])
        if signals.received or process.returncode:
            return 128 + signals.received if signals.received else exit_status(process)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sh reproduce.sh", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", required=True, choices=("mnist", "emnist", "synthetic_writers", "sine"))
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
    go_on = command_line([sys.executable, ROOT / "reproduce.py", *argv])
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
        return run_jobs(jobs, machine, signals, args.jobs, go_on) or write_tables(args.dataset, runs, results, signals)
    except USER_ERRORS as error:
        return report(error)


if __name__ == "__main__":
    prepare_process()
    end_process(main())
