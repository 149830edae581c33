"""What the other tests rest on: a process forked from the tests' source is what a new one would be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_source import Started
from helpers import Launched, finish, fork_source, wait_for_line

TELL = """
import json, os, random, signal, sys
import numpy as np
{body}
print(json.dumps({{
    "argv": sys.argv[1:],
    "path": sys.path[0] == os.path.dirname(os.path.abspath(__file__)),
    "folder": os.getcwd(),
    "variable": os.environ.get("PERFEDAVG_TOLD"),
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
    "signals": [str(signal.getsignal(number)) for number in (2, 15, 1, 17)],
    "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "streams": [
        [stream.line_buffering, stream.write_through, stream.encoding, stream.errors, stream.seekable()]
        for stream in (sys.stdout, sys.stderr)
    ],
    "name": __name__,
    "handlers": len(__import__("logging").getLogger().handlers),
}}, sort_keys=True))
print(random.random(), np.random.random(), file=sys.stderr)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "tell.py"
    path.parent.mkdir()
    path.write_text(TELL.format(body=""))
    return path


@pytest.fixture
def no_signal_ignored() -> Iterator[None]:
    """A new process ignores what these tests were started to ignore (by `nohup`, or in the background of a script)."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("no_signal_ignored")
def test_a_fork_begins_as_a_new_process_does(script: Path, launched: Launched, tmp_path: Path) -> None:
    """Or a test would pass in a fork and its user's process fail, or the other way round."""
    environment = {**os.environ, "PERFEDAVG_TOLD": "yes"}
    told = [
        finish(launched.start(script, "--a", "b c", env=environment, cwd=tmp_path, fresh=fresh))
        for fresh in (True, False, False)
    ]
    assert [status for status, _, _ in told] == [0, 0, 0], told
    assert told[0][1] == told[1][1] == told[2][1]
    random_numbers = [number for _, _, errors in told for number in errors.split()]
    assert len(set(random_numbers)) == 6, "no two processes draw the same"


def test_a_fork_ends_as_a_new_process_does(script: Path, launched: Launched) -> None:
    for body, expected in (
        ("sys.exit(3)", (3, "")),
        ("sys.exit('why')", (1, "why\n")),
        ("sys.exit()", (0, "")),
        ("import atexit; atexit.register(print, 'last', file=sys.stderr); sys.exit(4)", (4, "last\n")),
        (
            "import threading; threading.Timer(0.1, print, ['late'], {'file': sys.stderr}).start(); sys.exit(5)",
            (5, "late\n"),
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", (-signal.SIGKILL, "")),
    ):
        script.write_text(TELL.format(body=body))
        status, output, errors = finish(launched.start(script))
        assert (status, errors) == expected, body
        assert output == ""
    script.write_text(TELL.format(body="raise KeyError('oops')"))
    status, _, errors = finish(launched.start(script))
    assert status == 1
    assert errors.endswith("KeyError: 'oops'\n")


def test_signals_reach_a_fork(script: Path, launched: Launched) -> None:
    # Not signal.pause, before which a signal may have come that Python has not answered yet.
    body = "import time; print('ready', file=sys.stderr)\nwhile True: time.sleep(0.01)"
    script.write_text(TELL.format(body=body))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = launched.start(script)
        wait_for_line(process, "ready")
        assert process.poll() is None
        process.send_signal(number)
        status, _, errors = finish(process)
        assert status in ((1, 130, -signal.SIGINT) if number == signal.SIGINT else (-number,)), errors


def test_an_environment_that_was_read_already_gets_a_new_process() -> None:
    source = fork_source()
    assert source.can_start({**os.environ, "PERFEDAVG_DATA": "/elsewhere", "PYTEST_CURRENT_TEST": "another"})
    for name in ("OMP_NUM_THREADS", "PYTHONPATH", "MPLBACKEND", "LC_ALL", "ATEN_CPU_CAPABILITY"):
        assert not source.can_start({**os.environ, name: "another"}), name
    without = dict(os.environ)
    del without["PATH"]
    assert not source.can_start(without)


def test_what_came_together_with_a_line_is_read_at_the_end() -> None:
    """subprocess.Popen's own communicate would lose it, and with it the error that a test is about."""
    command = [sys.executable, "-c", r"import sys; sys.stderr.write('first\nerror: second\n')"]
    process = Started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_line(process, "first")
    assert finish(process) == (0, "", "error: second\n")
