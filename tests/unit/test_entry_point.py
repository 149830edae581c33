"""How a process ends: users get one line, bugs get a traceback, signals are answered even in native code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Launched, Process, finish, wait_for_line

import utils
from perfedavg.terminal import entry_point
from perfedavg.terminal.entry_point import report

PROGRAM = """
import sys, time, threading
sys.path.insert(0, {root!r})
from perfedavg.terminal.console import say
from perfedavg.terminal.entry_point import at_early_end, run_entry_point
def main():
    {body}
run_entry_point(main)
"""


def start(launched: Launched, body: str) -> Process:
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


WATCHING = """
import sys
sys.path.insert(0, {root!r})
from perfedavg.machine.processes import SignalWatch
from perfedavg.terminal.console import say
watch = SignalWatch()
say("ready")
while not watch.received: watch.wait()
say(f"stopped by {{watch.received.name}}")
sys.exit(128 + watch.received)
"""


@pytest.mark.parametrize("program", [PROGRAM, WATCHING], ids=["one that works", "one that watches others"])
def test_a_terminal_that_closes_does_not_end_what_nohup_started(program: str, launched: Launched) -> None:
    """It has SIGHUP ignored before the program begins."""
    code = program.format(root=str(ROOT), body="say('ready'); threading.Event().wait()")
    process = launched.start("sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-c", code)
    wait_for_line(process, "ready")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    status, _, errors = finish(process)
    assert (status, errors) == (128 + signal.SIGTERM, "stopped by SIGTERM\n")


def test_what_is_to_be_done_before_an_early_end_is_done_in_reverse_order(launched: Launched) -> None:
    """A callback that fails takes nothing from the others, one that was withdrawn is not called."""
    body = """at_early_end(lambda reason: say(f"first, {reason!r}"))
    withdraw = at_early_end(lambda reason: say("withdrawn"))
    at_early_end(lambda reason: [][0])
    at_early_end(lambda reason: say("last"))
    withdraw()
    say("ready")
    """
    process = start(launched, body + "threading.Event().wait()")
    wait_for_line(process, "ready")
    process.send_signal(signal.SIGTERM)
    status, _, errors = finish(process)
    failed = "while ending: list index out of range"
    first = f"first, {signal.SIGTERM!r}"
    assert (status, errors.splitlines()) == (143, ["stopped by SIGTERM", "last", failed, first])
    status, _, errors = finish(start(launched, body + "raise OSError('the cause')"))
    assert status == 2
    assert errors.splitlines() == ["ready", "last", failed, "first, OSError('the cause')", "error: the cause"]
    assert finish(start(launched, body))[2] == "ready\n", "a good end is no early one"


def test_a_second_signal_ends_at_once(launched: Launched) -> None:
    body = "at_early_end(lambda reason: (say('saving'), threading.Event().wait())); say('ready')"
    process = start(launched, body + "; threading.Event().wait()")
    wait_for_line(process, "ready")
    process.send_signal(signal.SIGTERM)
    wait_for_line(process, "saving")
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "can't allocate memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "failed to map segment"),
    ],
)
def test_a_shortage_of_memory_or_threads_is_one_line(
    error: Exception, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is nothing that a traceback would help with."""
    assert report(error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory or threads run short")
    assert text in line


def test_a_process_opens_as_many_files_as_it_may(launched: Launched) -> None:
    """The soft limit of 1,024 is for programs that use `select`; gloo would end the process at it."""
    body = "import resource; soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE); print(soft == hard > 100)"
    command = ("bash", "-c", 'ulimit -Sn 100 && exec "$@"', "bash", sys.executable, "-c")
    process = launched.start(*command, PROGRAM.format(root=str(ROOT), body=body))
    assert finish(process) == (0, "True\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_on_standard_error_is_there_at_once(unbuffered: str, tmp_path: Path) -> None:
    """Also where PYTHONUNBUFFERED asks for it, as in containers: a line's end is then no reason to write."""
    code = """if True:
        import sys
        from perfedavg.terminal.entry_point import prepare_process
        prepare_process()
        print("a line", file=sys.stderr)
        print(open(sys.argv[1]).read(), end="")
    """
    with open(tmp_path / "errors", "w") as errors:
        command = [sys.executable, "-c", code, tmp_path / "errors"]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT)
    assert answer.stdout == "a line\n"


def test_a_signal_while_the_folder_of_a_run_is_being_made_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, goes_on = threading.Event(), threading.Event()
    new_run_folder = utils.new_run_folder

    def make_slowly(args: Any) -> Any:
        folder = new_run_folder(args)
        made.set()
        goes_on.wait()
        return folder

    monkeypatch.setattr(utils, "new_run_folder", make_slowly)
    monkeypatch.setattr(entry_point, "_early_end", [])
    args = utils.get_args("single", ["--dataset", "digits", "--run_dir", str(tmp_path / "run")])
    opening = threading.Thread(target=utils.open_run_folder, args=(args,), daemon=True)
    opening.start()
    made.wait()
    ending = threading.Thread(target=entry_point._end_early, args=(signal.SIGTERM,))
    ending.start()
    ending.join(0.1)
    goes_on.set()
    for thread in (ending, opening):
        thread.join()
    assert not (tmp_path / "run").exists()
