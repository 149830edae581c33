"""Phase 2 from another run's model is phase 2 of that run, so settings can be compared without repeating phase 1."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from helpers import TINY, Launched, assert_one_clear_line, finish, one_phase, read_result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of both phases, `whole`, and one of phase 1 alone, `first`."""
    path = tmp_path_factory.mktemp("runs")
    with Launched() as launched:
        both = launched.start("single_process.py", *TINY, "--run_dir", path / "whole")
        first = launched.start("single_process.py", *one_phase(TINY), "--run_dir", path / "first")
        for process in (both, first):
            status, _, errors = finish(process)
            assert status == 0, errors
    return path


def test_the_second_phase_alone_ends_where_both_do(launched: Launched, runs: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--rounds", "0", "--initial_model", runs / "first"]
    server, port = launched.start_server(tmp_path / "second", 2, *flags)
    worker = launched.start_worker(port, 2, 1)
    status, _, errors = finish(server)
    assert status == 0, errors
    assert finish(worker)[0] == 0
    whole, second = read_result(runs / "whole"), read_result(tmp_path / "second")
    assert second["model_sha256"] == whole["model_sha256"] != read_result(runs / "first")["model_sha256"]
    assert second["after_fine_tune"] == whole["after_fine_tune"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--initial_model", "{runs}/none"], ["none cannot be read"]),
        (["--initial_model", "{runs}/first", "--model", "cnn"], ["holds mlp, not mnist_cnn", "name another one"]),
        (["--initial_model", "{runs}/first/config.json"], ["config.json cannot be read"]),
    ],
)
def test_what_is_no_model_for_it_is_refused(
    flags: list[str], parts: list[str], launched: Launched, runs: Path, tmp_path: Path
) -> None:
    flags = [flag.format(runs=runs) for flag in flags]
    process = launched.start("single_process.py", *TINY, *flags, "--run_dir", tmp_path / "run")
    assert_one_clear_line(process, *parts)


def test_a_run_that_has_begun_needs_no_other_runs_file(launched: Launched, runs: Path, tmp_path: Path) -> None:
    """The other run is moved away while this one is stopped, before its first round has ended; the model is the same.

    With another model in its place the run would go on as another experiment.
    """
    shutil.copytree(runs / "first", tmp_path / "first")
    flags = [*TINY, "--rounds", "0", "--initial_model", tmp_path / "first"]
    path, undisturbed = tmp_path / "second", tmp_path / "undisturbed"
    stopped = launched.start_struck("fine_tune", 1, "SIGKILL", path, *flags, "--run_dir", path)
    assert finish(stopped)[0] == -signal.SIGKILL
    status, _, errors = finish(launched.start("single_process.py", *flags, "--run_dir", undisturbed))
    assert status == 0, errors
    shutil.rmtree(tmp_path / "first")
    other = launched.start("single_process.py", "--resume", path, "--initial_model", runs / "whole")
    assert_one_clear_line(other, "has other parameters than the run began with")
    status, _, errors = finish(launched.start("single_process.py", "--resume", path))
    assert status == 0, errors
    assert read_result(path)["model_sha256"] == read_result(undisturbed)["model_sha256"]
    experiment = json.loads((path / "config.json").read_text())["experiment"]
    assert experiment["initial_model"] == read_result(runs / "first")["model_sha256"], "not a path"
