"""A round over slow, lossy and long cables, and with a slow worker, beside what it would ideally take.

python benchmarks/networks.py [--rounds N] [--only TEXT | --write docs/performance.md]

A server and two workers, each on a host of its own: network namespaces on this machine (`lan.py`), so it needs root,
iproute2 and nftables. Packets are dropped at random where they come in; a long cable is a relay that holds each one.
The experiment is an MLP of 200,000 parameters on digits, 10 clients a round; beside a slow worker they train longer.

Prints a Markdown table: seconds a round, the median without the first; the ideal, and the ratio; the bytes that the
server sends and receives in a round. The ideal is a round's seconds without a limit, and on top, what the server's
cable takes for the bytes that go over it then, one after the other (on a slow line there are fewer, because workers
pack their sums), and four times the delay of a long cable: for the model, the word of the last client, the question
for the sum, and the sum. Beside a worker that runs a tenth of the time it is what one of that worker's own clients
takes, which no round has to be longer than. Every row must end with the same model. The last line is JSON. `--write
PAGE` puts the table and the commit into that page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from figures import figure, times  # noqa: E402
from lan import Lan, LongLan  # noqa: E402
from pages import commit, split_page, write_into  # noqa: E402

NAME = Path(__file__).name
COHORT = 10
EXPERIMENT = ["--dataset", "digits", "--model", "mlp", "--client_num_per_round", str(COHORT), "--eval_every", "1000000"]
EXPERIMENT += ["--fine_tune_method", "none", "--personalization_epochs", "1", "--trained_clients_scored", "0"]
SERVER, *WORKERS = ("alpha", "beta", "gamma")
MESSAGES = 4
"""That a round waits for one after the other: see the module's docstring."""
LONG_EPOCHS = 40
DUTY, PERIOD_SECONDS = 0.1, 0.1
"""Of a slow worker: the share of the time in which it runs."""
ENDS_WITHIN_SECONDS = 1800
HEADER = "| network | seconds a round | ideal | times the ideal | MB a round |\n|---|---:|---:|---:|---:|"


@dataclass(frozen=True)
class Row:
    """A network. megabits: a second, of each cable.  lost_percent: of packets.  delay_seconds: for each way."""

    name: str
    megabits: float | None = None
    lost_percent: int = 0
    delay_seconds: float = 0.0
    backend: str = "auto"
    epochs: int = 1
    has_slow_worker: bool = False


NO_LIMIT, LONG_CLIENTS = Row("no limit"), Row("no limit, clients that train longer", epochs=LONG_EPOCHS)
ROWS = [
    NO_LIMIT,
    Row("10 Mbit/s", 10),
    Row("1 % of packets lost", None, 1),
    Row("5 % of packets lost", None, 5),
    Row("10 Mbit/s, 1 % lost", 10, 1),
    Row("10 Mbit/s, 5 % lost", 10, 5),
    Row("delay of 100 ms, over gloo", delay_seconds=0.1, backend="gloo"),
    Row("delay of 100 ms, over `--port`", delay_seconds=0.1, backend="tcp"),
    LONG_CLIENTS,
    Row("the same, one of the two workers ten times slower", epochs=LONG_EPOCHS, has_slow_worker=True),
]


@dataclass(frozen=True)
class Result:
    """Of a run. bytes_per_round: that the server sent and received."""

    seconds_per_round: float
    bytes_per_round: float
    model_sha256: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of a run (default: 6)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows with this in their name (default: all)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page that takes in the table of all rows")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be 2 or more")
    if args.write and args.only:
        parser.error("--write takes all rows; leave --only out")
    if args.write:
        split_page(args.write, NAME)  # before it takes minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves nothing behind
    results: dict[Row, Result] = {}
    lines = []
    print(HEADER)
    for row in [row for row in ROWS if args.only in row.name or row in (NO_LIMIT, LONG_CLIENTS)]:
        result = results[row] = measure(row, args.rounds)
        base = results[LONG_CLIENTS if row.epochs == LONG_EPOCHS else NO_LIMIT]
        if result.model_sha256 != base.model_sha256:
            sys.exit(f"{row.name}: the model is another one")
        lines.append(line_of(row, result, ideal_seconds(row, base)))
        print(lines[-1], flush=True)
    summary = [{"row": row.name, **vars(result)} for row, result in results.items()]
    print(json.dumps({"benchmark": "networks", "rounds": args.rounds, "rows": summary}))
    if args.write:
        write_into(args.write, NAME, [f"On commit {commit()}:", "", HEADER, *lines])


def line_of(row: Row, result: Result, ideal: float) -> str:
    ratio = times(result.seconds_per_round / ideal)
    megabytes = figure(result.bytes_per_round / 1e6)
    return f"| {row.name} | {figure(result.seconds_per_round)} | {figure(ideal)} | {ratio} | {megabytes} |"


def ideal_seconds(row: Row, base: Result) -> float:
    """base: the result of the same experiment without a limit."""
    if row.has_slow_worker:
        seconds_per_client = base.seconds_per_round * len(WORKERS) / COHORT
        return seconds_per_client / DUTY
    seconds_sending = 0.0 if row.megabits is None else base.bytes_per_round * 8 / (row.megabits * 1e6)
    return base.seconds_per_round + seconds_sending + MESSAGES * row.delay_seconds


def measure(row: Row, rounds: int) -> Result:
    lan = LongLan(row.delay_seconds) if row.delay_seconds else Lan()
    with tempfile.TemporaryDirectory() as folder, lan:
        if row.megabits is not None:
            lan.slow_down(row.megabits)
        if row.lost_percent:
            lan.lose_packets(row.lost_percent)
        experiment = [*EXPERIMENT, "--rounds", str(rounds), "--local_epochs", str(row.epochs)]
        with contextlib.ExitStack() as stack:
            started = stack.enter_context(processes(lan, Path(folder), experiment, row.backend))
            if row.has_slow_worker:
                stack.enter_context(slowed(started[-1]))
            for process in started:
                if process.wait(ENDS_WITHIN_SECONDS):
                    sys.exit(f"{row.name} failed:\n{(Path(folder) / 'said').read_text()}")
        return read(Path(folder) / "run", rounds)


@contextlib.contextmanager
def processes(lan: Lan, folder: Path, experiment: list[str], backend: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A server and its workers, each on its host."""
    where = ["--ip", lan.address[SERVER], "--port", "3002", "--backend", backend]
    commands = {SERVER: ["server.py", "--world_size", "3", "--run_dir", str(folder / "run"), *experiment]}
    for rank, host in enumerate(WORKERS, 1):
        own = ["--rank", str(rank), "--threads", "1", "--device", "cpu", "--join_timeout_seconds", "120"]
        commands[host] = ["client_worker.py", *own]
    started: list[subprocess.Popen[bytes]] = []
    try:
        with open(folder / "said", "wb") as output:
            for host, words in commands.items():
                command = ["ip", "netns", "exec", lan.namespace(host), sys.executable, *words, *where]
                started.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


@contextlib.contextmanager
def slowed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let a process run for a tenth of the time."""
    over = threading.Event()

    def alternate() -> None:
        while not over.is_set():
            process.send_signal(signal.SIGSTOP)
            time.sleep(PERIOD_SECONDS * (1 - DUTY))
            process.send_signal(signal.SIGCONT)
            time.sleep(PERIOD_SECONDS * DUTY)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def read(run_dir: Path, rounds: int) -> Result:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    match = re.search(r"sent (\d+) bytes, received (\d+) bytes", (run_dir / "log.txt").read_text())
    assert match is not None, "a server that has ended well has logged it"
    scored_bytes = len(WORKERS) * (run_dir / "model.safetensors").stat().st_size  # which went out once more, at the end
    return Result(
        statistics.median(line["seconds"] for line in lines[1:]),
        (int(match[1]) + int(match[2]) - scored_bytes) / rounds,
        json.loads((run_dir / "result.json").read_text())["model_sha256"],
    )


if __name__ == "__main__":
    main()
