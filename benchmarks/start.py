"""How soon a run begins, and what its processes take, against the machine's own `import torch` and against rivals.

python benchmarks/start.py [--repeats 5] [--only NAME ..]

Prints, each a median over the turns, in which everything runs once:
  the seconds of `python -c "import torch"`
  the seconds from the command `sh quick_start.sh --dataset digits` to its first round, and their ratio to the former
  for this project's server and two workers, and for every contestant of `round.py` that has workers or threads, on the
  MNIST network with 4 clients: the seconds to the first round; the same and what the first round takes longer than the
  others, which is what a contestant loads only then, and the ratio to `import torch`; and the peak memory (the
  proportional set size, summed over all processes; a page that n processes share counts 1/n for each). Of ours also
  without the launcher, which only waits.

BlazeFL and Flower get environments of their own, as `round.py` says. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import psutil  # noqa: E402
import round as rounds  # noqa: E402
import workload  # noqa: E402

POLL_SECONDS = 0.01
RUN_SECONDS = 120
CASE = rounds.Case("mnist_cnn", 4)
NUM_ROUNDS = 3
MEMORY_LIMIT = 1.15
"""Of BlazeFL's two processes: what server and workers may take."""
START_LIMIT = 1.3
"""Of `import torch`: when the first round of the digits should have begun."""
PROCESSES = "BlazeFL, two processes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [entry for entry in rounds.CONTESTANTS if entry.name not in (rounds.OURS_ONE, "plain PyTorch loop")]
    names = [entry.name for entry in known]
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {names} (default: all)")
    args = parser.parse_args()
    chosen = [entry for entry in known if args.only is None or entry.name in args.only]
    pythons, failures = rounds.find_pythons(chosen)
    imports: list[float] = []
    digits: list[float] = []
    ours_mb: list[float] = []
    runs: dict[str, list[rounds.Run]] = {entry.name: [] for entry in chosen}
    with tempfile.TemporaryDirectory() as name:
        data = rounds.write_workload(CASE, Path(name))
        for turn in range(args.repeats):
            imports.append(seconds_of_import())
            digits.append(seconds_to_first_round(Path(name) / f"digits {turn}"))
            ours_mb.append(memory_of_ours(Path(name) / f"memory {turn}", data.parent))
            for contestant in chosen:
                if contestant.name in failures:
                    continue
                try:
                    python = pythons[contestant.name]
                    runs[contestant.name].append(
                        rounds.run_once(contestant, CASE, data, NUM_ROUNDS, python, "the bytes are not asked for")
                    )
                except rounds.FailedError as error:
                    failures[contestant.name] = str(error)
            print(f"turn {turn + 1}: import torch {imports[-1]:.2f} s, first round {digits[-1]:.2f} s", flush=True)
    show(statistics.median(imports), statistics.median(digits), statistics.median(ours_mb), runs, failures)


def seconds_of_import() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-W", "ignore", "-c", "import torch"], check=True)
    return time.monotonic() - began


def seconds_to_first_round(run_dir: Path) -> float:
    """From the command to the line of the log that says that FedAvg begins."""
    began = time.time()
    command = ["sh", str(ROOT / "quick_start.sh"), "--dataset", "digits", "--run_dir", str(run_dir)]
    with running(command):
        wait_for_text(run_dir / "log.txt", "INFO FedAvg: ")
    return rounds.first_round_began(run_dir) - began


def memory_of_ours(run_dir: Path, data: Path) -> float:
    """Megabytes of the server and two workers together, after the first round of the case."""
    flags = workload.experiment_flags(CASE.model, CASE.num_clients, 1000, data)
    command = [sys.executable, "-W", "ignore", str(ROOT / "quick_start.py"), *flags, "--threads", "1"]
    with running([*command, "--run_dir", str(run_dir)]) as process:
        wait_for_text(run_dir / "metrics.jsonl", "\n")
        children = psutil.Process(process.pid).children()
        assert len(children) == 1 + rounds.NUM_WORKERS, children
        return float(sum(child.memory_full_info().pss for child in children)) / 1e6


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a command, which is ended when the block is left."""
    environment = {**os.environ, **rounds.ENVIRONMENT}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_for_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not path.exists() or text not in path.read_text():
        if time.monotonic() > deadline:
            raise SystemExit(f"{text!r} never came in {path}")
        time.sleep(POLL_SECONDS)


def show(
    import_s: float, digits_s: float, ours_mb: float, runs: dict[str, list[rounds.Run]], failures: dict[str, str]
) -> None:
    """The table, and the last line."""
    summary: dict[str, Any] = {}
    print(f"\nimport torch: {import_s:.2f} s")
    print(f"first round of sh quick_start.sh --dataset digits: {digits_s:.2f} s, {digits_s / import_s:.2f} of it")
    print("\n| mnist_cnn, 4 clients | first round after s | all loaded after s | of import torch | peak MB |")
    print("|---|---|---|---|---|")
    for name, own in runs.items():
        if not own:
            print(f"| {name} | {failures.get(name, 'not run')} | | | |")
            continue
        after_s = statistics.median(run.first_round_after_s for run in own)
        loaded_s = statistics.median(run.first_round_after_s + max(0.0, run.first_round_s - run.round_s) for run in own)
        peak_mb = statistics.median(run.peak_mb for run in own)
        summary[name] = {
            "first_round_after_s": after_s,
            "loaded_after_s": loaded_s,
            "of_import": loaded_s / import_s,
            "peak_mb": peak_mb,
        }
        print(f"| {name} | {after_s:.2f} | {loaded_s:.2f} | {loaded_s / import_s:.2f} | {peak_mb:.0f} |")
    print(f"\nserver and two workers, without the launcher: {ours_mb:.0f} MB")
    aims = {f"digits within {START_LIMIT} of import torch": digits_s <= START_LIMIT * import_s}
    ours = summary.get(rounds.OURS_TWO)
    if ours:
        others = [entry for name, entry in summary.items() if name != rounds.OURS_TWO]
        for measure, words in (("first_round_after_s", "first round"), ("loaded_after_s", "all loaded")):
            aims[f"{words} sooner than every other"] = all(ours[measure] < other[measure] for other in others)
    if PROCESSES in summary:
        aims[f"at most {MEMORY_LIMIT} of the memory of {PROCESSES}"] = (
            ours_mb <= MEMORY_LIMIT * summary[PROCESSES]["peak_mb"]
        )
    for aim, is_reached in aims.items():
        print(f"{'reached' if is_reached else 'missed'}: {aim}")
    facts = {"import_s": import_s, "digits_s": digits_s, "server_and_workers_mb": ours_mb, "aims": aims}
    print(json.dumps({"benchmark": "start", **facts, "contestants": summary, "failures": failures}))


if __name__ == "__main__":
    main()
