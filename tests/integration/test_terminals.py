"""A terminal that is not there, is full or cannot print a character costs what would have been seen there, no more."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import shlex
import struct
import sys
import termios
from pathlib import Path

import pytest
from helpers import ROOT, TINY, Launched, QuadraticClients, basic, finish, make_config, read_result

from perfedavg.engine.experiment import RoundRecord
from perfedavg.engine.scores import ClientScore
from perfedavg.settings import Phase, Population
from perfedavg.terminal.display import ProgressDisplay

PROGRAM = """
import os, sys
sys.path.insert(0, {root!r})
from perfedavg.terminal.console import say, show
from perfedavg.terminal.entry_point import run_entry_point
def main():
    {body}
run_entry_point(main)
"""


def program(body: str) -> str:
    """The command of a small entry point, for a shell."""
    return shlex.join([sys.executable, "-c", PROGRAM.format(root=str(ROOT), body=body)])


def entry_point(script: str, *flags: str | Path) -> str:
    return shlex.join([sys.executable, str(ROOT / script), *map(str, flags)])


def test_a_run_without_a_terminal(launched: Launched, tmp_path: Path) -> None:
    """As a service manager or a job queue may start it. Its log says what the terminal would have shown."""
    words = ("single_process.py", *TINY, "--local_lr", "1e30", "--run_dir")
    closed = launched.start("sh", "-c", f"exec {entry_point(*words, tmp_path / 'closed')} >&- 2>&-")
    with open("/dev/full", "wb") as full:
        disk_is_full = launched.start(*words, tmp_path / "full", output=full)
    for name, process in (("closed", closed), ("full", disk_is_full)):
        status, output, errors = finish(process)
        log = (tmp_path / name / "log.txt").read_text()
        assert (status, output, errors) == (0, "", ""), log
        assert "refused 5 of 5 updates" in log
        assert read_result(tmp_path / name)["after_fine_tune"]


def test_a_quick_start_without_a_terminal(launched: Launched, tmp_path: Path) -> None:
    """The server and the workers get no terminal either."""
    words = ("quick_start.py", *TINY, "--run_dir")
    closed = launched.start("sh", "-c", f"exec {entry_point(*words, tmp_path / 'closed')} <&- >&- 2>&-")
    with open("/dev/full", "wb") as full:
        disk_is_full = launched.start(*words, tmp_path / "full", output=full)
    for name, process in (("closed", closed), ("full", disk_is_full)):
        assert finish(process)[0] == 0
        assert read_result(tmp_path / name)["world_size"] == 3


def test_an_error_without_a_terminal_keeps_its_status(launched: Launched, tmp_path: Path) -> None:
    for script, flags in (
        ("server.py", ["--ip", "nowhere.invalid"]),
        ("report.py", [tmp_path]),
    ):
        assert finish(launched.start("sh", "-c", f"exec {entry_point(script, *flags)} >&- 2>&-"))[0] == 2
    assert finish(launched.start("sh", "-c", f"exec {entry_point('reproduce.py', '--help')} >&- 2>&-"))[0] == 0


def test_what_is_printed_does_not_end_up_in_a_file(launched: Launched, tmp_path: Path) -> None:
    """A closed descriptor is free for the next file that is opened, and a C library prints to number 1 all the same."""
    body = f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'stray'); os.write(2, b'stray'); file.close()"
    assert finish(launched.start("sh", "-c", f"exec {program(body)} <&- >&- 2>&-"))[0] == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_character_that_the_encoding_lacks_is_an_escape(launched: Launched) -> None:
    body = "show('0.5 \\u00b1 0.1'); say('folder \\udcff'); print('\\u00b1')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = launched.start("sh", "-c", f"exec {program(body)}", env=environment)
    assert finish(process) == (0, "0.5 \\xb1 0.1\n\\xb1\n", "folder \\udcff\n")


def test_a_reader_that_has_gone_ends_nothing(launched: Launched, tmp_path: Path) -> None:
    """`| head -1` closes the pipe while there is more to print."""
    body = f"[print(n, flush=True) for n in range(10_000)]; open({str(tmp_path / 'end')!r}, 'w').close()"
    assert finish(launched.start("sh", "-c", f"{program(body)} | head -1"))[1] == "0\n"
    status = f"{{ {program(body)}; echo $? >&2; }} | head -1"
    assert finish(launched.start("sh", "-c", status))[2] == "0\n"
    assert (tmp_path / "end").exists()


def read_all(descriptor: int) -> str:
    """What came to a terminal whose other end has been closed."""
    parts = []
    with contextlib.suppress(OSError):  # EIO: that was all
        while part := os.read(descriptor, 4096):
            parts.append(part)
    os.close(descriptor)
    return b"".join(parts).decode()


@pytest.mark.parametrize("terminal", ["dumb", "xterm"])
def test_a_terminal_of_no_width(terminal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container or a remote shell may have it. A dumb one gets lines, since it cannot draw one again."""
    monkeypatch.setenv("TERM", terminal)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    scores = {"accuracy": 0.5, "loss": 1.0}
    evaluation = {"initial": scores, "personalized": scores}
    with open(theirs, "w") as stream:
        shown = ProgressDisplay(make_config(), QuadraticClients([[0.0]] * 2, [1, 1], 1), stream)
        shown.phase_started(Phase.FEDAVG, 2, 0)
        for number in (1, 2):
            shown.round_ended(RoundRecord(Phase.FEDAVG, number, (0,), 1, {}, 1.0, 1.0, 1.0, 0.0, {}, evaluation))
        shown.scoring_started(Phase.FEDAVG, Population.UNSEEN, 4)
        score = ClientScore(1, 8, 2, basic(1.0, 0.5), basic(0.5, 1.0))
        shown.phase_ended(Phase.FEDAVG, {Phase.FEDAVG: {Population.UNSEEN: [score]}})
    text = read_all(ours)
    assert "2/2" in text
    assert ("\r" in text.replace("\r\n", "")) is (terminal == "xterm")


def test_the_scripts_without_a_terminal(launched: Launched) -> None:
    for script in ("quick_start.sh", "multi_process/quick_start.sh", "reproduce.sh"):
        command = f"exec sh {shlex.quote(str(ROOT / script))} --help <&- >&- 2>&-"
        assert finish(launched.start("sh", "-c", command))[0] == 0
