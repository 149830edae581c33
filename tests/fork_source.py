"""Entry points for tests, in forks of one process that has loaded torch and the project: 50 ms instead of seconds each.

A fork sees what a new process does: its own arguments, environment, folder and streams. What was read as Python or a
library was loaded it cannot see anew; see `ForkSource.can_start`. And its runs draw no plots, unless asked to.

All processes that run tests share one source. It loads when the first of them needs it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
READ_LATE = ("PERFEDAVG_", "PYTEST_", "CUBLAS_", "TORCHINDUCTOR_", "COLUMNS", "LINES")
READ_LATE += ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")
"""Beginnings of variables that are read when they are used, and not when something is loaded.

Libraries set some; scikit-learn sets the last two itself, wherever it is imported."""
ADDRESS_VARIABLE = "PYTEST_FORK_SOURCE"
"""Where the source listens; set for all processes that run tests."""
MAX_REQUEST_BYTES = 2**17
NUMBER = struct.Struct("q")
"""A report: a process id, then the exit status."""


class _TextReader:
    """What is read of a process after single lines of it: all the rest, which subprocess.Popen's own communicate loses
    where it came together with a line.
    """

    def _begin_reading(self) -> None:
        self._rest: dict[IO[str], str] = {}
        self._readers: list[threading.Thread] = []

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it prints from now on, until its end. Nothing where that was asked before, or is elsewhere."""
        deadline = None if timeout is None else time.monotonic() + timeout

        def seconds_left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        if not self._readers and self.stdout is not None and self.stderr is not None:
            for stream in (self.stdout, self.stderr):
                self._readers.append(threading.Thread(target=self._read_rest, args=(stream,), daemon=True))
                self._readers[-1].start()
        for reader in self._readers:
            reader.join(seconds_left())
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(seconds_left())
        first, second = ("" if stream is None else self._rest.pop(stream, "") for stream in (self.stdout, self.stderr))
        return first, second

    def _read_rest(self, stream: IO[str]) -> None:
        with stream:
            self._rest[stream] = stream.read()


class Started(_TextReader, subprocess.Popen[str]):
    """A process that starts from nothing."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, text=True, **settings)
        self._begin_reading()


class Forked(_TextReader):
    """A process that was forked from the source. Its methods are those of subprocess.Popen in text mode."""

    def __init__(self, args: Sequence[str], report: int, pipes: Sequence[int]) -> None:
        """report: descriptor that gives the process id, and the exit status when it has ended.

        pipes: of its standard output and error, or none where these are elsewhere.
        """
        self.args = args
        self.stdout, self.stderr = map(open, pipes) if pipes else (None, None)  # closed by communicate
        self.returncode: int | None = None
        self._report = report
        self._begin_reading()
        self.pid = self._read_report()

    def poll(self) -> int | None:
        return self._wait_until_ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._wait_until_ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended since
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait_until_ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            self.returncode = self._read_report()
            os.close(self._report)
        return self.returncode

    def _read_report(self) -> int:
        content = os.read(self._report, NUMBER.size)
        assert content, "the source of forks has died"
        return int(NUMBER.unpack(content)[0])


@contextlib.contextmanager
def running_source() -> Iterator[str]:
    """Run the source for as long as the block. Yields the address at which it listens."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        address = f"{folder}/forks"
        listener.bind(address)
        listener.listen()
        words = [sys.executable, str(Path(__file__)), str(listener.fileno())]
        # It ends when its standard input does, which also a killed process closes.
        with subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[listener.fileno()]):
            yield address


class ForkSource:
    """The source, as a process that runs tests sees it."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(address)
        self._environment = json.loads(self._socket.recv(MAX_REQUEST_BYTES))

    def can_start(self, environment: Mapping[str, str]) -> bool:
        """Whether a fork sees this environment as a new process would.

        Others than READ_LATE may have been read already: OMP_NUM_THREADS, MPLBACKEND, PYTHONPATH, LC_ALL.
        """
        changed = set(environment.items()) ^ set(self._environment.items())
        return all(name.startswith(READ_LATE) for name, _ in changed)

    def start(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        folder: Path | None,
        streams: tuple[int, int] | None = None,
        network_namespace: str | None = None,
        draws_plots: bool = False,
    ) -> Forked:
        """Start a script, or -m and a module, with arguments, as Python would from its command line.

        streams: descriptors for standard output and error, or None for pipes of its own.
        network_namespace: name of the one to be in, which is this process's otherwise.
        """
        request = {
            "words": list(words),
            "environment": dict(environment),
            "folder": str(folder or Path.cwd()),
            "namespace": network_namespace,
            "draws_plots": draws_plots,
        }
        report, report_end = os.pipe()
        pipes = [] if streams else [os.pipe(), os.pipe()]
        shown = streams or [write_end for _, write_end in pipes]
        socket.send_fds(self._socket, [json.dumps(request).encode()], [report_end, *shown, 0])
        for descriptor in (report_end, *(write_end for _, write_end in pipes)):
            os.close(descriptor)
        return Forked(words, report, [read_end for read_end, _ in pipes])

    def close(self) -> None:
        self._socket.close()


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Fork for each request, and report how the forks end. Returns the request in a fork, and None at the end."""
    wake, wake_end = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wake_end, False)
    signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this process
    environment = json.dumps(dict(os.environ)).encode()
    is_loaded = False
    connections: list[socket.socket] = []
    reports: dict[int, int] = {}
    while True:
        ready = select.select([sys.stdin, wake, listener, *connections], [], [])[0]
        if sys.stdin in ready:
            return None
        if wake in ready:
            os.read(wake, 1024)
            report_ends(reports)
        if listener in ready:
            connections.append(listener.accept()[0])
            connections[-1].send(environment)
            if not is_loaded:
                load_everything()
                is_loaded = True
        for connection in set(ready) & set(connections):
            content, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 4)
            if not content:
                connections.remove(connection)
                connection.close()
                continue
            before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD, signal.SIGTERM))
            pid = os.fork()
            if pid == 0:
                for inherited in (listener, *connections):
                    inherited.close()
                for descriptor in (wake, wake_end, *reports.values(), descriptors[0]):
                    os.close(descriptor)
                return {**json.loads(content), "streams": [descriptors[3], descriptors[1], descriptors[2]]}
            report, *streams = descriptors
            for descriptor in streams:
                os.close(descriptor)
            reports[pid] = report
            os.write(report, NUMBER.pack(pid))
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def report_ends(reports: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            report = reports.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # the test does not ask
                os.write(report, NUMBER.pack(os.waitstatus_to_exitcode(status)))
            os.close(report)


def become(request: dict[str, Any]) -> None:
    """In a fork: be the process that was asked for, up to the first line of its script."""
    from perfedavg.machine.forking import begin_anew
    from reporting import run_plots

    if not request["draws_plots"]:
        run_plots.draw_run_plots = lambda *told: None  # which would take half the time of a short run
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["namespace"]:
        from benchmarks.lan import enter_network_namespace

        enter_network_namespace(request["namespace"])
    begin_anew(request["words"], tuple(request["streams"]))
    for descriptor in request["streams"]:
        os.close(descriptor)


def load_everything() -> None:
    """What the entry points import, sooner or later."""
    from perfedavg.machine.forking import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
        load(import_everything)
    from perfedavg.machine.versions import describe_environment

    describe_environment()  # which a process looks up once


def import_everything() -> None:
    import filelock  # noqa: F401
    import fsspec  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import numpy.ctypeslib
    import numpy.random  # noqa: F401
    import PIL.Image
    import tensorboard.compat.proto.summary_pb2
    import tensorboard.summary.writer.record_writer  # noqa: F401
    import torch.fx.experimental.symbolic_shapes  # noqa: F401

    import datasets  # noqa: F401
    import models  # noqa: F401
    import multi_process.server
    import multi_process.worker  # noqa: F401
    import perfedavg.recorded_run  # noqa: F401
    import reporting.run_plots  # noqa: F401
    import utils  # noqa: F401

    PIL.Image.preinit()


def end_after(run: Callable[[], object]) -> NoReturn:
    """Run a function and end the process as Python would, which takes nothing apart that a fork would have to copy."""
    status = 0
    try:
        run()
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # waits for its threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


def run(words: Sequence[str]) -> None:
    """Run a script, or -m and a module, as Python would from its command line."""
    if words[0] == "-m":
        sys.path[0] = os.getcwd()
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        become(request)
        end_after(lambda: run(request["words"]))
