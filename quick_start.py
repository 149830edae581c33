"""Entry point of quick_start.sh: a server and its workers on this machine, as one command."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

import utils
from perfedavg.console import EXIT_BAD_INPUT, end_process, open_standard_streams, report
from perfedavg.runs import make_default_folder

POLL_SECONDS = 0.1
GRACE_SECONDS = 0.5
"""From a worker's failure to what is done about it, so that the end of the server is seen as its cause."""
TERMINATE_SECONDS = 40.0
"""How long a process has to end by itself after SIGTERM: the server writes a checkpoint."""
MAX_RESTARTS = 3
"""Of a worker that died. One that ended with a clear line of its own is not started again."""
SERVER = "server"


@dataclass
class LocalProcess:
    """A process that was started, and how to start it again. output: what it prints, where that is not shown."""

    command: list[str]
    process: subprocess.Popen[bytes]
    output: IO[bytes] | None
    num_restarts: int = 0


class LocalProcesses:
    """The server and the workers of one run. Leaving the block ends all that still run."""

    def __init__(self) -> None:
        self._running: dict[str, LocalProcess] = {}

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self, name: str, command: list[str], shows_output: bool, num_restarts: int = 0) -> None:
        """Start a process in a process group of its own, so that Ctrl-C reaches it through `stop` only.

        What it prints is shown as it comes, or else kept to be shown if it fails.
        """
        output = None if shows_output else tempfile.TemporaryFile()  # noqa: SIM115, closed in _forget
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
        )
        self._running[name] = LocalProcess(command, process, output, num_restarts)

    def wait(self, signals: SignalWatch) -> int:
        """Wait until every process has ended well, or the run has failed, or a signal came; return the exit status.

        A worker that dies is started again, a few times; without the server or without any worker the run has failed.
        """
        while self._running:
            if signals.received:
                print(f"stopped by {signals.received.name}", file=sys.stderr)
                return 128 + signals.received
            for name in [name for name, entry in self._running.items() if entry.process.poll() is not None]:
                status = self._take_end(name)
                if status:
                    return status
            time.sleep(POLL_SECONDS)
        return 0

    def stop(self) -> None:
        """SIGTERM to every process that still runs, SIGKILL to those that do not end within TERMINATE_SECONDS."""
        end_processes([entry.process for entry in self._running.values()])
        for name in list(self._running):
            self._forget(name)

    def _take_end(self, name: str) -> int:
        """Act on the end of a process. Returns the status that the whole run ends with, or 0 where it goes on."""
        if name not in self._running:
            return 0
        if name != SERVER and self._running[name].process.returncode:
            time.sleep(GRACE_SECONDS)
            if SERVER in self._running and self._running[SERVER].process.poll() is not None:
                return self._take_end(SERVER)  # of which the worker's end is a consequence
        entry = self._running[name]
        status = entry.process.returncode
        if status == 0:
            self._forget(name)
            return 0
        self._explain(name)
        self._forget(name)
        if name != SERVER and status != EXIT_BAD_INPUT and entry.num_restarts < MAX_RESTARTS:
            print(f"{name} is started again ({entry.num_restarts + 1} of {MAX_RESTARTS} times)", file=sys.stderr)
            self.start(name, entry.command, False, entry.num_restarts + 1)
            return 0
        if name != SERVER and set(self._running) - {SERVER}:
            return 0  # the run goes on with the other workers
        return exit_status(entry.process)

    def _explain(self, name: str) -> None:
        """Say how a process ended, and show what it printed."""
        entry = self._running[name]
        status = entry.process.returncode
        how = f"with status {status}" if status > 0 else f"by signal {signal.Signals(-status).name}"
        print(f"{name} ended {how}", file=sys.stderr)
        if entry.output is not None:
            entry.output.seek(0)
            print(entry.output.read().decode(errors="replace").rstrip(), file=sys.stderr)

    def _forget(self, name: str) -> None:
        output = self._running.pop(name).output
        if output is not None:
            output.close()


class SignalWatch:
    """Remembers the signal that asks this process to end, so that no process is left between its start and its list."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)


def end_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, upon which a run saves a checkpoint; SIGKILL to those that have not ended within TERMINATE_SECONDS."""
    for process in processes:
        process.terminate()  # which does nothing to one that has ended
    deadline = time.monotonic() + TERMINATE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def exit_status(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a process that has ended, as a shell has it: 128 + n where signal n ended it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def main() -> int:
    args = utils.get_args("quick_start")
    try:
        utils.check_num_workers(utils.config_from_args(args), args.workers)  # before anything is started
    except ValueError as error:
        return report(error)
    if args.resume is None and args.run_dir is None:
        args.run_dir = make_default_folder(utils.ROOT / "runs", args.dataset)
    os.environ.setdefault("PERFEDAVG_TOKEN", secrets.token_hex(32))  # so that no other user of this machine can join
    signals = SignalWatch()
    with contextlib.ExitStack() as stack:
        if args.port is None:
            held, args.port = hold_free_port()
            stack.enter_context(held)
        processes = stack.enter_context(LocalProcesses())
        for name, command, shows_output in commands(args):
            processes.start(name, command, shows_output)
        status = processes.wait(signals)
    run = args.resume or args.run_dir
    if status == 0 and args.dataset == "digits":
        print("the paper's experiment: sh quick_start.sh --dataset emnist")
    elif status > 128 and not signals.received and (run / "config.json").exists():  # the server could not say it
        print(f"continue with: sh quick_start.sh --resume {run}", file=sys.stderr)
    with contextlib.suppress(OSError):
        run.rmdir()  # where nothing came of it
    return status


def commands(args: argparse.Namespace) -> Iterator[tuple[str, list[str], bool]]:
    """(name, command, whether its output is shown) of the server and each worker."""
    flags = argparse.Namespace(**vars(args), ip="127.0.0.1", world_size=args.workers + 1)
    yield SERVER, [sys.executable, str(utils.ROOT / "server.py"), *utils.to_argv(flags, "server")], True
    for rank in range(1, args.workers + 1):
        flags.rank = rank
        yield (
            f"worker {rank}",
            [sys.executable, str(utils.ROOT / "client_worker.py"), *utils.to_argv(flags, "worker")],
            False,
        )


def hold_free_port() -> tuple[socket.socket, int]:
    """A free TCP port of the loopback interface, and a socket that keeps others from being given it while it is open.

    A server may listen on the port meanwhile, because the socket does not listen.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held, int(held.getsockname()[1])


if __name__ == "__main__":
    open_standard_streams()
    end_process(main())
