"""A process that forks entry points: each begins as a new process would, and none outlives it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from helpers import ROOT, Launched, assert_ended, finish

PARENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import logging, socket, tempfile
from pathlib import Path
from perfedavg.machine.forking import ForkedProcess
from perfedavg.machine.processes import SignalWatch
watch = SignalWatch()
logging.getLogger().addHandler(logging.NullHandler())
listener = socket.create_server(("127.0.0.1", 0))
other = tempfile.TemporaryFile()
print("once", end=" ")
output = tempfile.TemporaryFile()
child = ForkedProcess("child 7", Path(sys.argv[1]), ["--a", "b c"], output)
print(child.wait())
output.seek(0)
print(output.read().decode(), end="")
shown = ForkedProcess("child 8", Path(sys.argv[1]), ["--a", "b c"])
print(shown.wait())
"""
CHILD = """
import json, os, random, signal, sys
print(json.dumps({
    "argv": sys.argv[1:],
    "name": __name__,
    "comm": open("/proc/self/comm").read().strip(),
    "leads a session": os.getsid(0) == os.getpid(),
    "input": sys.stdin.read(),
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
    "signals": [str(signal.getsignal(number)) for number in (2, 15, 1, 17)],
    "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "drawn": random.random(),
}))
print("an error", file=sys.stderr)
sys.exit(5)
"""


def write_script(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_fork_has_nothing_of_its_parent_but_what_was_loaded(launched: Launched, tmp_path: Path) -> None:
    """No descriptor, handler, buffered line or random state, and the exit status is the script's."""
    parent = write_script(tmp_path / "parent.py", PARENT)
    process = launched.start(parent, write_script(tmp_path / "child.py", CHILD))
    status, output, errors = finish(process)
    assert status == 0, errors
    first, kept, kept_error, shown, last = output.splitlines()
    assert (first, kept_error, last, errors) == ("once 5", "an error", "5", "an error\n")
    told = [json.loads(kept), json.loads(shown)]
    assert [entry.pop("comm") for entry in told] == ["child 7", "child 8"]
    assert told[0].pop("drawn") != told[1].pop("drawn")
    expected = {
        "argv": ["--a", "b c"],
        "name": "__main__",
        "leads a session": True,
        "input": "",
        "descriptors": [0, 1, 2, 3],  # the last is that of the listing
        "signals": ["<built-in function default_int_handler>", "0", "0", "0"],
        "blocked": 0,
    }
    assert told == [expected, expected]


def test_what_fails_before_the_scripts_own_end_is_a_traceback(launched: Launched, tmp_path: Path) -> None:
    """And never goes on in the parent's code, of which a fork has a copy."""
    parent = write_script(tmp_path / "parent.py", PARENT)
    status, output, errors = finish(
        launched.start(parent, write_script(tmp_path / "child.py", "raise KeyError('oops')"))
    )
    assert status == 0, errors
    assert output.splitlines()[0] == "once 1"
    assert output.splitlines()[-1] == "1"
    assert output.count("KeyError: 'oops'") == errors.count("KeyError: 'oops'") == 1, "kept, and shown"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_fork_does_not_outlive_its_parent(number: signal.Signals, launched: Launched, tmp_path: Path) -> None:
    child = "import os, signal, sys\nprint('child', os.getpid(), file=sys.stderr)\nsignal.pause()"
    parent = write_script(tmp_path / "parent.py", PARENT.replace("watch = SignalWatch()", "").replace(", output)", ")"))
    process = launched.start(parent, write_script(tmp_path / "child.py", child))
    assert process.stderr is not None
    word, pid = process.stderr.readline().split()
    assert word == "child"
    os.kill(int(pid), 0)
    process.send_signal(number)
    assert process.wait(60) == -number
    assert_ended(int(pid))


def test_waiting_for_a_fork_may_end_before_it_does(launched: Launched, tmp_path: Path) -> None:
    parent = f"""
import subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from perfedavg.machine.forking import ForkedProcess
child = ForkedProcess("child", Path(sys.argv[1]), [])
try: child.wait(0.05)
except subprocess.TimeoutExpired: print(child.poll())
child.kill()
print(child.wait(60), child.returncode)
child.terminate()  # nothing to a process that has ended
"""
    script = write_script(tmp_path / "child.py", "import signal; signal.pause()")
    process = launched.start(write_script(tmp_path / "parent.py", parent), script)
    assert finish(process) == (0, "None\n-9 -9\n", "")


RUN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from perfedavg.machine import processes
processes.END_SECONDS = float(sys.argv[3])
with processes.LocalProcesses(2) as running:
    running.start("server", Path(sys.argv[1]), [], True)
    running.start("worker 1", Path(sys.argv[2]), [str(running._running["server"].process.pid)], False)
    print(running.wait(processes.SignalWatch()))
"""


@pytest.mark.parametrize(
    ("worker", "end_seconds"),
    [
        ("import signal\nsignal.pause()", "0.1"),
        ("import os, sys, time\nwhile os.path.exists('/proc/' + sys.argv[1]): time.sleep(0.01)\nsys.exit(2)", "600"),
    ],
    ids=["tries to join", "has given up"],
)
def test_a_run_whose_server_has_ended_well_is_over_whatever_a_late_worker_does(
    worker: str, end_seconds: str, launched: Launched, tmp_path: Path
) -> None:
    """Or a worker that died in the last round, and was back too late, would turn a finished run into a failed one."""
    scripts = [write_script(tmp_path / f"{name}.py", text) for name, text in (("server", ""), ("worker", worker))]
    process = launched.start(write_script(tmp_path / "run.py", RUN), *scripts, end_seconds)
    status, output, errors = finish(process)
    assert (status, output) == (0, "0\n"), errors
    assert "is started again" not in errors


def test_what_is_loaded_before_the_forks_touches_no_gpu_and_leaves_one_thread(launched: Launched) -> None:
    """A fork has none of the other threads, and cannot use a GPU that its parent has asked for anything."""
    program = f"""
import os, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import torch
def refuse(*words, **more): raise AssertionError("the GPU was asked for")
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
import quick_start
from perfedavg.machine.forking import load
load(quick_start.load_everything)
loaded = ["multi_process.worker" in sys.modules, "perfedavg.recorded_run" in sys.modules]
print(threading.active_count(), *loaded, flush=True)
if os.fork() == 0:
    print(len(os.listdir("/proc/self/task")), torch.ones(2).sum().item(), flush=True)
    os._exit(0)
os.wait()
"""
    status, output, errors = finish(launched.start(sys.executable, "-W", "ignore", "-c", program))
    assert (status, output) == (0, "1 True True\n1 2.0\n"), errors
