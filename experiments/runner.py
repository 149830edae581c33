"""Runs the rows of a table with each seed: resumes what has begun, says how far it is, keeps what tables need."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import utils
from experiments.rows import Flags
from launch.commands import flag_words
from launch.paths import ROOT
from perfedavg.fields import values_of
from perfedavg.machine.processes import SignalWatch, end_processes, exit_status
from perfedavg.recording.files import replace_file
from perfedavg.recording.folders import make_folder, remove_empty
from perfedavg.recording.runs import RecordedRun, read_metrics, read_object
from perfedavg.settings import ExperimentConfig, PhaseConfig, num_unseen_clients
from perfedavg.terminal.console import command_line, duration, say, show

NUM_LAST_LINES = 10
"""Lines shown of the output of a run that failed."""


@dataclass(frozen=True)
class Job:
    """A row with a seed.

    flags: of single_process.py, those that decide the result.
    run_dir: the run's folder.
    result_dir: where the part of it is kept that tables are made of.
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
        return flag_words(self.flags)

    @property
    def experiment(self) -> ExperimentConfig:
        """Raises ValueError where the flags make none."""
        experiment: ExperimentConfig = utils.get_args("single", self.argv).experiment
        return experiment

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
        """The command that starts or resumes the run, from any folder.

        machine: flags of single_process.py that do not change the result.
        """
        where = ["--resume" if self.has_begun else "--run_dir", str(self.run_dir)]
        return [sys.executable, str(ROOT / "single_process.py"), *self.argv, *machine, *where]


def plan_jobs(rows: Mapping[str, Flags], seeds: Sequence[int], runs: Path, results: Path) -> list[Job]:
    """Every row with every seed, all rows with the first seed before any with the second.

    runs, results: the table's folders, absolute.
    Raises ValueError where a row is no experiment, or where a folder holds a run with other flags than the row's.
    """
    jobs = [
        Job(row, {**flags, "seed": str(seed)}, runs / row / f"seed{seed}", results / row / f"seed{seed}")
        for seed in dict.fromkeys(seeds)
        for row, flags in rows.items()
    ]
    for job in jobs:
        job.experiment  # noqa: B018, which raises
        if job.is_done:
            check_flags(job, job.result_dir, "--results")
        elif job.has_begun:
            check_flags(job, job.run_dir, "--runs")
    return jobs


def check_flags(job: Job, folder: Path, folder_flag: str) -> None:
    """Raises ValueError, naming the first difference, where the run in a folder had other flags than the job's.

    A setting that the run did not know yet counts as having had its default.
    """
    place = _from_root(folder)
    try:
        recorded = RecordedRun.read(folder).experiment()
    except (ValueError, OSError) as error:
        raise ValueError(f"{place}/config.json is missing or damaged; move that folder away ({error})") from error
    asked, present = values_of(job.experiment.settled_as(recorded)), values_of(recorded)
    for name, value in asked.items():
        if present.get(name) != value:
            raise ValueError(
                f"{place} holds a run with --{name} {present.get(name)}, not {value}; move it away, or name another "
                f"folder with {folder_flag}"
            )


def run_jobs(
    jobs: Sequence[Job],
    machine: Sequence[str],
    signals: SignalWatch,
    num_at_once: int = 1,
    restart_command: str = "sh reproduce.sh",
) -> int:
    """Run the jobs that are not done, in their order, and say how far it is.

    When a run fails or a signal comes, the others that run save a checkpoint and end.
    Returns the exit status: 0, that of the run that failed, or 128 + n after signal n.
    """
    waiting = deque((f"[{number}/{len(jobs)}] {job.label}", job) for number, job in enumerate(jobs, 1))
    left = [job for job in jobs if not job.is_done]
    ended: list[tuple[Job, float]] = []
    running: list[Run] = []
    failed: list[Run] = []

    def keep(title: str, job: Job) -> None:
        result = keep_results(job)
        left.remove(job)
        ended.append((job, result["seconds"]))
        seconds = seconds_left(left, ended, result["train_clients"] + result["unseen_clients"]) / num_at_once
        show(f"{title}: {describe(result)}; about {duration(seconds)} to go")

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
            signals.wait()
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                if run.process.returncode:
                    failed.append(run)
                else:
                    keep(run.title, run.job)
    finally:
        end_processes([run.process for run in running])
    if not failed and not signals.received:
        return 0
    for run in running:
        say(run.last_words(f"stopped by {signals.received.name}" if signals.received else "stopped", 1))
    for run in failed:
        say(run.explain_failure())
    say(f"go on with: {restart_command}")
    return _early_status(signals, [run.process for run in failed])


def _early_status(signals: SignalWatch, failed: Sequence[subprocess.Popen[bytes]]) -> int:
    """128 + n after signal n, or that of the first process that failed."""
    return 128 + signals.received if signals.received else exit_status(failed[0])


class Run:
    """A job's run, or the rest of one, in a process of its own, which starts at once.

    log: the file beside the run's folder to which its output is added.
    """

    def __init__(self, title: str, job: Job, command: Sequence[str]) -> None:
        self.title = title
        self.job = job
        self.log = job.run_dir.with_name(f"{job.run_dir.name}.log")
        self._made = make_folder(self.log.parent)
        self._output_start = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as file:
            self.process = start_process(command, file)

    def last_words(self, how: str, num_lines: int) -> str:
        """How it ended, and the last lines of its output."""
        return "\n".join([f"{self.job.label}: {how}", *self._output()[-num_lines:]])

    def explain_failure(self) -> str:
        """How it failed. Removes the log of a run that never began, if all of it is told here."""
        how = f"ended with status {exit_status(self.process)}"
        if self._output_start or self.job.has_begun or len(self._output()) > NUM_LAST_LINES:
            return self.last_words(f"{how}; the end of {_from_root(self.log)}:", NUM_LAST_LINES)
        words = self.last_words(f"{how}:", NUM_LAST_LINES)
        self.log.unlink()
        remove_empty(self._made)
        return words

    def _output(self) -> list[str]:
        return self.log.read_bytes()[self._output_start :].decode(errors="replace").splitlines()


def start_process(command: Sequence[str], output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a command in the project's root, in a process group of its own, so that Ctrl-C does not reach it.

    output: where its output goes, or None to show it.
    """
    errors = None if output is None else subprocess.STDOUT
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
    )


def keep_results(job: Job) -> dict[str, Any]:
    """Copy what tables are made of from the run's folder; return the content of result.json.

    Of metrics.jsonl the lines with a point of the accuracy curve, and with the seconds that training took up to it.
    result.json comes last: it marks the row as done.
    Raises OSError where there is no room, ValueError where a file is damaged.
    """
    config, result = read_object(job.run_dir / "config.json"), read_object(job.run_dir / "result.json")
    try:
        for entry in (config, *config.get("resumed", [])):
            entry["run"]["command"] = [_without_machine_path(word) for word in entry["run"]["command"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{job.run_dir / 'config.json'} is damaged ({error!r}); repeat the run") from error
    points, training_seconds = [], 0.0
    for _, record in read_metrics(job.run_dir):
        training_seconds += record["seconds"]
        if record["evaluation"] is not None:
            points.append(json.dumps({**record, "training_seconds": training_seconds}))
    kept = {
        "config.json": f"{json.dumps(config, indent=2)}\n".encode(),
        "metrics.jsonl": "".join(f"{line}\n" for line in points).encode(),
        "clients.csv": (job.run_dir / "clients.csv").read_bytes(),
        "result.json": (job.run_dir / "result.json").read_bytes(),
    }
    job.result_dir.mkdir(parents=True, exist_ok=True)
    for name, content in kept.items():
        replace_file(job.result_dir / name, content)
    return result


def _without_machine_path(word: str) -> str:
    """A word of a command: a path in the project relative to its root, of any other path the last part."""
    flag, equals, value = word.rpartition("=")
    path = Path(value)
    if path.is_absolute():
        value = str(_from_root(path)) if path.is_relative_to(ROOT) else f".../{path.name}"
    return f"{flag}{equals}{value}"


def seconds_left(left: Sequence[Job], ended: Sequence[tuple[Job, float]], num_clients: int) -> float:
    """Estimate, from the seconds that each of the ended jobs took, how long the others take one after the other."""
    num_made = sum(num_passes(job, num_clients) for job, _ in ended)
    return sum(seconds for _, seconds in ended) / num_made * sum(num_passes(job, num_clients) for job in left)


def num_passes(job: Job, num_clients: int) -> float:
    """Passes over one client's data that a run makes to train and to score, to which its time is about proportional.

    A local step counts as a pass, and a method's own price is in it.

    num_clients: of the data set, which a row need not say.
    """
    config = job.experiment
    num_scored = num_unseen_clients(num_clients, config.unseen_fraction) or num_clients
    passes = 0.0
    for phase in config.phases.values():
        of_client = phase.method.round_cost(functools.partial(_local_passes, phase), 1)
        passes += phase.num_rounds * config.cohort_size * of_client
        passes += phase.num_rounds // config.eval_every * config.eval_clients * config.num_personalization_epochs
        passes += num_scored * max(config.num_personalization_epochs, config.num_curve_epochs)
    return passes


def _local_passes(phase: PhaseConfig, num_examples: int) -> float:
    return phase.num_local_steps or phase.num_local_epochs


def describe(result: Mapping[str, Any]) -> str:
    """How long a run took, and its scores, in a line."""
    parts = [duration(result["seconds"])]
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


def _from_root(path: Path) -> Path:
    """The same path relative to the project's root, where it lies in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def list_jobs(jobs: Sequence[Job], machine: Sequence[str]) -> str:
    """What is done and what is to do, and each row's command with its first seed."""
    lines = []
    for row in dict.fromkeys(job.row for job in jobs):
        members = [job for job in jobs if job.row == row]
        states = "; ".join(f"seed {job.flags['seed']} {_state(job)}" for job in members)
        lines += [f"{row}: {states}", f"    {command_line(members[0].command(machine))}"]
    return "\n".join(lines)


def _state(job: Job) -> str:
    if job.is_done:
        return "done"
    return "unfinished" if job.has_begun else "to do"


def write_tables(table: str, runs: Path, results: Path, signals: SignalWatch) -> int:
    """Make the table and its plots from its results. Returns the exit status, as `run_jobs` does."""
    folder = str(_from_root(results))
    scripts = [["report.py", folder, "--output", f"{folder}/report"]]
    if table == "sine":
        scripts.append(
            ["-m", "experiments.sine_table", folder, "--output", f"{folder}/report", "--models", str(_from_root(runs))]
        )
    for script in scripts:
        process = start_process([sys.executable, *script])
        try:
            while process.poll() is None and not signals.received:
                signals.wait()
        finally:
            end_processes([process])
        if signals.received or process.returncode:
            return _early_status(signals, [process])
    return 0
