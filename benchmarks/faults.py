"""The fault matrix: which process, which signal, at which point of which phase, and what it costs.

python benchmarks/faults.py [--rows TEXT | --write docs/guarantees.md] [-- FLAGS of server and workers]

The flags may be --backend tcp or --keys FOLDER, which send everything over the server's port.

Each row is a run of real processes, a server and two workers, forked as quick_start.py forks them, with one fault
planted at an exact point (`planted_fault.py`). Every row must end with the model, the metrics and the scores of the
undisturbed run, and leave no process behind. Prints for each row how long it took until the fault was noticed, and how
much longer than the undisturbed run (median of three) the whole took, start-up of new processes included; then what all
rows have in common. The last line is JSON. `--write PAGE` puts the table, the undisturbed run's seconds and the commit
into that page.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import commit, split_page, write_into  # noqa: E402

from perfedavg.machine.forking import ForkedProcess, load  # noqa: E402
from perfedavg.machine.processes import hold_free_port  # noqa: E402
from quick_start import load_everything  # noqa: E402

NAME = Path(__file__).name
POLL_SECONDS = 0.02
ENDS_WITHIN_SECONDS = 150
SILENCE_SECONDS = 2
"""--worker_timeout_seconds of every run."""

EXPERIMENT = [
    "--dataset",
    "digits",
    "--client_num_in_total",
    "20",
    "--client_num_per_round",
    "6",
    "--personalization_epochs",
    "2",
]
EXPERIMENT += ["--rounds", "5", "--local_epochs", "6", "--fine_tune_rounds", "4", "--fine_tune_local_epochs", "6"]
EXPERIMENT += ["--eval_every", "2", "--eval_clients", "4"]
"""Long enough that a worker that is started again in round 2 is there before the end, and nobody waits for it."""


@dataclass(frozen=True)
class Row:
    """A fault. point: of `planted_fault.POINTS`.  then: what follows, `others` (go on), `again` (started again, the
    server with --resume), `continued` (SIGCONT, once it was taken for dead)."""

    point: str
    phase: str
    round_number: int
    signal: str
    then: str

    @property
    def name(self) -> str:
        when = "before the first round" if self.round_number == 0 else f"{self.phase} round {self.round_number}"
        return f"{self.point}, {when}, {self.signal}, {self.then}"

    @property
    def process(self) -> str:
        return self.point.split()[0]


MATRIX = [
    Row("worker joining", "fedavg", 0, "SIGKILL", "again"),
    Row("worker loading", "fedavg", 0, "SIGKILL", "again"),
    Row("worker idle", "fedavg", 3, "SIGKILL", "others"),
    Row("worker idle", "fine_tune", 2, "SIGTERM", "others"),
    Row("worker training", "fedavg", 1, "SIGKILL", "others"),
    Row("worker training", "fedavg", 2, "SIGKILL", "again"),
    Row("worker training", "fedavg", 3, "SIGSEGV", "others"),
    Row("worker training", "fedavg", 3, "SIGSTOP", "others"),
    Row("worker training", "fedavg", 2, "SIGSTOP", "continued"),
    Row("worker training", "fine_tune", 2, "SIGKILL", "others"),
    Row("worker training", "fine_tune", 1, "SIGSTOP", "continued"),
    Row("worker sending", "fedavg", 1, "SIGKILL", "again"),
    Row("worker sending", "fedavg", 3, "SIGKILL", "others"),
    Row("worker sending", "fedavg", 3, "SIGSTOP", "continued"),
    Row("worker sending", "fine_tune", 4, "SIGKILL", "others"),
    Row("worker scoring", "fedavg", 4, "SIGKILL", "others"),
    Row("worker scoring", "fedavg", 2, "SIGKILL", "again"),
    Row("worker scoring", "fedavg", 4, "SIGSTOP", "continued"),
    Row("worker scoring", "fine_tune", 4, "SIGKILL", "others"),
    Row("server joining", "fedavg", 0, "SIGKILL", "again"),
    Row("server waiting", "fedavg", 1, "SIGKILL", "again"),
    Row("server waiting", "fedavg", 4, "SIGKILL", "again"),
    Row("server waiting", "fedavg", 4, "SIGTERM", "again"),
    Row("server waiting", "fedavg", 3, "SIGSTOP", "continued"),
    Row("server waiting", "fine_tune", 3, "SIGKILL", "again"),
    Row("server stepping", "fedavg", 3, "SIGKILL", "again"),
    Row("server stepping", "fine_tune", 1, "SIGTERM", "again"),
    Row("server scoring", "fedavg", 4, "SIGKILL", "again"),
    Row("server scoring", "fedavg", 5, "SIGTERM", "again"),
    Row("server scoring", "fine_tune", 4, "SIGKILL", "again"),
    Row("server saving", "fedavg", 4, "SIGKILL", "again"),
    Row("server saving", "fine_tune", 2, "SIGKILL", "again"),
]


@dataclass(frozen=True)
class Result:
    """What a run ended with. seconds: from its first process to the end of its last.

    rounds: (phase, number) of each line of the metrics.  scores: clients.csv.
    noticed_s: from the fault until another process said so, None where there was no fault.
    """

    model_sha256: str
    rounds: list[tuple[str, int]]
    scores: list[list[str]]
    seconds: float
    noticed_s: float | None


def is_same(result: Result, undisturbed: Result) -> bool:
    """Whether model, rounds and scores are those of the undisturbed run."""
    return (result.model_sha256, result.rounds, result.scores) == (
        undisturbed.model_sha256,
        undisturbed.rounds,
        undisturbed.scores,
    )


class Process(Protocol):
    """What is needed of subprocess.Popen."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int) -> None: ...
    def kill(self) -> None: ...


Launch = Callable[[str, Path, list[str], IO[bytes]], Process]
"""Starts a script: its name for people, path, arguments, and the file for what it prints."""


class Processes:
    """The processes of one run, each with its standard error in a file of its own.

    num_awaited: the server does not end before so many workers are connected. A short run could be over before a worker
        that is started again is there, which would then find no server.
    """

    def __init__(
        self, folder: Path, launch: Launch, experiment: list[str], network: Sequence[str], num_awaited: int = 0
    ) -> None:
        self._folder = folder
        self._launch = launch
        self._experiment = experiment
        self._network = network
        self._num_awaited = num_awaited
        self._held, self.port = hold_free_port()
        self.run_dir = folder / "run"
        self.note = folder / "struck"
        self._running: dict[str, Process] = {}

    def start(self, name: str, row: Row | None = None, resume: bool = False) -> None:
        """Start `server`, `worker 1` or `worker 2`, with the row's fault planted in it."""
        address = ["--port", str(self.port), *self._network]
        if name == "server":
            run = ["--resume", str(self.run_dir)] if resume else ["--run_dir", str(self.run_dir), *self._experiment]
            limits = ["--worker_timeout_seconds", str(SILENCE_SECONDS), "--worker_wait_seconds", "60"]
            words = ["server.py", *run, *limits, "--checkpoint_every", "2"]
        else:
            words = ["client_worker.py", "--rank", name[-1], "--threads", "1", "--server_wait_seconds", "60"]
            words += ["--join_timeout_seconds", "60"]
        if row is not None:
            fault = [row.point, row.phase, str(row.round_number), row.signal, str(self.note)]
            words = ["benchmarks/planted_fault.py", *fault, *words]
        if name == "server" and self._num_awaited:
            words = ["benchmarks/patient_server.py", str(self._num_awaited), *words]
        script, *argv = words
        with open(self.error_file(name), "ab") as errors:
            self._running[name] = self._launch(name, ROOT / script, [*argv, *address], errors)

    def error_file(self, name: str) -> Path:
        return self._folder / name

    def status(self, name: str) -> int | None:
        return self._running[name].poll()

    def is_stopped(self, name: str) -> bool:
        return bool(psutil.Process(self._running[name].pid).status() == psutil.STATUS_STOPPED)

    def send(self, name: str, number: signal.Signals) -> None:
        self._running[name].send_signal(number)

    def wait_until_ended(self, names: list[str]) -> dict[str, int]:
        deadline = time.monotonic() + ENDS_WITHIN_SECONDS
        return {name: self._running[name].wait(max(0.0, deadline - time.monotonic())) for name in names}

    def end(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        self._held.close()

    def account(self) -> str:
        """What all of them said, for an error."""
        return "\n".join(f"--- {name}\n{self.error_file(name).read_text()}" for name in self._running)


@contextmanager
def processes_in(
    folder: Path,
    launch: Launch = ForkedProcess,
    experiment: list[str] = EXPERIMENT,
    network: Sequence[str] = (),
    num_awaited: int = 0,
) -> Iterator[Processes]:
    folder.mkdir(parents=True)
    processes = Processes(folder, launch, experiment, network, num_awaited)
    try:
        yield processes
    finally:
        processes.end()


def run_undisturbed(
    folder: Path, launch: Launch = ForkedProcess, experiment: list[str] = EXPERIMENT, network: Sequence[str] = ()
) -> Result:
    return _run(folder, launch, experiment, network, None)


def run_row(
    row: Row,
    folder: Path,
    launch: Launch = ForkedProcess,
    experiment: list[str] = EXPERIMENT,
    network: Sequence[str] = (),
) -> Result:
    """Run with the row's fault, and see to it that every process that should end well does.

    experiment: flags of it; it needs the phases, rounds and evaluations that the rows name.
    network: flags of the server and of each worker.

    Raises AssertionError, with what the processes said, where one does not.
    """
    return _run(folder, launch, experiment, network, row)


def _run(folder: Path, launch: Launch, experiment: list[str], network: Sequence[str], row: Row | None) -> Result:
    struck = None if row is None else ("server" if row.process == "server" else "worker 2")
    expected = ["server", "worker 1", "worker 2"]
    if row is not None and row.then == "others":
        expected.remove("worker 2")
    with processes_in(folder, launch, experiment, network, num_awaited=len(expected) - 1) as processes:
        started = time.monotonic()
        for name in ("server", "worker 1", "worker 2"):
            processes.start(name, row if name == struck else None)
        noticed_s = None
        if row is not None and struck is not None:
            noticed_s = _follow_up(processes, struck, row)
        try:
            statuses = processes.wait_until_ended(expected)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{error}\n{processes.account()}") from error
        assert not any(statuses.values()), f"{statuses}\n{processes.account()}"
        return read_result(processes, time.monotonic() - started, noticed_s)


def _follow_up(processes: Processes, struck: str, row: Row) -> float:
    """Wait for the fault, and do what is to follow it. Returns the seconds until another process told of it."""
    is_stop = row.signal == "SIGSTOP"
    _wait_for(processes.note.exists, "the fault", processes)
    if is_stop:
        _wait_for(lambda: processes.is_stopped(struck), "the process to stop", processes)
    else:
        _wait_for(lambda: processes.status(struck) is not None, "the process to die", processes)
    if row.then == "again":
        processes.start(struck, resume=struck == "server" and (processes.run_dir / "config.json").exists())
    _wait_for(lambda: _is_noticed(processes), "the others to notice", processes)
    noticed_s = time.time() - float(processes.note.read_text())
    if row.then == "continued":
        processes.send(struck, signal.SIGCONT)
    return noticed_s


def _wait_for(condition: Callable[[], bool], what: str, processes: Processes) -> None:
    deadline = time.monotonic() + ENDS_WITHIN_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}\n{processes.account()}"
        time.sleep(POLL_SECONDS)


def _is_noticed(processes: Processes) -> bool:
    """Whether another process has told of the fault: the server in its log, or a worker on its terminal."""
    log = processes.run_dir / "log.txt"
    told = log.read_text() if log.exists() else ""
    words = re.search(r"server: (?:lost worker 2|worker 2 could not join)", told)
    terminals = [processes.error_file(name).read_text() for name in ("worker 1", "worker 2")]
    return words is not None or any("the server is gone" in text for text in terminals)


def read_result(processes: Processes, seconds: float, noticed_s: float | None = None) -> Result:
    """What the run in the processes' folder ended with."""
    run_dir = processes.run_dir
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    with open(run_dir / "clients.csv", newline="") as file:
        scores = list(csv.reader(file))
    digest = json.loads((run_dir / "result.json").read_text())["model_sha256"]
    return Result(digest, [(line["phase"], line["round_number"]) for line in lines], scores, seconds, noticed_s)


FOLLOWS = {"again": "starts again", "others": "others go on", "continued": "continued"}
HEADER = "| process, doing | in | gets | then | noticed after | time lost | same model |\n|---|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose name contains TEXT (default: all)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page that takes in the table of all rows")
    parser.add_argument("network", nargs="*", metavar="-- FLAG", help="of the server and its workers")
    args = parser.parse_args()
    if args.write and args.rows:
        parser.error("--write takes all rows; leave --rows out")
    if args.write:
        split_page(args.write, NAME)  # before it takes minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves no process behind
    rows = [row for row in MATRIX if args.rows in row.name]
    load(load_everything)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = [run_undisturbed(folder / f"undisturbed {number}", network=args.network) for number in range(3)]
        normal_s = statistics.median(result.seconds for result in undisturbed)
        print(f"undisturbed: {normal_s:.1f} s from the first process to the last, start-up included\n\n{HEADER}")
        lines, summary = [], []
        for number, row in enumerate(rows):
            result = run_row(row, folder / str(number), network=args.network)
            lost_s, same = result.seconds - normal_s, is_same(result, undisturbed[0])
            lines.append(line_of(row, result, lost_s, same))
            print(lines[-1], flush=True)
            summary.append({"row": row.name, "noticed_s": result.noticed_s, "lost_s": lost_s, "same": same})
    print("\n" + in_short(rows, summary))
    print(json.dumps({"benchmark": "faults", "flags": args.network, "undisturbed_s": normal_s, "rows": summary}))
    if not all(entry["same"] for entry in summary):
        sys.exit("a fault changed the result")
    if args.write:
        said = f"The run takes {normal_s:.1f} s when nothing happens, start-up included (on commit {commit()})."
        write_into(args.write, NAME, [said, "", HEADER, *lines])


def line_of(row: Row, result: Result, lost_s: float, same: bool) -> str:
    when = "start" if row.round_number == 0 else f"{row.phase} {row.round_number}"
    assert result.noticed_s is not None, "a fault is noticed"
    measured = f"{result.noticed_s:.2f} s | {lost_s:.1f} s | {'yes' if same else 'NO'}"
    return f"| {row.point} | {when} | {row.signal} | {FOLLOWS[row.then]} | {measured} |"


def in_short(rows: list[Row], summary: list[dict[str, Any]]) -> str:
    """How many rows ended as they must, and what they cost: medians and maxima."""
    deaths, stops, lost = "a death is noticed after", "a stop is noticed after", "time lost"
    figures: dict[str, list[float]] = {deaths: [], stops: [], lost: []}
    for row, entry in zip(rows, summary, strict=True):
        figures[stops if row.signal == "SIGSTOP" else deaths].append(entry["noticed_s"])
        figures[lost].append(entry["lost_s"])
    said = [
        f"{what} {statistics.median(all_s):.2f} s (median), {max(all_s):.2f} s at most"
        for what, all_s in figures.items()
        if all_s
    ]
    return "; ".join([f"{sum(entry['same'] for entry in summary)} of {len(rows)} rows end with the same model", *said])


if __name__ == "__main__":
    main()
