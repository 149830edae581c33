"""What a server costs: against clients in total, clients a round, workers, parameters, methods and clients' states.

python benchmarks/scale.py [--only clients cohort workers parameters method keeping] [--rounds N] [--repeats N]

One of them is varied at a time. The methods are one that keeps nothing (fedavg), one that keeps the last layer of each
client (fedper) and one that keeps a whole model (ditto), with 20 clients, so that all soon keep something. `keeping` is
the number of clients that have trained with ditto, 50 a round, when it ends: each has a file then, which the server's
memory must not grow with.

Real processes, `server.py` and `client_worker.py` as a user starts them, on this machine. Clients are synthetic writers
with 25 examples or so that take one local step, and only one of them is unseen, so that the server's share is as large
as can be. The model is an MLP with one hidden layer, as wide as its number of parameters asks for. Both come in by
`--dataset package.module:factory`, as a user's own would: this file's `SmallWriters`.

Prints a Markdown table for each axis. Listening: seconds from the server's start until it listens. Set-up CPU: its
processor time until the first round, the workers' joining included. CPU and wall a round: from the end of the first
round to the end of the last but one (scoring comes before the end of the last), checkpoints included. Memory: the
server's largest resident memory until then. Sent, received: tensors and messages of a round, all workers together.
States: files of what clients keep, at the end. In brackets: the ratio to the base, which is a row of each table (of
`method` and `keeping`, the first) and measured once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # also where a server imports it for its data set

from figures import figure, times  # noqa: E402
from torch import nn  # noqa: E402

from datasets.clients.split import SplitDataset  # noqa: E402
from datasets.sources.synthetic_writers import IMAGE_SIDE, SyntheticWriters  # noqa: E402
from perfedavg.machine.cores import usable_cores  # noqa: E402
from perfedavg.machine.processes import hold_free_port  # noqa: E402

POLL_SECONDS = 0.01
ENDS_WITHIN_SECONDS = 1800
"""What is waited for in a run: its first round, its counted rounds, its end."""
MEGABYTE = 1e6
HIDDEN_UNITS = "PERFEDAVG_BENCHMARK_HIDDEN_UNITS"
"""Environment variable by which the server and the workers of a run learn the width of the model."""


@dataclass(frozen=True)
class Point:
    """The size of a run. clients: in total.  cohort: clients a round.  parameters: roughly, of the model.

    rounds: that are counted; None for those that were asked for.
    """

    clients: int = 10_000
    cohort: int = 10
    workers: int = 2
    parameters: int = 1_000_000
    method: str = "fedavg"
    rounds: int | None = None


BASE = Point()
UNCOUNTED_ROUNDS = 2
"""Of a run, its first and its last."""
AXES: dict[str, tuple[int | str, ...]] = {
    "clients": (100, 1_000, 10_000, 100_000, 1_000_000),
    "cohort": (5, 10, 100, 1_000),
    "workers": (1, 2, 4, 8),
    "parameters": (100_000, 1_000_000, 3_300_000, 25_000_000),
    "method": ("fedavg", "fedper", "ditto"),
    "keeping": (250, 500, 1_000, 2_000),
}
"""The values of each field of a point, that of BASE among them; of `method` and `keeping`, see `point_of`."""


def point_of(axis: str, value: int | str) -> Point:
    if axis == "method":
        return Point(clients=20, method=str(value))  # so that clients which have trained train again
    if axis != "keeping":
        varied: dict[str, Any] = {axis: value}
        return dataclasses.replace(BASE, **varied)
    cohort = 50
    return Point(cohort=cohort, parameters=100_000, method="ditto", rounds=int(value) // cohort - UNCOUNTED_ROUNDS)


def base_of(axis: str) -> Point:
    return point_of(axis, AXES[axis][0]) if axis in ("method", "keeping") else BASE


TITLES = {
    "clients": "clients in total",
    "cohort": "clients a round",
    "workers": "workers",
    "parameters": "parameters",
    "method": "method",
    "keeping": "clients that keep a model",
}


@dataclass(frozen=True)
class Cost:
    """What a run cost its server; see the module's docstring. Times in seconds."""

    listening_s: float
    setup_cpu_s: float
    round_cpu_s: float
    round_wall_s: float
    memory_mb: float
    sent_mb: float
    received_mb: float
    states_mb: float


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "listening_s": ("listening", lambda value: f"{figure(value)} s"),
    "setup_cpu_s": ("set-up CPU", lambda value: f"{figure(value)} s"),
    "round_cpu_s": ("CPU a round", lambda value: f"{figure(1000 * value)} ms"),
    "round_wall_s": ("wall a round", lambda value: f"{figure(1000 * value)} ms"),
    "memory_mb": ("memory", lambda value: f"{figure(value)} MB"),
    "sent_mb": ("sent a round", lambda value: f"{value:.2f} MB"),
    "received_mb": ("received a round", lambda value: f"{value:.2f} MB"),
    "states_mb": ("states", lambda value: f"{figure(value)} MB" if value else "none"),
}
"""Heading and text of each field of a cost."""


class SmallWriters(SplitDataset):
    """Synthetic writers with as few examples as they may have, all but one to train on, and an MLP to train."""

    def __init__(self, data_root: Path, num_clients: int, seed: int) -> None:
        writers = SyntheticWriters(num_clients, seed, mean_num_examples=20)
        super().__init__("small writers", writers, num_clients - 1, 1, seed)

    def build_model(self) -> nn.Module:
        width = int(os.environ[HIDDEN_UNITS])
        return nn.Sequential(
            nn.Flatten(), nn.Linear(IMAGE_SIDE**2, width), nn.ReLU(), nn.Linear(width, self.num_classes)
        )


def hidden_units(parameters: int) -> int:
    """The width at which the model of `SmallWriters` has about so many parameters."""
    num_classes = SyntheticWriters.num_classes
    return round((parameters - num_classes) / (IMAGE_SIDE**2 + 1 + num_classes))


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves no process behind
    points = [point_of(axis, value) for axis in args.only for value in AXES[axis]]
    points = list(dict.fromkeys(points))
    measured: dict[Point, list[Cost]] = {point: [] for point in points}
    for repeat in range(args.repeats):
        for point in points:
            print(f"{repeat + 1} of {args.repeats}: {point}", file=sys.stderr, flush=True)
            measured[point].append(measure(point, point.rounds or args.rounds))
    costs = {point: median_cost(measured[point]) for point in points}
    for axis in args.only:
        print_table(axis, costs)
    axes = {axis: [summary(axis, value, costs) for value in AXES[axis]] for axis in args.only}
    settings = {"cores": usable_cores(), "rounds": args.rounds, "repeats": args.repeats}
    print(json.dumps({"benchmark": "scale", **settings, "base": dataclasses.asdict(BASE), "axes": axes}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES), help="axes to vary (default: all)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=10,
        help="rounds of a run that are counted; each tenth saves a checkpoint (default: 10)",
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs a row, of which the medians count (default: 1)")
    args = parser.parse_args()
    if args.rounds < 1 or args.repeats < 1:
        parser.error("--rounds and --repeats must be 1 or more")
    return args


def measure(point: Point, rounds: int) -> Cost:
    """Run a server with its workers, and account for the server. rounds: that are counted."""
    with tempfile.TemporaryDirectory() as folder, Run(Path(folder), point, rounds + UNCOUNTED_ROUNDS) as run:
        run.start_server()
        run.wait_for(lambda: "listening on" in run.said("server"))
        listening_s = time.monotonic() - run.started
        run.start_workers()
        run.wait_for(lambda: "INFO FedAvg: " in run.log)
        setup_cpu_s = run.cpu_seconds
        run.wait_for(lambda: run.num_rounds >= 1)
        first, first_s, first_cpu_s = run.num_rounds, time.monotonic(), run.cpu_seconds
        run.wait_for(lambda: run.num_rounds >= rounds + 1)
        counted = run.num_rounds - first
        wall_s, cpu_s, memory_mb = time.monotonic() - first_s, run.cpu_seconds - first_cpu_s, run.peak_memory_mb
        run.wait_for(lambda: run.has_ended)
        (sent_mb, received_mb), states_mb = run.traffic_mb, run.states_mb
    return Cost(
        listening_s,
        setup_cpu_s,
        cpu_s / counted,
        wall_s / counted,
        memory_mb,
        sent_mb / (rounds + UNCOUNTED_ROUNDS),
        received_mb / (rounds + UNCOUNTED_ROUNDS),
        states_mb,
    )


class Run:
    """The processes of one run. Leaving the block ends those that have not ended.

    num_rounds_in_all: those that the run is to have.  started: of the server, on the clock of `time.monotonic`.
    """

    def __init__(self, folder: Path, point: Point, num_rounds_in_all: int) -> None:
        self._folder = folder
        self._point = point
        self._num_rounds_in_all = num_rounds_in_all
        self._held, port = hold_free_port()
        self._address = ["--port", str(port)]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.started = 0.0

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._held.close()

    def start_server(self) -> None:
        flags = {
            "dataset": "benchmarks.scale:SmallWriters",
            "client_num_in_total": self._point.clients,
            "client_num_per_round": self._point.cohort,
            "world_size": self._point.workers + 1,
            "rounds": self._num_rounds_in_all,
            "local_epochs": 1,
            "batch_size": 400,  # one step
            "personalization_epochs": 1,
            "eval_every": 1_000_000,
            "fine_tune_method": "none",
            "method": self._point.method,
            "run_dir": self._run_dir,
        }
        self.started = time.monotonic()
        self._start(
            "server", ["server.py", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
        )

    def start_workers(self) -> None:
        for rank in range(1, self._point.workers + 1):
            words = ["client_worker.py", "--rank", str(rank), "--threads", "1", "--device", "cpu"]
            self._start(f"worker {rank}", words)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Ends the benchmark, with what the processes said, where one fails or it takes too long."""
        deadline = time.monotonic() + ENDS_WITHIN_SECONDS
        while not condition():
            statuses = {name: process.poll() for name, process in self._processes.items()}
            if any(statuses.values()) or time.monotonic() > deadline:
                account = "\n".join(f"--- {name}\n{self.said(name)}" for name in self._processes)
                sys.exit(f"{self._point} failed ({statuses}):\n{account}")
            time.sleep(POLL_SECONDS)

    def said(self, name: str) -> str:
        """What a process printed so far."""
        return (self._folder / name).read_text(errors="replace")

    @property
    def log(self) -> str:
        return self._read("log.txt")

    @property
    def num_rounds(self) -> int:
        """Rounds that have ended."""
        return self._read("metrics.jsonl").count("\n")

    @property
    def has_ended(self) -> bool:
        return all(process.poll() == 0 for process in self._processes.values())

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the server so far."""
        times = psutil.Process(self._processes["server"].pid).cpu_times()
        return float(times.user + times.system)

    @property
    def peak_memory_mb(self) -> float:
        """Largest resident memory of the server so far."""
        status = Path(f"/proc/{self._processes['server'].pid}/status").read_text()
        match = re.search(r"VmHWM:\s*(\d+) kB", status)
        assert match is not None, "Linux says it of every process"
        return int(match[1]) * 1024 / MEGABYTE

    @property
    def traffic_mb(self) -> tuple[float, float]:
        """What the server sent in all, less the model that a worker got for the last scoring, and what it received."""
        match = re.search(r"sent (\d+) bytes, received (\d+) bytes", self.log)
        assert match is not None, "a server that has ended well has logged it"
        model_size = (self._run_dir / "model.safetensors").stat().st_size
        return (int(match[1]) - model_size) / MEGABYTE, int(match[2]) / MEGABYTE

    @property
    def states_mb(self) -> float:
        """Of the files of what clients keep."""
        return sum(file.stat().st_size for file in self._run_dir.glob("client_states/*")) / MEGABYTE

    @property
    def _run_dir(self) -> Path:
        return self._folder / "run"

    def _read(self, name: str) -> str:
        """A file of the run's folder, as far as it is written."""
        with contextlib.suppress(FileNotFoundError):
            return (self._run_dir / name).read_text()
        return ""

    def _start(self, name: str, words: list[str]) -> None:
        environment = {**os.environ, HIDDEN_UNITS: str(hidden_units(self._point.parameters))}
        with open(self._folder / name, "wb") as output:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *words, *self._address], cwd=ROOT, env=environment, stdout=output, stderr=output
            )


def median_cost(costs: list[Cost]) -> Cost:
    return Cost(**{name: statistics.median(getattr(cost, name) for cost in costs) for name in COLUMNS})


def ratios(cost: Cost, base: Cost) -> dict[str, float]:
    """By column; without one that is 0 in the base."""
    return {name: getattr(cost, name) / getattr(base, name) for name in COLUMNS if getattr(base, name)}


def print_table(axis: str, costs: dict[Point, Cost]) -> None:
    base = base_of(axis)
    sizes = ("clients", "cohort", "workers", "parameters")
    fixed = ", ".join(f"{getattr(base, name):,} {TITLES[name]}" for name in sizes if name != axis)
    fixed += "" if axis == "method" else f", {base.method}"
    print(f"\n{fixed}:\n")
    print(f"| {TITLES[axis]} | {' | '.join(heading for heading, _ in COLUMNS.values())} |")
    print(f"|{'---:|' * (1 + len(COLUMNS))}")
    for value in AXES[axis]:
        cost = costs[point_of(axis, value)]
        ratio = ratios(cost, costs[base])
        cells = [
            f"{text(getattr(cost, name))}{f' ({times(ratio[name])})' if name in ratio else ''}"
            for name, (_, text) in COLUMNS.items()
        ]
        print(f"| {value if isinstance(value, str) else f'{value:,}'} | {' | '.join(cells)} |", flush=True)


def summary(axis: str, value: int | str, costs: dict[Point, Cost]) -> dict[str, object]:
    """A row for the JSON object."""
    cost = costs[point_of(axis, value)]
    numbers = {name: round(number, 4) for name, number in dataclasses.asdict(cost).items()}
    return {
        axis: value,
        **numbers,
        "ratios": {name: round(r, 3) for name, r in ratios(cost, costs[base_of(axis)]).items()},
    }


if __name__ == "__main__":
    main()
