"""A FedAvg round on MNIST, 20 clients a round: two one-thread workers against one process with one thread.

python benchmarks/round.py --data_root FOLDER

Real processes, started as a user starts them, in turn, several times. Prints for each the median seconds a round
and the largest resident memory of each process; then the ratio of the times, pair by pair. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import quick_start  # noqa: E402
import utils  # noqa: E402

POLL_SECONDS = 0.05
MEGABYTE = 1e6


@dataclass(frozen=True)
class Pair:
    """Seconds a round of both, and the largest resident memory of the server and of either worker, in MB."""

    single_s: float
    two_workers_s: float
    server_mb: float
    worker_mb: float

    @property
    def ratio(self) -> float:
        return self.two_workers_s / self.single_s


def main() -> None:
    args = parse_args()
    pairs = []
    for number in range(1, args.repeats + 1):
        single, single_memory = measure(args, single_process_commands)
        workers, memory = measure(args, two_worker_commands)
        pair = Pair(single, workers, memory["server"], max(memory["worker 1"], memory["worker 2"]))
        print(f"pair {number}: one process {1000 * single:.1f} ms a round, {memory_text(single_memory)}")
        print(f"        two workers {1000 * workers:.1f} ms a round, {memory_text(memory)}; ratio {pair.ratio:.3f}")
        pairs.append(pair)
    summary = {
        "benchmark": "round",
        "model": "mnist_cnn",
        "clients_a_round": args.client_num_per_round,
        "local_epochs": 5,
        "ratio_median": statistics.median(pair.ratio for pair in pairs),
        "single_s_median": statistics.median(pair.single_s for pair in pairs),
        "two_workers_s_median": statistics.median(pair.two_workers_s for pair in pairs),
        "server_mb_max": max(pair.server_mb for pair in pairs),
        "worker_mb_max": max(pair.worker_mb for pair in pairs),
    }
    print(json.dumps(summary))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, default=ROOT / "datasets" / "data", help="folder with MNIST")
    parser.add_argument(
        "--rounds", type=int, default=20, help="rounds of a run; the first is not counted (default: 20)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument("--client_num_per_round", type=int, default=20, help="clients a round (default: 20)")
    args = parser.parse_args()
    if not (args.data_root / "MNIST").is_dir():
        parser.error(f"there is no MNIST in --data_root {args.data_root}; name the folder that holds it")
    return args


def experiment_flags(args: argparse.Namespace, run_dir: Path) -> list[str]:
    flags = ["--dataset", "mnist", "--fine_tune", "false", "--epochs", str(args.rounds), "--eval_every", "1000000"]
    flags += ["--client_num_per_round", str(args.client_num_per_round), "--threads", "1", "--device", "cpu"]
    return [*flags, "--data_root", str(args.data_root), "--run_dir", str(run_dir)]


def single_process_commands(flags: list[str]) -> dict[str, list[str]]:
    return {"single process": [sys.executable, str(ROOT / "single_process.py"), *flags]}


def two_worker_commands(flags: list[str]) -> dict[str, list[str]]:
    args = utils.get_args("quick_start", [*flags, "--workers", "2"])
    return {name: command for name, command, _ in quick_start.commands(args)}


def measure(
    args: argparse.Namespace, commands: Callable[[list[str]], dict[str, list[str]]]
) -> tuple[float, dict[str, float]]:
    """Median seconds a round without the first, and the largest resident memory of each process in MB."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+") as output:
        run_dir = Path(folder) / "run"
        processes = {
            name: subprocess.Popen(command, stdout=output, stderr=output)
            for name, command in commands(experiment_flags(args, run_dir)).items()
        }
        try:
            peak = watch_memory(processes)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
        if not (run_dir / "result.json").exists():
            output.seek(0)
            sys.exit(f"a process failed:\n{output.read()}")
        rounds = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return statistics.median(record["seconds"] for record in rounds[1:]), peak


def watch_memory(processes: dict[str, subprocess.Popen[bytes]]) -> dict[str, float]:
    """The largest resident memory of each, in MB, until all have ended or one has failed."""
    peak = dict.fromkeys(processes, 0.0)
    while None in (statuses := [process.poll() for process in processes.values()]) and not any(statuses):
        for name, process in processes.items():
            try:
                peak[name] = max(peak[name], psutil.Process(process.pid).memory_info().rss / MEGABYTE)
            except psutil.NoSuchProcess:
                continue
        time.sleep(POLL_SECONDS)
    return peak


def memory_text(memory: dict[str, float]) -> str:
    return ", ".join(f"{name} {megabytes:.0f} MB" for name, megabytes in memory.items())


if __name__ == "__main__":
    main()
