"""Entry points in forks of a process that has loaded what they need, so that it is loaded once and its memory shared.

Imports nothing heavy. A fork copies the locks of all threads, but only the thread that forks: so a process must not
have started a thread, run autograd or entered an OpenMP region before it forks. docs/decisions.md says why forks.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import io
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

POLL_SECONDS = 0.01
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # of prctl(2)
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


class ForkedProcess:
    """An entry point in a fork of this process; its methods are those of subprocess.Popen.

    It has a session of its own, so that Ctrl-C in a terminal reaches it through this process only, and gets SIGTERM
    when this process dies.
    pid: its process id.  returncode: None while it runs, -n where signal n ended it.
    """

    def __init__(self, name: str, script: Path, argv: Sequence[str], output: IO[bytes] | None = None) -> None:
        """name: shown by `ps -o comm` and `top`, at most 15 bytes.  argv: the flags of the script.

        output: file for what it prints, or None to print where this process does.
        """
        self.returncode: int | Any = None
        parent = os.getpid()
        with open(os.devnull, "rb") as nothing:
            streams = (nothing.fileno(), *((1, 2) if output is None else (output.fileno(), output.fileno())))

            def run() -> None:
                os.setsid()
                _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                _prctl(_PR_SET_NAME, name.encode())
                if os.getppid() != parent:  # which died before it was watched
                    os.kill(os.getpid(), signal.SIGTERM)
                begin_anew([str(script), *argv], streams)
                close_descriptors_from(3)
                runpy.run_path(str(script), run_name="__main__")

            self.pid = _fork(run)

    def poll(self) -> int | Any:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired where it has not ended within so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(POLL_SECONDS)
        return int(status)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def outlive_parent() -> None:
    """Let no further signal come from the death of the process that forked this one.

    The kernel sends one for each thread that such a process had, and a second signal would end this one at once.
    """
    _prctl(_PR_SET_PDEATHSIG, 0)


def load(import_all: Callable[[], None]) -> None:
    """Import what the forks share. The collector would visit, and so copy, every object in every fork."""
    gc.disable()
    import_all()
    gc.freeze()
    gc.enable()


def begin_anew(argv: Sequence[str], streams: tuple[int, int, int]) -> None:
    """Let a process that was just forked begin as a new one does, as far as an entry point can tell.

    argv: of the entry point, its path first.  streams: descriptors that become standard input, output and error.
    """
    signal.set_wakeup_fd(-1)
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    copies = [fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, 3) for stream in streams]  # one may have another's number
    for descriptor, copy in enumerate(copies):
        os.dup2(copy, descriptor)
        os.close(copy)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115, for as long as the process lives
    sys.stdout, sys.stderr = _reopened(sys.stdout, 1, os.isatty(1)), _reopened(sys.stderr, 2, True)
    sys.argv = list(argv)
    sys.path[0] = str(Path(argv[0]).parent)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # of users' code; this project's generators follow from --seed


def _reopened(stream: TextIO, descriptor: int, line_buffering: bool) -> TextIO:
    """The same stream for what is behind the descriptor now. The old one has kept whether it could be sought in."""
    assert isinstance(stream, io.TextIOWrapper), "it was opened when Python started"
    is_unbuffered = isinstance(stream.buffer, io.RawIOBase)  # PYTHONUNBUFFERED
    return io.TextIOWrapper(
        open(descriptor, "wb", buffering=0 if is_unbuffered else -1, closefd=False),
        stream.encoding,
        stream.errors,
        line_buffering=line_buffering and not is_unbuffered,
        write_through=is_unbuffered,
    )


def close_descriptors_from(lowest: int) -> None:
    """Close what this process inherited. The Python objects that held it must live as long as the process."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= lowest:
            try:
                os.close(int(name))
            except OSError:  # that of the listing itself
                continue


def _fork(run: Callable[[], None]) -> int:
    """Run a function in a fork of this process, whose end it is. Returns the fork's process id."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or it would be printed twice
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)  # this process's handlers are none for the fork
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    status = 1
    try:
        run()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def _prctl(option: int, value: int | bytes) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
