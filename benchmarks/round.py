"""A FedAvg round: this project against a plain PyTorch loop, FedLab's own processes, Flower's simulation and BlazeFL.

python benchmarks/round.py [--models emnist_cnn mnist_cnn] [--clients 4 20] [--rounds 3] [--repeats 2] [--only NAME ..]

All contestants train the same clients (100 random images each) with the same model for the same steps (E = 5, batches
of 20, SGD, no evaluation) and take the plain weighted mean; each is started anew as its user would start it. Those with
workers have two of one thread each and are compared with `ours, two workers`; those that train one client at a time are
compared with `ours, one process`, which has one thread too. They run in turn, several times, and the ratios are medians
over the pairs of one turn. Flower and BlazeFL get environments of their own, `benchmarks/.environments`, built on first
use from `rivals/requirements-*.txt`; where that fails, the table says why. With the defaults it takes 20 to 25 minutes
on two cores, without the building of the environments.

The columns, each the median over the turns:
  seconds a round      from the end of a round to the end of the next, everything between included; median over the
                       rounds without the first
  ours is faster       seconds a round, against ours in the same turn
  peak MB              largest sum over all processes of their proportional set size (a shared page counts once), by
                       looking every half second, after the first round so seldom that it takes 1 % of a core
  bytes a round        over the loopback interface (ours), or as the rival counts them; see `bytes_note` in the JSON
  first round after s  from the start of the first process to the begin of the first round
  first round s        what the first round takes, work included that a contestant puts off until then

Efficiency, from the same run: what a round of `ours, two workers` takes against half of its clients' bare training
time. The bare training time is the sum over the clients of the seconds that the only slot of `ours, one process` was
busy with them, median over the rounds without the first; the target is 1.05. As `round_to_half_of_own_training`, the
same against the training time within the two workers, which contains what the two cores take from each other.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import workload  # noqa: E402
from environments import EnvironmentMissingError, interpreter  # noqa: E402
from figures import figure, times  # noqa: E402
from watching import Watch, own_loopback_refused, watch  # noqa: E402

from perfedavg.machine.cores import usable_cores  # noqa: E402

NUM_WORKERS = 2
RUN_TIMEOUT_SECONDS = 1800
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    **dict.fromkeys(("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"), "0"),
}
OURS_ONE, OURS_TWO = "ours, one process", "ours, two workers"


@dataclass(frozen=True)
class Contestant:
    """name: in the tables.  reference: that of ours with which it is compared.  words: script and last arguments.
    environment: in which a rival runs, None for this project's."""

    name: str
    reference: str
    words: tuple[str, ...]
    environment: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.name in (OURS_ONE, OURS_TWO)


CONTESTANTS = [
    Contestant(OURS_TWO, OURS_TWO, ("quick_start.py", "--workers", str(NUM_WORKERS))),
    Contestant(OURS_ONE, OURS_TWO, ("single_process.py",)),
    Contestant("plain PyTorch loop", OURS_ONE, ("plain_loop.py",)),
    Contestant("FedLab, two processes", OURS_TWO, ("fedlab_processes.py",)),
    Contestant("Flower simulation, two actors", OURS_TWO, ("flower_simulation.py",), "flower"),
    Contestant("BlazeFL, one thread", OURS_ONE, ("blazefl_processes.py", "serial"), "blazefl"),
    Contestant("BlazeFL, two threads", OURS_TWO, ("blazefl_processes.py", "threads"), "blazefl"),
    Contestant("BlazeFL, two processes", OURS_TWO, ("blazefl_processes.py", "processes"), "blazefl"),
]


class FailedError(Exception):
    """A contestant did not do its work. The message is the reason, in one line."""


@dataclass(frozen=True)
class Run:
    """What one run of a contestant showed; the columns of the module's docstring.

    busy_s: ours only, slot-seconds of training in a round.  rss_mb: by script, the largest resident memory of each.
    """

    round_s: float
    peak_mb: float
    round_bytes: float | None
    bytes_note: str
    first_round_after_s: float
    first_round_s: float
    rss_mb: dict[str, float]
    busy_s: float | None = None


@dataclass(frozen=True)
class Case:
    """A group of rows: the same work for all of them."""

    model: str
    num_clients: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.num_clients} clients"


def main() -> None:
    args = parse_args()
    chosen = [contestant for contestant in CONTESTANTS if args.only is None or contestant.name in args.only]
    pythons, failures = find_pythons(chosen)
    refusal = own_loopback_refused()
    if refusal:
        print(f"bytes of ours are not known: {refusal}")
    cases = [Case(model, num_clients) for model in args.models for num_clients in args.clients]
    runs: dict[Case, dict[str, list[Run]]] = {case: {contestant.name: [] for contestant in chosen} for case in cases}
    broken: dict[Case, dict[str, str]] = {case: dict(failures) for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        paths = {case: write_workload(case, Path(folder)) for case in cases}
        for turn, case, contestant in turns(args.repeats, cases, chosen):
            if contestant.name in broken[case]:
                continue
            try:
                run = run_once(contestant, case, paths[case], args.rounds, pythons[contestant.name], refusal)
            except FailedError as error:
                broken[case][contestant.name] = str(error)
                print(f"{turn}. {case.name}: {contestant.name} failed: {error}", flush=True)
                continue
            runs[case][contestant.name].append(run)
            print(f"{turn}. {case.name}: {contestant.name} {run.round_s:.3f} s a round", flush=True)
    summaries = {case.name: summarize(chosen, runs[case], broken[case]) for case in cases}
    for name, summary in summaries.items():
        print(f"\n{table(name, summary)}")
    settings = {"rounds": args.rounds, "repeats": args.repeats, "cores": usable_cores()}
    print(json.dumps({"benchmark": "round", "workers": NUM_WORKERS, "local_epochs": 5, **settings, "cases": summaries}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [contestant.name for contestant in CONTESTANTS]
    add("--models", nargs="+", choices=workload.MODELS, default=list(workload.MODELS), help="(default: both)")
    add("--clients", nargs="+", type=int, default=[4, 20], metavar="N", help="multiples of 4 (default: 4 20)")
    add("--rounds", type=int, default=3, help="of a run; the first is not counted (default: 3)")
    add("--repeats", type=int, default=2, help="turns in which every contestant runs once (default: 2)")
    add("--only", nargs="+", choices=names, metavar="NAME", help=f"of {names} (default: all)")
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error(f"--rounds {args.rounds}: the first is not counted, and two must remain; give 3 or more")
    if any(number < 4 or number % 4 for number in args.clients):
        parser.error(f"--clients {args.clients}: each must be a multiple of 4, of which two workers get equal shares")
    return args


def find_pythons(chosen: list[Contestant]) -> tuple[dict[str, str], dict[str, str]]:
    """The interpreter of each contestant, and for those without one the reason, both by name."""
    pythons, failures = {}, {}
    for contestant in chosen:
        try:
            own = contestant.environment
            pythons[contestant.name] = sys.executable if own is None else str(interpreter(own))
        except EnvironmentMissingError as error:
            failures[contestant.name] = f"its environment cannot be built: {error}"
            print(f"{contestant.name}: {failures[contestant.name]}", flush=True)
    return pythons, failures


def write_workload(case: Case, parent: Path) -> Path:
    folder = parent / f"{case.model}-{case.num_clients}"
    folder.mkdir()
    return workload.write(case.model, case.num_clients, folder)


def turns(num_repeats: int, cases: list[Case], contestants: list[Contestant]) -> Iterator[tuple[int, Case, Contestant]]:
    """Every contestant of a case runs before any runs again, so that a pair has the same machine."""
    for turn in range(1, num_repeats + 1):
        for case in cases:
            for contestant in contestants:
                yield turn, case, contestant


def run_once(contestant: Contestant, case: Case, data: Path, num_rounds: int, python: str, refusal: str | None) -> Run:
    """Raises FailedError where the contestant fails."""
    command = [python, "-W", "ignore"]
    with (
        tempfile.TemporaryDirectory() as folder,
        open(f"{folder}/out", "w+") as out,
        open(f"{folder}/err", "w+") as err,
    ):
        run_dir = Path(folder) / "run"
        script, *options = contestant.words
        if contestant.is_ours:
            command += [
                str(ROOT / script),
                *workload.experiment_flags(case.model, case.num_clients, num_rounds, data.parent),
            ]
            command += [*options, "--threads", "1", "--run_dir", str(run_dir)]
        else:
            command += [str(HERE / "rivals" / script), str(data), str(num_rounds), str(NUM_WORKERS), *options]
        rounds_file = run_dir / "metrics.jsonl" if contestant.is_ours else Path(folder) / "rounds"
        environment = {**ENVIRONMENT, "ROUNDS_FILE": str(rounds_file)}
        seen = watch(command, environment, out, err, refusal is None, rounds_file, RUN_TIMEOUT_SECONDS)
        if seen.status != 0:
            err.seek(0)
            last = [line for line in err.read().splitlines() if line.strip()][-1:]
            how = f"not ended in {RUN_TIMEOUT_SECONDS} s" if seen.status is None else f"status {seen.status}"
            raise FailedError(f"{how}: {' '.join(last)[-300:]}")
        if contestant.is_ours:
            return read_ours(seen, run_dir, num_rounds, refusal)
        out.seek(0)
        return read_rival(seen, json.loads(out.read().splitlines()[-1]))


def read_rival(seen: Watch, answer: dict[str, Any]) -> Run:
    return describe(seen, answer["began"], answer["ended"], answer["round_bytes"], answer["bytes_note"])


def read_ours(seen: Watch, run_dir: Path, num_rounds: int, refusal: str | None) -> Run:
    """A round has ended when its line of the metrics has been written. Traffic is counted between the middles of
    rounds, when there is none but signs of life."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    ended = seen.written
    if len(ended) != num_rounds:
        raise FailedError(
            f"{len(ended)} of {num_rounds} rounds were seen to end; they are too short for this benchmark"
        )
    middles = [end - record["seconds"] / 2 for end, record in zip(ended, records, strict=True)]
    traffic = seen.bytes_until(middles[-1]) - seen.bytes_until(middles[0])
    round_bytes = None if refusal else traffic / (num_rounds - 1)
    busy = statistics.median((1 - record["idle_share"]) * record["seconds"] for record in records[1:])
    num_slots = json.loads((run_dir / "config.json").read_text())["run"]["world_size"] - 1 or 1
    note = refusal or "all bytes on the loopback interface"
    return describe(seen, first_round_began(run_dir), ended, round_bytes, note, busy * num_slots)


def first_round_began(run_dir: Path) -> float:
    """Unix time, from the line of the log that says that FedAvg begins."""
    match = re.search(r"^(\S+ \S+),(\d+) INFO FedAvg: \d+ rounds, 0 ", (run_dir / "log.txt").read_text(), re.MULTILINE)
    assert match is not None, "the log says when a phase begins"
    return datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(match[2]) / 1000


def describe(
    seen: Watch, began: float, ended: list[float], round_bytes: float | None, note: str, busy_s: float | None = None
) -> Run:
    round_s = statistics.median(after - before for before, after in itertools.pairwise(ended))
    return Run(round_s, seen.peak_mb, round_bytes, note, began - seen.started, ended[0] - began, seen.rss_mb, busy_s)


def summarize(
    contestants: list[Contestant], runs: dict[str, list[Run]], broken: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """For JSON: the columns of each contestant, or why it has none; and the efficiency of two workers."""
    summary: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        own, references = runs[contestant.name], runs.get(contestant.reference, [])
        if contestant.name in broken:
            summary[contestant.name] = {"failed": broken[contestant.name]}
            continue
        ratios = [run.round_s / reference.round_s for run, reference in zip(own, references, strict=False)]
        summary[contestant.name] = {
            "round_s": median_of(own, lambda run: run.round_s),
            "ours_is_faster": round(statistics.median(ratios), 3) if ratios else None,
            "compared_with": contestant.reference,
            "peak_mb": median_of(own, lambda run: run.peak_mb),
            "bytes_a_round": median_of(own, lambda run: run.round_bytes),
            "bytes_note": own[0].bytes_note,
            "first_round_after_s": median_of(own, lambda run: run.first_round_after_s),
            "first_round_s": median_of(own, lambda run: run.first_round_s),
            "largest_rss_mb": {script: round(megabytes, 1) for script, megabytes in largest_rss(own).items()},
        }
    pairs = list(zip(runs.get(OURS_TWO, []), runs.get(OURS_ONE, []), strict=False))
    if pairs and OURS_TWO not in broken and OURS_ONE not in broken:
        summary["efficiency"] = {
            "bare_training_s": median_of([one for _, one in pairs], lambda run: run.busy_s),
            "round_to_half_of_bare_training": round(
                statistics.median(two.round_s / ((one.busy_s or 0) / NUM_WORKERS) for two, one in pairs), 4
            ),
            "round_to_half_of_own_training": round(
                statistics.median(two.round_s / ((two.busy_s or 0) / NUM_WORKERS) for two, _ in pairs), 4
            ),
        }
    return summary


def largest_rss(runs: list[Run]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for run in runs:
        for script, megabytes in run.rss_mb.items():
            largest[script] = max(megabytes, largest.get(script, 0.0))
    return {script: megabytes for script, megabytes in largest.items() if megabytes}


def median_of(runs: list[Run], value: Callable[[Run], float | None]) -> float | None:
    values = [found for run in runs if (found := value(run)) is not None]
    return round(statistics.median(values), 4) if values else None


def table(name: str, summary: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    columns = ["seconds a round", "ours is faster", "peak MB", "bytes a round", "first round after s", "first round s"]
    lines = [f"| {name} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for contestant, values in summary.items():
        if contestant == "efficiency":
            continue
        if "failed" in values:
            lines.append(f"| {contestant} | {values['failed']} | | | | | |")
            continue
        size = values["bytes_a_round"]
        cells = [
            figure(values["round_s"]),
            "" if values["ours_is_faster"] is None else times(values["ours_is_faster"]),
            figure(values["peak_mb"]),
            f"none known: {values['bytes_note']}" if size is None else f"{size:,.0f}",
            figure(values["first_round_after_s"]),
            figure(values["first_round_s"]),
        ]
        lines.append(f"| {contestant} | {' | '.join(cells)} |")
    efficiency = summary.get("efficiency")
    if efficiency:
        lines.append(
            f"\nThese clients train for {figure(efficiency['bare_training_s'])} s in one process. The round of two "
            f"workers took {figure(efficiency['round_to_half_of_bare_training'])} times half of that; of half of the "
            f"time that they trained in the two workers themselves, it was "
            f"{figure(efficiency['round_to_half_of_own_training'])} times."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
