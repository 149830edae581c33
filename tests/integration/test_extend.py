"""The page "Extend it", as it stands: its code in a folder of its own, its command, workers that die, a resumption."""

from __future__ import annotations

import os
import re
import shlex
import signal
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, Launched, finish, free_port, read_result, stop_in_round, wait_until_stopped

PAGE = (ROOT / "docs" / "extend.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's five files."""
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        name = re.match(r"# (\w+\.py)\n", block)
        if name:
            (tmp_path / name[1]).write_text(block)
    assert len(list(tmp_path.glob("*.py"))) == 5
    return tmp_path


def flags() -> list[str]:
    """Of the page's command, without --workers."""
    (command,) = re.findall(r"```sh\nsh ~/pfedavg/quick_start\.sh (.*?)```", PAGE, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    place = words.index("--workers")
    assert words[place + 1] == "3"
    return words[:place] + words[place + 2 :]


def test_the_pages_code_runs_whatever_happens_to_its_processes(launched: Launched, folder: Path) -> None:
    """The same model and scores as in one process, after a worker's death and a resumption."""
    expected, run = folder / "expected", folder / "run"
    alone = launched.start("single_process.py", *flags(), "--run_dir", expected, cwd=folder)
    words = ["--workers", "3", "--checkpoint_every", "4"]
    stops = [*stop_in_round(6, folder), *stop_in_round(10, folder)]
    first = launched.start(*stops, "quick_start.py", *flags(), *words, "--run_dir", run, cwd=folder)
    server = wait_until_stopped(first, "server")
    by_name = {child.name(): child for child in psutil.Process(first.pid).children()}
    by_name["worker 2"].kill()
    os.kill(server, signal.SIGCONT)
    wait_until_stopped(first, "server")
    first.send_signal(signal.SIGTERM)
    os.kill(server, signal.SIGCONT)
    assert finish(first)[0] == 128 + signal.SIGTERM
    assert finish(alone)[0] == 0
    second = launched.start("quick_start.py", "--resume", run, "--workers", "3", cwd=folder)
    status, _, errors = finish(second)
    assert status == 0, errors
    assert read_result(run)["model_sha256"] == read_result(expected)["model_sha256"]
    assert (run / "clients.csv").read_bytes() == (expected / "clients.csv").read_bytes()
    assert "after_fedavg_personalized_confidence" in (run / "clients.csv").read_text()


def test_its_flags_are_explained_and_its_absence_is_one_line(launched: Launched, folder: Path) -> None:
    explained = launched.start("single_process.py", *flags(), "--help", cwd=folder)
    elsewhere = launched.start("single_process.py", *flags(), cwd=ROOT)
    _, output, _ = finish(explained)
    shown = " ".join(output.split())
    assert "--alpha X my_method:Dynamic: weight of the pull to the global model" in shown
    assert "--fine_tune_longest X my_method:Dynamic: length to which an update is cut" in shown
    status, _, errors = finish(elsewhere)
    assert status == 2
    assert errors.splitlines()[-1].startswith("error: --method my_method:Dynamic cannot be imported (No module named")


def test_a_worker_with_other_code_is_refused(launched: Launched, folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    for path in folder.glob("*.py"):
        (other / path.name).write_text(path.read_text() + "\n")
    network = ["--port", str(free_port()), "--world_size", "2"]
    server = launched.start("server.py", *flags(), *network, "--run_dir", folder / "run", cwd=folder)
    worker = launched.start("client_worker.py", *network, "--rank", "1", cwd=other)
    for process in (server, worker):
        status, _, errors = finish(process)
        assert status == 2, errors
        assert "is not the server's; give both the same files" in errors
