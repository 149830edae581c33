"""Entry points for tests, in forks of one process that has loaded torch and the project: 50 ms instead of seconds each.

A fork sees what a new process does: its own arguments, environment, folder and streams. What was read as Python or a
library was loaded it cannot see anew; see `ForkSource.can_start`. And its runs draw no plots.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
READ_LATE = ("PERFEDAVG_", "PYTEST_")
"""Beginnings of the variables that are read when they are used, and not when something is loaded."""
MAX_REQUEST_BYTES = 2**17
CLONE_NEWNET = 0x40000000  # of setns(2)
NUMBER = struct.Struct("q")
"""A report: a process id, then the exit status."""


class Forked:
    """A process that was forked from the source. Its methods are those of subprocess.Popen in text mode."""

    def __init__(self, args: Sequence[str], report: int, pipes: Sequence[int]) -> None:
        """report: descriptor that gives the process id, and the exit status when it has ended.

        pipes: of its standard output and error, or none where these are elsewhere.
        """
        self.args = args
        self.stdout, self.stderr = map(open, pipes) if pipes else (None, None)  # closed by communicate
        self.returncode: int | None = None
        self._report = report
        self._rest: dict[IO[str], str] = {}
        self._readers: list[threading.Thread] = []
        self.pid = self._read_report()

    def poll(self) -> int | None:
        return self._wait_until_ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._wait_until_ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it prints from now on, until its end. Nothing where that was asked before."""
        deadline = None if timeout is None else time.monotonic() + timeout

        def seconds_left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        if not self._readers:
            assert self.stdout is not None, "it has pipes"
            for stream in (self.stdout, self.stderr):
                self._readers.append(threading.Thread(target=self._read_rest, args=(stream,), daemon=True))
                self._readers[-1].start()
        for reader in self._readers:
            reader.join(seconds_left())
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(seconds_left())
        return self._rest.pop(self.stdout, ""), self._rest.pop(self.stderr, "")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read_rest(self, stream: IO[str]) -> None:
        with stream:
            self._rest[stream] = stream.read()

    def _wait_until_ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            self.returncode = self._read_report()
            os.close(self._report)
        return self.returncode

    def _read_report(self) -> int:
        content = os.read(self._report, NUMBER.size)
        assert content, "the source of forks has died"
        return int(NUMBER.unpack(content)[0])


class ForkSource:
    """The process that has loaded everything, as the tests see it. It ends with theirs."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._socket, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other_end:
            words = [sys.executable, str(Path(__file__)), str(other_end.fileno())]
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, pass_fds=[other_end.fileno()], env=self._environment
            )

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
        self._process.wait()


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each request, and report how the forks end. Returns the request in a fork, and None at the end."""
    wake, wake_end = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wake_end, False)
    signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this process
    reports: dict[int, int] = {}
    while True:
        ready = select.select([requests, wake], [], [])[0]
        if wake in ready:
            os.read(wake, 1024)
            report_ends(reports)
        if requests not in ready:
            continue
        content, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 4)
        if not content:
            return None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD, signal.SIGTERM))
        pid = os.fork()
        if pid == 0:
            requests.close()
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
    from perfedavg.recording import run_folder

    run_folder.write_plots = lambda *told: None  # half the time of a short run; new processes' plots are tested
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["namespace"]:
        enter_network_namespace(request["namespace"])
    begin_anew(request["words"], tuple(request["streams"]))
    for descriptor in request["streams"]:
        os.close(descriptor)


def load_everything() -> None:
    """What the entry points import, sooner or later."""
    import fsspec  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import numpy.random  # noqa: F401
    import PIL.Image
    import tensorboard.compat.proto.summary_pb2
    import tensorboard.summary.writer.record_writer  # noqa: F401
    import torch.fx.experimental.symbolic_shapes  # noqa: F401

    import models  # noqa: F401
    import multi_process.server
    import multi_process.worker  # noqa: F401
    import perfedavg.run  # noqa: F401

    PIL.Image.preinit()


def enter_network_namespace(name: str) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as namespace:
        if library.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    connection = socket.socket(fileno=int(sys.argv[1]))
    from perfedavg.machine.forking import load

    load(load_everything)
    request = serve(connection)
    if request is not None:
        become(request)
        if sys.argv[0] == "-m":
            sys.path[0] = os.getcwd()
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
