"""The soak: random faults on real runs, for as long as is asked for; every end must be that of an undisturbed run.

python benchmarks/soak.py [--minutes N] [--seed N] [-- FLAGS of server and workers]

The flags may be --backend tcp or --keys FOLDER, which send everything over the server's port.

Runs a server and two workers on digits, again and again (the experiment of `faults.py`). All the while one thing after
another happens to them: workers and server are killed, stopped and continued, or asked to end, and come back; strangers
knock on the port, and one joins as a worker and says nonsense. What happens, to whom and after which pause follows from
the seed; how far the run is by then does not. Prints what it did and what became of it, a line a run; the last line is
JSON. Ends with status 1 where a run did not end with the model, the metrics and the scores of the undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from faults import (  # noqa: E402
    ENDS_WITHIN_SECONDS,
    POLL_SECONDS,
    SILENCE_SECONDS,
    Launch,
    Processes,
    Result,
    is_same,
    processes_in,
    read_result,
    run_undisturbed,
)

from multi_process.transport.control import PROTOCOL_VERSION, ControlConnection, ProtocolError  # noqa: E402
from multi_process.transport.handshake import JoinRequest, receive_hello  # noqa: E402
from multi_process.transport.keys import tls_context  # noqa: E402
from multi_process.transport.wire import Wire  # noqa: E402
from perfedavg.machine.forking import ForkedProcess, load  # noqa: E402
from quick_start import load_everything  # noqa: E402

SERVER, WORKERS = "server", ("worker 1", "worker 2")
STRANGER = "stranger"
WORKER_ACTIONS = ("SIGKILL", "SIGTERM", "SIGSTOP")
STRANGER_ACTIONS = ("garbage", "half a line", "reset", "nonsense as a worker")
MAX_PAUSE_SECONDS = 4.0
MEMBERS_RANK = 99
"""Of the stranger that joins as a worker."""
GIVEN_UP_STATUSES = (0, 2, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Of a worker that came when the run was over: it found its end, or no server any more."""


@dataclass(frozen=True)
class Event:
    """pause_seconds: after the one before.  away_seconds: until a killed process is started again, or a stopped one
    goes on."""

    pause_seconds: float
    target: str
    action: str
    away_seconds: float = 0.0


def events(seed: int) -> Iterator[Event]:
    """What happens, without end. The same for the same seed."""
    generator = random.Random(seed)
    while True:
        pause = generator.uniform(0.2, MAX_PAUSE_SECONDS)
        target = generator.choices([*WORKERS, SERVER, STRANGER], weights=[3, 3, 2, 2])[0]
        if target == STRANGER:
            yield Event(pause, target, generator.choice(STRANGER_ACTIONS))
            continue
        action = generator.choice(WORKER_ACTIONS)
        # A stop may be over before it is noticed, or be taken for a death.
        longest = 2 * SILENCE_SECONDS if action == "SIGSTOP" else 1.0
        yield Event(pause, target, action, generator.uniform(0.0, longest))


def run_disturbed(
    folder: Path,
    happening: Iterator[Event],
    done: Counter[str],
    launch: Launch = ForkedProcess,
    network: Sequence[str] = (),
) -> Result:
    """One run, disturbed until its server has ended or nothing more happens. Counts in `done` what was done.

    network: flags of the server and of each worker.

    Raises AssertionError, with what the processes said, where a process does not end as it should.
    """
    with processes_in(folder, launch, network=network) as processes:
        started = time.monotonic()
        for name in (SERVER, *WORKERS):
            processes.start(name)
        while not _is_over(processes):
            assert time.monotonic() - started < 4 * ENDS_WITHIN_SECONDS, f"no end\n{processes.account()}"
            event = next(happening, None)
            if event is None:
                break
            _pause(processes, event.pause_seconds)
            if not _is_over(processes) and _strike(processes, event, network):
                done[f"{event.target.split()[0]} {event.action}"] += 1
        try:
            statuses = processes.wait_until_ended([SERVER, *WORKERS])
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{error}\n{processes.account()}") from error
        assert _is_over(processes)
        assert all(statuses[name] in GIVEN_UP_STATUSES for name in WORKERS), f"{statuses}\n{processes.account()}"
        assert "Traceback" not in processes.account(), processes.account()
        return read_result(processes, time.monotonic() - started)


def _is_over(processes: Processes) -> bool:
    """Whether the server has ended with its results. Raises AssertionError where it has ended with less."""
    status = processes.status(SERVER)
    if status is None:
        return False
    assert (processes.run_dir / "result.json").exists(), f"status {status}\n{processes.account()}"
    return True


def _pause(processes: Processes, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and processes.status(SERVER) is None:
        time.sleep(POLL_SECONDS)


def _strike(processes: Processes, event: Event, network: Sequence[str]) -> bool:
    """Let it happen. False where its target has ended already."""
    if event.target == STRANGER:
        with contextlib.suppress(OSError, ProtocolError):
            _knock(processes.port, event.action, network)
        return True
    if processes.status(event.target) is not None:
        return False
    processes.send(event.target, signal.Signals[event.action])
    if event.action == "SIGSTOP":
        time.sleep(event.away_seconds)
        processes.send(event.target, signal.SIGCONT)
        return True
    processes.wait_until_ended([event.target])
    if event.target == SERVER and (processes.run_dir / "result.json").exists():
        return True
    _pause(processes, event.away_seconds)
    processes.start(event.target, resume=event.target == SERVER and (processes.run_dir / "config.json").exists())
    return True


def _knock(port: int, action: str, network: Sequence[str]) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        if action == "garbage":
            connection.sendall(random.Random(0).randbytes(10_000))
        elif action == "half a line":
            connection.sendall(b'{"protocol": ')
        elif action == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        else:
            keys = Path(network[network.index("--keys") + 1]) if "--keys" in network else None
            control = ControlConnection(Wire(connection, None if keys is None else tls_context(keys, is_server=False)))
            with contextlib.closing(control):  # with keys the connection is another object's now
                control.begin(5)
                receive_hello(control)
                control.send(**asdict(JoinRequest(PROTOCOL_VERSION, "0" * 64, MEMBERS_RANK, "", "")))
                control.receive(5)
                control.send(word="GroupTrained", values={"first": -1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="how long to begin new runs (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens (default: 0)")
    parser.add_argument("network", nargs="*", metavar="-- FLAG", help="of the server and its workers")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves no process behind
    done: Counter[str] = Counter()
    outcomes: list[bool] = []
    happening = events(args.seed)
    load(load_everything)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = run_undisturbed(folder / "undisturbed", network=args.network)
        print(f"undisturbed: {undisturbed.seconds:.1f} s, model {undisturbed.model_sha256}\n")
        print(f"| {'run':>3} | {'seconds':>7} | {'faults':>6} | same model |\n|---|---|---|---|")
        started = time.monotonic()
        while not outcomes or time.monotonic() - started < 60 * args.minutes:
            before = done.total()
            result = run_disturbed(folder / str(len(outcomes)), happening, done, network=args.network)
            outcomes.append(is_same(result, undisturbed))
            print(
                f"| {len(outcomes):>3} | {result.seconds:>7.1f} | {done.total() - before:>6} "
                f"| {'yes' if outcomes[-1] else 'NO':10} |",
                flush=True,
            )
    print("\n" + "\n".join(f"{count:>4} times: {what}" for what, count in sorted(done.items())))
    summary = {"benchmark": "soak", "flags": args.network, "seed": args.seed, "runs": len(outcomes)}
    print(json.dumps({**summary, "faults": dict(sorted(done.items()))}))
    if not all(outcomes):
        sys.exit("a fault changed the result")


if __name__ == "__main__":
    main()
