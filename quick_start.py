"""Entry point of quick_start.sh: a server and its workers on this machine, as one command."""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO

import utils
from perfedavg.console import EXIT_BAD_INPUT, report

POLL_SECONDS = 0.1
GRACE_SECONDS = 0.5
"""From the first failure to the account of it, so that a crash that caused it is seen too."""
TERMINATE_SECONDS = 5.0
"""How long a process has to end by itself after SIGTERM."""


class LocalProcesses:
    """The processes of one run. Leaving the block ends all that still run."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes] | None]] = {}

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self, name: str, command: list[str], shows_output: bool) -> None:
        """Start a process in a process group of its own, so that Ctrl-C reaches it through `stop` only.

        What it prints is shown as it comes, or else kept to be shown if it fails.
        """
        output = None if shows_output else tempfile.TemporaryFile()  # noqa: SIM115, closed in stop
        self._running[name] = (
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,
            ),
            output,
        )

    def wait(self, signals: SignalWatch) -> int:
        """Wait until every process has ended well, or one has failed, or a signal came; return the exit status."""
        while self._running:
            if signals.received:
                print(f"stopped by {signals.received.name}", file=sys.stderr)
                return 128 + signals.received
            failed = [name for name, (process, _) in self._running.items() if process.poll()]
            if failed:
                time.sleep(GRACE_SECONDS)
                return self._explain(failed[0])
            self._running = {name: entry for name, entry in self._running.items() if entry[0].returncode is None}
            time.sleep(POLL_SECONDS)
        return 0

    def stop(self) -> None:
        """SIGTERM to every process that still runs, SIGKILL to those that do not end within TERMINATE_SECONDS."""
        processes = [process for process, _ in self._running.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + TERMINATE_SECONDS
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for _, output in self._running.values():
            if output is not None:
                output.close()
        self._running.clear()

    def _explain(self, first_failed: str) -> int:
        """Say which process failed first, and which others crashed; return the first one's exit status.

        The others that ended with a clear line of their own are left out: they only say that a peer is gone.
        """
        for name, (process, output) in self._running.items():
            status = process.poll()
            if name == first_failed or status not in (None, 0, EXIT_BAD_INPUT):
                assert status is not None, "the first to fail has ended"
                how = f"with status {status}" if status > 0 else f"by signal {signal.Signals(-status).name}"
                print(f"{name} ended {how}", file=sys.stderr)
                if output is not None:
                    output.seek(0)
                    print(output.read().decode(errors="replace").rstrip(), file=sys.stderr)
        status = self._running[first_failed][0].returncode
        return status if status > 0 else 128 - status


class SignalWatch:
    """Remembers the signal that asks this process to end, so that no process is left between its start and its list."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)


def main() -> int:
    args = utils.get_args("quick_start")
    try:
        utils.check_num_workers(utils.config_from_args(args), args.workers)  # before anything is started
    except ValueError as error:
        return report(error)
    signals = SignalWatch()
    with LocalProcesses() as processes:
        for name, command, shows_output in commands(args):
            processes.start(name, command, shows_output)
        status = processes.wait(signals)
    if status == 0 and args.dataset == "digits":
        print("the paper's experiment: sh quick_start.sh --dataset emnist")
    return status


def commands(args: argparse.Namespace) -> Iterator[tuple[str, list[str], bool]]:
    """(name, command, whether its output is shown) of the server and each worker."""
    flags = argparse.Namespace(**vars(args), ip="127.0.0.1", world_size=args.workers + 1)
    flags.port = args.port or free_port()
    yield "server", [sys.executable, str(utils.ROOT / "server.py"), *utils.to_argv(flags, "server")], True
    for rank in range(1, args.workers + 1):
        flags.rank = rank
        yield (
            f"worker {rank}",
            [sys.executable, str(utils.ROOT / "client_worker.py"), *utils.to_argv(flags, "worker")],
            False,
        )


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
