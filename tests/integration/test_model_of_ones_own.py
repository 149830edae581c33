"""A model of the user's own, with running statistics that each client keeps: the same bits whoever trains and dies."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from helpers import TINY, Launched, assert_one_clear_line, finish, free_port, one_phase, read_result

MODULE = """
from torch import nn

def build(input_shape, num_classes):
    size = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, num_classes))
"""
FLAGS = [*TINY, "--rounds", "4", "--client_num_per_round", "8", "--model", "my_net:build", "--buffers", "local"]
"""Half of the training clients a round, so that each trains more than once; the server's optimizer has a state."""
FLAGS += ["--batch_size", "8", "--server_optimizer", "adam", "--server_lr", "0.01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the module, from which commands are started, and a finished run of one process."""
    path = tmp_path_factory.mktemp("mine")
    (path / "my_net.py").write_text(MODULE)
    with Launched() as launched:
        process = launched.start("single_process.py", *FLAGS, "--run_dir", path / "single", cwd=path)
        status, _, errors = finish(process)
        assert status == 0, errors
    return path


def assert_same(run: Path, expected: Path) -> None:
    assert read_result(run)["model_sha256"] == read_result(expected)["model_sha256"]
    assert (run / "clients.csv").read_text() == (expected / "clients.csv").read_text()


def test_workers_of_which_one_dies_end_with_the_same_model(folder: Path, launched: Launched, tmp_path: Path) -> None:
    port, world = str(free_port()), ["--world_size", "3"]
    server = launched.start("server.py", "--port", port, *world, "--run_dir", tmp_path / "run", *FLAGS, cwd=folder)
    for rank in ("1", "2"):
        command = ["client_worker.py", "--port", port, *world, "--rank", rank, "--device", "cpu"]
        if rank == "1":
            note = str(tmp_path / "note")
            command = ["benchmarks/planted_fault.py", "worker sending", "fedavg", "3", "SIGKILL", note, *command]
        launched.start(*command, cwd=folder)
    status, _, errors = finish(server)
    assert status == 0, errors
    assert "lost worker 1" in errors, errors
    assert_same(tmp_path / "run", folder / "single")


def test_a_resumed_run_ends_with_the_same_model(folder: Path, launched: Launched, tmp_path: Path) -> None:
    run, note = tmp_path / "run", str(tmp_path / "note")
    fault = ["benchmarks/planted_fault.py", "server stepping", "fedavg", "3", "SIGKILL", note, "single_process.py"]
    struck = launched.start(*fault, *FLAGS, "--run_dir", run, "--checkpoint_every", "1", cwd=folder)
    assert finish(struck)[0] == -signal.SIGKILL
    status, _, errors = finish(launched.start("single_process.py", "--resume", run, cwd=folder))
    assert status == 0, errors
    assert_same(run, folder / "single")


def test_it_is_another_runs_initial_model(folder: Path, launched: Launched, tmp_path: Path) -> None:
    """Where nothing is trained, the model is the same to the bit: its statistics come along."""
    flags = [*one_phase(FLAGS), "--rounds", "0", "--initial_model", folder / "single"]
    status, _, errors = finish(launched.start("single_process.py", *flags, "--run_dir", tmp_path / "run", cwd=folder))
    assert status == 0, errors
    assert read_result(tmp_path / "run")["model_sha256"] == read_result(folder / "single")["model_sha256"]


def test_another_model_under_the_same_name_is_found(folder: Path, launched: Launched, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "my_net.py").write_text(MODULE.replace("24", "25"))
    shutil.copytree(folder / "single", other / "single")
    flags = [*one_phase(FLAGS), "--rounds", "0", "--initial_model", other / "single"]
    process = launched.start("single_process.py", *flags, "--run_dir", other / "run", cwd=other)
    assert_one_clear_line(process, "--initial_model", "does not fit")
