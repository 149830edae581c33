"""What clients keep travels with them: model and scores are the same whoever trains and scores, and whoever dies."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import TINY, Launched, finish, free_port, read_result

FLAGS = [*TINY, "--rounds", "4", "--client_num_per_round", "8"]
"""Half of the training clients a round, so that each trains more than once."""
SCRIPT = "tests/counting_run.py"


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("single")
    with Launched() as launched:
        status, _, errors = finish(launched.start(SCRIPT, "single_process.py", *FLAGS, "--run_dir", run / "counting"))
        assert status == 0, errors
        plain = launched.start("single_process.py", *FLAGS, "--run_dir", run / "plain")
        assert finish(plain)[0] == 0
    digests = {name: str(read_result(run / name)["model_sha256"]) for name in ("counting", "plain")}
    assert digests["counting"] != digests["plain"], "what clients keep acts"
    return run / "counting"


def assert_same(run: Path, expected: Path) -> None:
    """The model, and the scores, of which those of clients that trained depend on what they kept."""
    assert read_result(run)["model_sha256"] == read_result(expected)["model_sha256"]
    scores = (run / "clients.csv").read_text()
    assert scores == (expected / "clients.csv").read_text()
    assert scores.count(",trained,") == 4


@pytest.mark.parametrize("point", [None, "worker training", "worker sending"])
def test_workers_that_live_and_die_end_with_the_same_model(
    point: str | None, single_process: Path, launched: Launched, tmp_path: Path
) -> None:
    """A worker that dies in the third round has clients that trained elsewhere before; their result is lost with it."""
    port, world = str(free_port()), ["--world_size", "3"]
    server = launched.start(SCRIPT, "server.py", "--port", port, *world, "--run_dir", tmp_path / "run", *FLAGS)
    for rank in ("1", "2"):
        command = ["client_worker.py", "--port", port, *world, "--rank", rank, "--device", "cpu"]
        if point is not None and rank == "1":
            fault = [point, "fedavg", "3", "SIGKILL", str(tmp_path / "note")]
            command = ["benchmarks/planted_fault.py", *fault, *command]
        launched.start(SCRIPT, *command)
    status, _, errors = finish(server)
    assert status == 0, errors
    assert point is None or "lost worker 1" in errors, errors
    assert_same(tmp_path / "run", single_process)


def test_a_run_that_is_resumed_ends_with_the_same_model(
    single_process: Path, launched: Launched, tmp_path: Path
) -> None:
    fault = ["server stepping", "fedavg", "3", "SIGKILL", str(tmp_path / "note")]
    run, port, world = tmp_path / "run", str(free_port()), ["--world_size", "2"]
    flags = ["--port", port, *world, "--run_dir", run, *FLAGS, "--checkpoint_every", "1"]
    struck = launched.start(SCRIPT, "benchmarks/planted_fault.py", *fault, "server.py", *flags)
    launched.start(SCRIPT, "client_worker.py", "--port", port, *world, "--rank", "1", "--device", "cpu")
    assert finish(struck)[0] == -9
    server = launched.start(SCRIPT, "server.py", "--port", port, *world, "--resume", run)
    status, _, errors = finish(server)
    assert status == 0, errors
    assert_same(run, single_process)
