"""The first thing that a newcomer meets: what the set-up says where Python is too old or incomplete."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

COMMANDS = ("sh", "cat", "cksum", "dirname")


def quick_start_with(python: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a copy of quick_start.sh where `python3` is the given shell script and there is no other Python."""
    for name in ("quick_start.sh", "setup_venv.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for command in COMMANDS:
        found = shutil.which(command)
        assert found is not None
        (tools / command).symlink_to(found)
    (tools / "python3").write_text(f"#!/bin/sh\n{python}\n")
    (tools / "python3").chmod(0o755)
    command = ["sh", str(tmp_path / "quick_start.sh")]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tools)}, timeout=60)


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ('[ "$1" = --version ] && echo Python 3.9.1; exit 1', "Python 3.10 to 3.13 is needed, found: Python 3.9.1"),
        ('case "$2" in *venv*) exit 1;; esac', "python3 has no venv module; install it"),
        ('case "$1" in -m) exit 1;; esac', "python3 -m venv failed"),
    ],
    ids=["old", "no venv", "venv fails"],
)
def test_an_unfit_python_is_one_clear_line(python: str, message: str, tmp_path: Path) -> None:
    answer = quick_start_with(python, tmp_path)
    assert answer.returncode == 2
    last = answer.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not list(tmp_path.glob(".venv/installed-*"))


@pytest.mark.parametrize(
    "script", ["single_process.py", "server.py", "client_worker.py", "report.py", "personalize.py"]
)
def test_a_python_without_the_packages_is_one_line_with_the_command_to_use(script: str) -> None:
    """As it is with `python3 single_process.py`, outside .venv. -S leaves out all that is installed."""
    command = [sys.executable, "-S", script, "--rounds", "3"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (answer.returncode, answer.stdout, len(answer.stderr.splitlines())) == (2, "", 1), answer.stderr
    assert answer.stderr.startswith(f"error: {sys.executable} has no torch; use the Python of .venv")
    assert answer.stderr.endswith(f": .venv/bin/python {script} --rounds 3\n")
