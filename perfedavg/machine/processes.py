"""Processes of this machine: a run's, started, watched and ended together; and signals. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from perfedavg.machine.forking import ForkedProcess

GRACE_SECONDS = 0.5
"""From a worker that gave up to what is done about it, so that the end of the server is seen as its cause."""
TERMINATE_SECONDS = 40.0
"""How long a process has to end by itself after SIGTERM: the server writes a checkpoint."""
END_SECONDS = 5.0
"""For workers to end by themselves when the run is over."""
MAX_RESTARTS = 3
"""Of a worker that died. One that ended with a clear line of its own is not started again."""
ENDS_WITH_INPUT = "PERFEDAVG_ENDS_WITH_INPUT"
"""Variable by which a program says that it holds the other end of standard input for as long as the run is wanted."""
SERVER = "server"
"""The name of the process without which a run has failed."""


@dataclass
class LocalProcess:
    """A process that was started, and how to start it again.

    output: what it prints, where that is not shown.  num_taken: bytes of it that somebody has been told of.
    """

    script: Path
    flags: list[str]
    process: ForkedProcess
    output: IO[bytes] | None
    num_restarts: int = 0
    num_taken: int = 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _goes_on() -> int:
    return 0


class LocalProcesses:
    """The server and the workers of one run, or those of them that are here. Leaving the block ends all that still run.

    final_status: with which a worker ends that is not to be started again.
    say: takes a line on the end of a process.
    on_output: takes what processes print whose output is not shown, with their names, whenever `take_output` is called
        and at their ends; None to show it if they fail.
    on_give_up: is given the name of a worker that has failed and is not started again.
    """

    def __init__(
        self,
        final_status: int,
        say: Callable[[str], None] = _say,
        on_output: Callable[[str, bytes], None] | None = None,
        on_give_up: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._final_status = final_status
        self._say = say
        self._on_output = on_output
        self._on_give_up = on_give_up
        self._running: dict[str, LocalProcess] = {}
        self._deadline: float | None = None  # for those that still run when the run is over

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self, name: str, script: Path, argv: list[str], shows_output: bool, num_restarts: int = 0) -> None:
        """Start a process. What it prints is shown as it comes, or else kept for `on_output`."""
        output = None if shows_output else tempfile.TemporaryFile()  # noqa: SIM115, closed in _forget
        process = ForkedProcess(name, script, argv, output)
        self._running[name] = LocalProcess(script, argv, process, output, num_restarts)

    def wait(self, signals: SignalWatch, look: Callable[[], int] = _goes_on, every_seconds: float | None = None) -> int:
        """Wait until every process has ended well, or the run has failed, or a signal came; return the exit status.

        A worker that dies is started again, a few times; without the server or without any worker the run has failed.
        When the server has ended well, the run is over whatever becomes of a worker, as of one that came back too late.
        look: is called so often, and at every end of a process; returns 0, or the status that the run is to end with.
        """
        while self._running and (self._deadline is None or time.monotonic() < self._deadline):
            if signals.received:
                self._say(f"stopped by {signals.received.name}")
                return 128 + signals.received
            status = look()
            if status:
                return status
            ended = [name for name, entry in self._running.items() if entry.process.poll() is not None]
            for name in ended:
                status = self._take_end(name)
                if status:
                    return status
            if not ended:
                signals.wait(every_seconds if self._deadline is None else max(0.0, self._deadline - time.monotonic()))
        return 0

    def take_output(self) -> None:
        """Hand over what the processes have printed since the last call."""
        for name in self._running:
            self._take_output_of(name)

    def stop(self) -> None:
        """SIGTERM to every process that still runs, SIGKILL to those that do not end within TERMINATE_SECONDS."""
        end_processes([entry.process for entry in self._running.values()])
        for name in list(self._running):
            self._forget(name)

    def _take_end(self, name: str) -> int:
        """Act on the end of a process. Returns the status that the whole run ends with, or 0 where it goes on."""
        if name not in self._running:
            return 0
        entry = self._running[name]
        if name != SERVER and entry.process.returncode > 0 and self._has_server_ended():
            return self._take_end(SERVER)  # of which the worker's end is a consequence
        status = entry.process.returncode
        if status == 0:
            self._forget(name)
            if name == SERVER:
                self._deadline = time.monotonic() + END_SECONDS
            return 0
        self._explain(name)
        self._forget(name)
        if self._deadline is not None:
            return 0  # the run is over
        if name != SERVER and status != self._final_status and entry.num_restarts < MAX_RESTARTS:
            self._say(f"{name} is started again ({entry.num_restarts + 1} of {MAX_RESTARTS} times)")
            self.start(name, entry.script, entry.flags, False, entry.num_restarts + 1)
            return 0
        if name != SERVER:
            self._on_give_up(name)
            if set(self._running) - {SERVER}:
                return 0  # the run goes on with the other workers
        return exit_status(entry.process)

    def _has_server_ended(self) -> bool:
        """Whether the server has ended, or does so within GRACE_SECONDS."""
        if SERVER not in self._running:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running[SERVER].process.wait(GRACE_SECONDS)
            return True
        return False

    def _explain(self, name: str) -> None:
        """Say how a process ended, and show what it printed, unless `on_output` takes that."""
        self._take_output_of(name)
        entry = self._running[name]
        status = entry.process.returncode
        how = f"with status {status}" if status > 0 else f"by signal {signal.Signals(-status).name}"
        self._say(f"{name} ended {how}")
        if entry.output is not None and self._on_output is None:
            entry.output.seek(0)
            print(entry.output.read().decode(errors="replace").rstrip(), file=sys.stderr)

    def _take_output_of(self, name: str) -> None:
        entry = self._running[name]
        if self._on_output is None or entry.output is None:
            return
        while content := os.pread(entry.output.fileno(), 2**16, entry.num_taken):
            entry.num_taken += len(content)
            self._on_output(name, content)

    def _forget(self, name: str) -> None:
        self._take_output_of(name)
        output = self._running.pop(name).output
        if output is not None:
            output.close()


class SignalWatch:
    """Remembers the signal that asks this process to end, so that no process is left between its start and its list.

    received: that signal, or None while there was none; SIGTERM too when the other end of `stream` is closed, as by the
        death of the process that holds it, or silent.
    """

    def __init__(self, stream: int | None = None, silence_seconds: float | None = None) -> None:
        """stream: descriptor of a pipe; what comes there is a sign of life, and its end a signal.

        silence_seconds: without a sign of life, after which nobody is there any more; None where none are sent.
        """
        self.received: signal.Signals | None = None
        self._streams = [] if stream is None else [stream]
        self._silence_seconds = silence_seconds
        self._heard = time.monotonic()
        self._wake_read, self._wake_write = os.pipe()
        for descriptor in (self._wake_read, self._wake_write):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        answer_signals(self._remember)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # of which only the byte in the pipe is wanted

    def wake(self) -> None:
        """End the present `wait`, or the next one; another thread may call it."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def wait(self, seconds: float | None = None) -> None:
        """Until a signal has come since this was called last: one that asks to end, or the end of a child process.

        Or for so many seconds.
        """
        readable, _, _ = select.select([self._wake_read, *self._streams], [], [], seconds)
        if self._streams and self._streams[0] in readable:
            self._heard = time.monotonic()
            content = b""
            with contextlib.suppress(ConnectionError):
                content = os.read(self._streams[0], 4096)
            if not content:
                self._streams.clear()
                self.received = signal.SIGTERM
        elif self._silence_seconds is not None and time.monotonic() > self._heard + self._silence_seconds:
            self.received = signal.SIGTERM
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)


def answer_signals(answer: Callable[[int, FrameType | None], None]) -> None:
    """Have a function called at a signal that asks this process to end; at SIGHUP not where nohup has it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, answer)


def end_processes(processes: Sequence[subprocess.Popen[bytes] | ForkedProcess]) -> None:
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


def exit_status(process: subprocess.Popen[bytes] | ForkedProcess) -> int:
    """The exit status of a process that has ended, as a shell has it: 128 + n where signal n ended it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def hold_free_port(host: str = "127.0.0.1") -> tuple[socket.socket, int]:
    """A free TCP port of this machine's address, and a socket that keeps others from being given it while it is open.

    A server may listen on the port meanwhile, because the socket does not listen. Raises OSError where the address is
    not this machine's.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, 0))
    except OSError:
        held.close()
        raise
    return held, int(held.getsockname()[1])
