"""A run that was killed or stopped goes on with --resume and ends as if it had been left alone. Real processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    MNIST_PREFIXES,
    ROOT,
    TINY,
    Launched,
    assert_one_clear_line,
    finish,
    one_phase,
    read_result,
    wait_until,
    write_image_files,
)

import utils
from perfedavg.engine.experiment import parameters_sha256
from perfedavg.training.flat_model import flatten

FLAGS = [*TINY, "--rounds", "5", "--fine_tune_rounds", "12"]


def metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "idle_share")} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left alone."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    with Launched() as launched:
        status, _, errors = finish(launched.start("single_process.py", *FLAGS, "--run_dir", path))
    assert status == 0, errors
    return path


def test_killed_in_both_phases_and_stopped_in_the_last(launched: Launched, tmp_path: Path, undisturbed: Path) -> None:
    path = tmp_path / "run"
    first = launched.start_struck("fedavg", 4, "SIGKILL", path, *FLAGS, "--run_dir", path, "--checkpoint_every", "2")
    assert finish(first)[0] == -signal.SIGKILL
    second = launched.start_struck("fine_tune", 3, "SIGKILL", path, "--resume", path, "--checkpoint_every", "3")
    status, _, errors = finish(second)
    assert status == -signal.SIGKILL
    assert f"{path} goes on after FedAvg round 2" in errors
    third = launched.start_struck("fine_tune", 5, "SIGTERM", path, "--resume", path, "--checkpoint_every", "1000")
    status, _, errors = finish(third)
    assert status == 128 + signal.SIGTERM
    *lines, saved = errors.splitlines()
    assert "stopped by SIGTERM" in lines[-2:], "at most the line of the round that was ending came after it"
    assert saved.startswith("checkpoint of fine-tuning round ")
    assert f"{ROOT / 'single_process.py'} --checkpoint_every 1000 " in saved
    assert saved.endswith(f" --resume {path}")
    assert int(saved.split()[4]) >= 4, "of the last round, although --checkpoint_every is 1000"
    status, output, errors = finish(launched.start("single_process.py", "--resume", path))
    assert status == 0, errors
    assert read_result(path)["model_sha256"] == read_result(undisturbed)["model_sha256"]
    assert (path / "clients.csv").read_bytes() == (undisturbed / "clients.csv").read_bytes()
    assert metrics(path) == metrics(undisturbed)
    assert read_result(path)["after_fine_tune"] == read_result(undisturbed)["after_fine_tune"]
    assert not (path / "checkpoint").exists()
    assert len(json.loads((path / "config.json").read_text())["resumed"]) == 3
    assert f"results in {path}" in output


def test_stopped_before_the_first_round_has_ended(launched: Launched, tmp_path: Path) -> None:
    """There is nothing to save, and nothing is lost."""
    path = tmp_path / "run"
    process = launched.start("single_process.py", *FLAGS, "--run_dir", path, "--local_epochs", "100000")
    log = path / "log.txt"
    wait_until(lambda: log.exists() and "FedAvg: 5 rounds" in log.read_text(), "its begin", process)
    process.send_signal(signal.SIGINT)
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGINT
    assert errors.splitlines()[-2:] == ["stopped by SIGINT", "no round has ended yet, so there is nothing to save"]
    assert not (path / "checkpoint").exists()


def test_what_cannot_be_resumed(launched: Launched, tmp_path: Path, undisturbed: Path) -> None:
    """Each refused with one line; nothing in the folder changes."""
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_bytes((undisturbed / "config.json").read_bytes())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_bytes((undisturbed / "config.json").read_bytes()[:300])
    (tmp_path / "empty").mkdir()
    for flags, parts in [
        (["--resume", undisturbed], ["that run has ended", f"a new run with --initial_model {undisturbed}"]),
        (["--resume", tmp_path / "empty"], [f"--resume {tmp_path / 'empty'}", "not the folder of a run"]),
        (["--resume", tmp_path / "nowhere"], [f"--resume {tmp_path / 'nowhere'}", "not the folder of a run"]),
        (["--resume", tmp_path / "damaged"], ["config.json is damaged", "start a new run"]),
        (["--resume", unfinished, "--run_dir", tmp_path / "x"], ["--run_dir", "does not go with --resume"]),
        (["--resume", unfinished, "--seed", "1"], ["--seed 1 differs from the run's 0; leave it out"]),
    ]:
        assert_one_clear_line(launched.start("single_process.py", *flags), *parts)
    assert [entry.name for entry in unfinished.iterdir()] == ["config.json"]


def test_other_data_than_the_runs(launched: Launched, tmp_path: Path) -> None:
    for name, sizes in (("a", (400, 100)), ("b", (400, 105))):
        write_image_files(tmp_path / name / "MNIST" / "raw", MNIST_PREFIXES, sizes, num_classes=10)
    path, flags = tmp_path / "run", [*FLAGS, "--dataset", "mnist"]
    words = [*flags, "--run_dir", path, "--data_root", tmp_path / "a"]
    process = launched.start_struck("fedavg", 2, "SIGTERM", path, *words)
    assert finish(process)[0] == 128 + signal.SIGTERM
    before = (path / "metrics.jsonl").read_bytes()
    process = launched.start("single_process.py", "--resume", path, "--data_root", tmp_path / "b")
    assert_one_clear_line(process, "the run was made with other data", "--data_root")
    assert (path / "metrics.jsonl").read_bytes() == before


def test_clients_that_all_diverge_leave_the_model_as_it_was(launched: Launched, tmp_path: Path) -> None:
    words = [*one_phase(TINY), "--local_lr", "1e30"]
    process = launched.start("single_process.py", *words, "--run_dir", tmp_path / "run")
    status, _, errors = finish(process)
    assert status == 0, errors
    assert errors.count("refused 5 of 5 updates") == 3
    assert "lower --local_lr" in errors
    config = utils.get_args("single", words).experiment
    untrained = utils.get_model(config, utils.get_datasets(config, tmp_path))
    assert read_result(tmp_path / "run")["model_sha256"] == parameters_sha256(flatten(untrained))
    assert [(len(line["refused"]), line["train_loss"]) for line in metrics(tmp_path / "run")] == [(5, None)] * 3
    assert "NaN" not in (tmp_path / "run" / "result.json").read_text()
