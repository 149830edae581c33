"""As many workers as a small cluster has, on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Launched, finish, read_result

EXPERIMENT = ["--dataset", "digits", "--model", "mlp", "--client_num_in_total", "100", "--client_num_per_round", "64"]
EXPERIMENT += [
    "--unseen_fraction",
    "0.2",
    "--local_test_fraction",
    "0.2",
    "--rounds",
    "3",
    "--local_epochs",
    "1",
    "--fine_tune_method",
    "none",
    "--personalization_epochs",
    "1",
]


@pytest.mark.slow
def test_64_workers_give_the_model_of_one_process(launched: Launched, tmp_path: Path) -> None:
    """One client a worker and round: what a server does for each worker is as much of the run as it can be."""
    runs = {name: tmp_path / name for name in ("one", "many")}
    single = launched.start("single_process.py", *EXPERIMENT, "--run_dir", runs["one"])
    status, _, errors = finish(single)
    assert status == 0, errors
    words = ("--workers", "64", "--threads", "1", "--device", "cpu", "--worker_timeout_seconds", "120")
    status, _, errors = finish(
        launched.start("quick_start.py", *EXPERIMENT, *words, "--run_dir", runs["many"], fresh=True)
    )
    assert status == 0, errors
    assert read_result(runs["many"])["model_sha256"] == read_result(runs["one"])["model_sha256"]
    assert "worker 64 is ready" in (runs["many"] / "log.txt").read_text()
