"""Rows run by the real runner, in real processes: stopped in the middle, failed, gone on with."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path

from helpers import ROOT, TINY, Launched, Process, assert_ended, children_of, finish, read_result, wait_until

PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from experiments import runner
from perfedavg.machine.forking import ForkedProcess
from perfedavg.terminal.entry_point import prepare_process
from perfedavg.machine.processes import SignalWatch
prepare_process()
if sys.argv[6] == "forks":
    sys.path.insert(0, sys.argv[1] + "/tests")
    from held_run import hold
    def fork(command, output):
        hold(Path(output.name).with_name("hold"), 2)  # beside the run's log
        return ForkedProcess("run", runner.ROOT / command[1], command[2:], output)
    runner.start_process = fork
rows, runs, results = json.loads(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
jobs = runner.plan_jobs(rows, [0], runs, results)
machine, num_at_once = ["--device", "cpu", "--threads", "1"], int(sys.argv[5])
sys.exit(runner.run_jobs(jobs, machine, SignalWatch(), num_at_once))
"""
SHORT = {name.removeprefix("--"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)}
LONG = {**SHORT, "rounds": "5"}
ROWS = {"short": SHORT, "long": LONG}


def start(
    launched: Launched,
    folder: Path,
    rows: Mapping[str, Mapping[str, str]] = ROWS,
    num_at_once: int = 1,
    runs_are: str = "forks",
) -> Process:
    """The runner, which starts its runs as `forks` of itself, or as `commands`, which it does for users."""
    (folder / "program.py").write_text(PROGRAM)
    words = [str(ROOT), json.dumps(rows), str(folder / "runs"), str(folder / "results"), str(num_at_once), runs_are]
    return launched.start(folder / "program.py", *words, cwd=folder)


def hold(folder: Path, *rows: str) -> list[Path]:
    """Let these rows wait in their second round, as forks, until the files that are returned are removed."""
    files = [folder / "runs" / row / "hold" for row in rows]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    return files


def wait_until_held(process: Process, file: Path) -> None:
    metrics = file.parent / "seed0" / "metrics.jsonl"
    what = f"the second round of {file.parent.name}"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2, what, process)


def test_stopped_in_the_middle_it_goes_on_to_the_same_model(launched: Launched, tmp_path: Path) -> None:
    """A row that is done stays as it is; the one that was stopped loses no round; nothing is left running."""
    words = [word for name, value in LONG.items() for word in (f"--{name}", value)]
    undisturbed = launched.start("single_process.py", *words, "--run_dir", tmp_path / "undisturbed")
    status, _, errors = finish(undisturbed)
    assert status == 0, errors

    (held,) = hold(tmp_path, "long")
    first = start(launched, tmp_path)
    wait_until_held(first, held)
    (child,) = children_of(first.pid)
    first.send_signal(signal.SIGTERM)
    status, output, errors = finish(first)
    assert status == 128 + signal.SIGTERM
    assert "[1/2] short, seed 0: after FedAvg" not in output
    assert "[1/2] short, seed 0: " in output
    stopped, saved, go_on = errors.splitlines()
    assert stopped == "long, seed 0: stopped by SIGTERM"
    assert saved.startswith("checkpoint of FedAvg round ")
    assert go_on.startswith("go on with: ")
    assert_ended(child)
    assert (tmp_path / "results" / "short" / "seed0" / "result.json").exists()
    assert not (tmp_path / "results" / "long").exists()

    held.unlink()
    status, output, errors = finish(start(launched, tmp_path))
    assert status == 0, errors
    assert "[1/2] short, seed 0: done before, in " in output
    assert f"--resume {tmp_path / 'runs' / 'long' / 'seed0'}" in output
    kept = tmp_path / "results" / "long" / "seed0"
    assert read_result(kept)["model_sha256"] == read_result(tmp_path / "undisturbed")["model_sha256"]
    assert (kept / "clients.csv").read_bytes() == (tmp_path / "undisturbed" / "clients.csv").read_bytes()
    config = (kept / "config.json").read_text()
    assert len(json.loads(config)["resumed"]) == 1
    assert str(tmp_path) not in config
    assert str(ROOT) not in config


def test_a_run_that_fails_shows_why_and_costs_nothing_else(launched: Launched, tmp_path: Path) -> None:
    """The rows before it are kept; when the cause is mended, the same command goes on."""
    place = tmp_path / "runs" / "second"
    place.mkdir(parents=True)
    (place / "seed0").write_text("a file where the run's folder should be")
    rows = {"first": SHORT, "second": SHORT}
    status, output, errors = finish(start(launched, tmp_path, rows, runs_are="commands"))
    assert status == 2
    ended, *shown, go_on = errors.splitlines()
    assert ended == "second, seed 0: ended with status 2:"
    assert f"error: --run_dir {place / 'seed0'} cannot be written" in shown[-1]
    assert go_on.startswith("go on with: ")
    assert (tmp_path / "results" / "first" / "seed0" / "result.json").exists()
    assert [path.name for path in place.iterdir()] == ["seed0"], "nothing is left of a run that never began"
    (place / "seed0").unlink()
    status, output, errors = finish(start(launched, tmp_path, rows))
    assert status == 0, errors
    assert "[1/2] first, seed 0: done before" in output
    kept = [read_result(tmp_path / "results" / row / "seed0") for row in rows]
    assert kept[0]["model_sha256"] == kept[1]["model_sha256"]


def test_runs_side_by_side_are_stopped_together_and_gone_on_with(launched: Launched, tmp_path: Path) -> None:
    """Ctrl-C stops all that run, not only the first; the rest waits its turn, and each comes to its own result."""
    rows = {"a": LONG, "b": LONG, "c": SHORT}
    all_held = hold(tmp_path, "a", "b")
    first = start(launched, tmp_path, rows, 2)
    for held in all_held:
        wait_until_held(first, held)
    children = children_of(first.pid)
    assert len(children) == 2
    first.send_signal(signal.SIGINT)
    status, _, errors = finish(first)
    assert status == 128 + signal.SIGINT
    assert [line for line in errors.splitlines() if line.endswith("stopped by SIGINT")] == [
        "a, seed 0: stopped by SIGINT",
        "b, seed 0: stopped by SIGINT",
    ]
    for child in children:
        assert_ended(child)
    assert not (tmp_path / "runs" / "c").exists()

    for held in all_held:
        held.unlink()
    status, output, errors = finish(start(launched, tmp_path, rows, 2))
    assert status == 0, errors
    ended = [line for line in output.splitlines() if line.endswith(" to go")]
    assert sorted(line[:13] for line in ended) == ["[1/3] a, seed", "[2/3] b, seed", "[3/3] c, seed"]
    assert ended[-1].endswith("; about 0 s to go")
    a, b, c = (read_result(tmp_path / "results" / row / "seed0")["model_sha256"] for row in rows)
    assert a == b != c


def test_a_run_that_fails_lets_the_others_save_what_they_have(launched: Launched, tmp_path: Path) -> None:
    place = tmp_path / "runs" / "bad"
    place.mkdir(parents=True)
    (place / "seed0").write_text("a file where the run's folder should be")
    hold(tmp_path, "long")
    status, _, errors = finish(start(launched, tmp_path, {"long": LONG, "bad": SHORT}, 2))
    assert status == 2
    assert errors.splitlines()[0] == "long, seed 0: stopped"
    assert "bad, seed 0: ended with status 2" in errors
    assert not (tmp_path / "results").exists()
