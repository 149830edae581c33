"""Every command that the program prints can be pasted, in any folder, and does what its line says."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, Launched, finish, read_result, wait_until
from PIL import Image

import reproduce
import utils
from launch.commands import restart_command
from launch.flags import parse
from multi_process.transport.keys import read_token
from perfedavg.terminal.console import command_line
from server import command_for_workers

SHORT = ["--dataset", "folder", "--model", "mlp", "--client_num_per_round", "2", "--rounds", "3"]
SHORT += ["--local_epochs", "1", "--fine_tune_method", "none", "--personalization_epochs", "1", "--eval_every", "1"]


def write_images(folder: Path) -> None:
    """Random images of two classes, by six clients, the names of which are no text."""
    generator = np.random.default_rng(0)
    for client in range(6):
        for number in range(10):
            path = folder / os.fsdecode(b"client\xff%d" % client) / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (28, 28), dtype=np.uint8), "L").save(path)


def words_of(command: str) -> list[str]:
    """As a shell reads them."""
    answer = subprocess.run(["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True)
    return [os.fsdecode(word) for word in answer.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize("script", ["single_process.py", "quick_start.py"])
def test_a_stopped_run_prints_the_command_that_ends_it(script: str, launched: Launched, tmp_path: Path) -> None:
    """With paths that were given relative to a folder that the next shell is not in, and names that need quoting."""
    write_images(tmp_path / "my images")
    run = Path("runs") / os.fsdecode(b"it's \xff")
    flags = ["--data_root", "my images", "--run_dir", run, "--checkpoint_every", "4", "--device", "cpu"]
    hold = tmp_path / "hold"
    hold.touch()
    first = launched.start("tests/held_run.py", hold, "1", script, *SHORT, *flags, cwd=tmp_path)
    metrics = tmp_path / run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes(), "its first round", first)
    first.send_signal(signal.SIGTERM)
    status, _, errors = finish(first)
    assert status == 128 + signal.SIGTERM
    (line,) = [line for line in errors.splitlines() if "saved; continue with: " in line]
    command = line.partition("continue with: ")[2]
    assert {str(ROOT / script), "--device", "--checkpoint_every", str(tmp_path / "my images")} <= set(words_of(command))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    status, _, errors = finish(launched.start("sh", "-c", command, cwd=elsewhere))
    assert status == 0, errors
    assert read_result(tmp_path / run)["rounds"] == 3
    assert "client?" in (tmp_path / run / "clients.csv").read_text()
    assert command in (tmp_path / run / "log.txt").read_text() or b"\xff" in os.fsencode(run)


@pytest.mark.parametrize(
    ("role", "argv"),
    [
        ("single", ["--threads", "3", "--device", "cpu"]),
        ("quick_start", ["--workers", "3", "--worker_timeout_seconds", "7", "--threads", "2", "--port", "4000"]),
        ("cluster", ["--hosts", "my hosts", "--ip", "10.0.0.1", "--device", "cpu", "--worker_timeout_seconds", "7"]),
        ("server", ["--ip", "10.0.0.1", "--port", "4000", "--world_size", "5", "--token_file", "secret file"]),
    ],
)
def test_what_starts_a_run_again_has_every_flag_that_was_given(
    role: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those of the experiment, which the run keeps itself; and the data's folder also where a variable set it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERFEDAVG_DATA", "data")
    given = utils.get_args(role, [*argv, "--seed", "3", "--run_dir", "x"])
    _, script, *words = words_of(restart_command(given))
    monkeypatch.chdir("/")
    monkeypatch.delenv("PERFEDAVG_DATA")
    again = utils.get_args(role, words)
    assert Path(script).is_file()
    experiment = dataclasses.replace(again.experiment, seed=3)
    assert dataclasses.replace(again, experiment=experiment, run_dir=tmp_path / "x") == given
    assert again.data_root == tmp_path / "data"


def test_a_server_names_a_worker_that_joins_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--ip", "10.0.0.1", "--port", "4000", "--token_file", "t", "--data_root", "d", "--ethernet", "lo"]
    given = utils.get_args("server", [*argv, "--join_timeout_seconds", "9"])
    _, script, *words = words_of(f"{command_for_workers(given, {})} --rank 2")
    worker = utils.get_args("worker", words)
    assert Path(script).name == "client_worker.py"
    assert (worker.ip, worker.port, worker.rank, worker.ethernet) == ("10.0.0.1", 4000, 2, "lo")
    assert (worker.token_file, worker.data_root) == (tmp_path / "t", tmp_path / "d")
    assert worker.join_timeout_seconds == 20, "the server's own limit is another"
    assert command_for_workers(given, {utils.RESTART_VARIABLE: "quick_start.py"}) is None, "it starts them itself"


def test_the_command_that_makes_a_token_makes_one(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("abc")
    with pytest.raises(ValueError, match="make one with: ") as refusal:
        read_token(tmp_path / "short")
    command = str(refusal.value).partition("make one with: ")[2]
    answer = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, env={"PATH": ""})
    (tmp_path / "long").write_text(answer.stdout)
    assert read_token(tmp_path / "long") == answer.stdout.strip().encode()


def test_reproduction_goes_on_with_the_flags_it_had(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that it lists for a row is read by the entry point that it names."""
    flags = ["--table", "mnist", "--rows", "E5-C20", "--seeds", "0", "1", "--runs", "my runs", "--threads", "1"]
    status, output, errors = finish(launched.start("reproduce.py", *flags, "--list", cwd=tmp_path))
    assert status == 0, errors
    _, script, *words = words_of(output.splitlines()[1].strip())
    assert script == str(ROOT / "single_process.py")
    assert utils.get_args("single", words).run_dir == tmp_path / "my runs" / "mnist" / "E5-C20" / "seed0"
    monkeypatch.chdir(tmp_path)
    given = parse(reproduce.Reproduce, flags)
    _, script, *words = words_of(restart_command(given))
    monkeypatch.chdir("/")
    assert (script, parse(reproduce.Reproduce, words)) == (str(ROOT / "reproduce.py"), given)


def test_words_survive_a_shell() -> None:
    words = ["a b", "it's", 'a "quoted" $HOME `x` \\', "two  spaces", "a\nb\tc", os.fsdecode(b"\xff%s\\n'"), "é", ""]
    command = command_line(words)
    assert " ".join(command.split()) == command, "as an error's message is shown"
    assert words_of(command) == words


COMMAND = re.compile(
    r"\b(python3?|sh) +(-c|-m|[\w/]+\.(py|sh))|(continue|goes? on|start \w+) with:? (--|sh |python)|\w\.py +--\w"
)
PROGRAM_NAMES = (
    "sh quick_start.sh",
    "sh reproduce.sh",
    "python -m datasets.describe",
    "see python -m datasets.describe",
)
"""In usage lines and --help."""


def test_no_command_is_written_by_hand() -> None:
    """One in a message would have this project's folder, the flags that were given and quoting to think of."""
    for path in [
        *ROOT.glob("*.py"),
        *(
            file
            for name in ("perfedavg", "multi_process", "datasets", "reporting", "models", "launch")
            for file in (ROOT / name).rglob("*.py")
        ),
    ]:
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                text = node.value
                for name in PROGRAM_NAMES:
                    text = text.replace(name, "")
                assert not COMMAND.search(text), f"{path}:{node.lineno}: {node.value}"
