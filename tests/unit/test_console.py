"""How a process ends: users get one line, bugs get a traceback, signals are answered even in native code."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from helpers import ROOT, Launched, finish, wait_for_line

PROGRAM = """
import sys, time, threading
sys.path.insert(0, {root!r})
from perfedavg.console import run_entry_point, say
def main():
    {body}
run_entry_point(main)
"""


def start(launched: Launched, body: str) -> subprocess.Popen[str]:
    return launched.start(sys.executable, "-c", PROGRAM.format(root=str(ROOT), body=body))


def test_success(launched: Launched) -> None:
    assert finish(start(launched, "print('done')")) == (0, "done\n", "")


def test_bad_input_is_one_line(launched: Launched) -> None:
    status, _, errors = finish(start(launched, "raise ValueError('--x 3 is bad;\\n use 4')"))
    assert (status, errors) == (2, "error: --x 3 is bad; use 4\n")


def test_a_bug_is_a_traceback(launched: Launched) -> None:
    status, _, errors = finish(start(launched, "raise KeyError('oops')"))
    assert status == 1
    assert "Traceback" in errors
    assert "KeyError: 'oops'" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_process_that_is_blocked(number: signal.Signals, launched: Launched) -> None:
    """The body waits for a lock that nobody releases, as a receive waits for a peer."""
    process = start(launched, "say('ready'); lock = threading.Lock(); lock.acquire(); lock.acquire()")
    wait_for_line(process, "ready")
    process.send_signal(number)
    status, _, errors = finish(process)
    assert (status, errors) == (128 + number, f"stopped by {number.name}\n")
