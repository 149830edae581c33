"""Every method with real processes: the same model and the same scores whoever trains, and whoever dies.

In one process: tests/numerics/test_method_cases.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from helpers import TINY, Launched, finish, free_port, one_phase, read_result

from perfedavg.methods import METHODS

FLAGS = [*TINY, "--rounds", "4", "--client_num_per_round", "8", "--client_optimizer", "sgd"]
"""Half of the training clients a round, so that most train more than once."""
MORE: dict[str, list[str]] = {
    "fedrep": ["--head_epochs", "2"],
    "ditto": ["--unseen_fraction", "0", "--partition", "groups:5"],
}
"""Of one method all clients train, so that those are scored."""
IN_EVERY_RUN = ("fedrep", "ditto")
"""Which keep a part of a model, and a whole one. The others take minutes together."""
some = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow) for name in METHODS]
)


def flags_of(name: str) -> list[str]:
    flags = FLAGS if METHODS[name].goes_on and name != "maml" else one_phase(FLAGS)
    return [*flags, "--method", name, *MORE.get(name, [])]


Outcome = tuple[str, str]


def outcome(run: Path) -> Outcome:
    """The model's digest, and every score."""
    return str(read_result(run)["model_sha256"]), (run / "clients.csv").read_text()


@cache
def in_one_process(name: str, folder: Path) -> Outcome:
    with Launched() as launched:
        status, _, errors = finish(launched.start("single_process.py", *flags_of(name), "--run_dir", folder / name))
    assert status == 0, errors
    return outcome(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("single")


def start_workers(launched: Launched, port: str, num_workers: int, *fault: str) -> list[str]:
    """The first of which may have a fault. Returns the flags that the server shares with them."""
    shared = ["--port", port, "--world_size", str(num_workers + 1)]
    for rank in range(1, num_workers + 1):
        command = ["client_worker.py", *shared, "--rank", str(rank), "--device", "cpu"]
        launched.start(*(["benchmarks/planted_fault.py", *fault, *command] if fault and rank == 1 else command))
    return shared


@some
@pytest.mark.parametrize(
    "num_workers", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_workers_end_as_one_process(
    name: str, num_workers: int, folder: Path, launched: Launched, tmp_path: Path
) -> None:
    shared = start_workers(launched, str(free_port()), num_workers)
    server = launched.start("server.py", *shared, "--run_dir", tmp_path / "run", *flags_of(name))
    status, _, errors = finish(server)
    assert status == 0, errors
    assert outcome(tmp_path / "run") == in_one_process(name, folder)


@some
def test_a_worker_that_dies_changes_nothing(name: str, folder: Path, launched: Launched, tmp_path: Path) -> None:
    """In the middle of the third round, with clients that trained elsewhere before."""
    fault = ["worker sending", "fedavg", "3", "SIGKILL", str(tmp_path / "note")]
    shared = start_workers(launched, str(free_port()), 2, *fault)
    server = launched.start("server.py", *shared, "--run_dir", tmp_path / "run", *flags_of(name))
    status, _, errors = finish(server)
    assert status == 0, errors
    assert "lost worker 1" in errors, errors
    assert outcome(tmp_path / "run") == in_one_process(name, folder)


@some
def test_a_server_that_dies_goes_on(name: str, folder: Path, launched: Launched, tmp_path: Path) -> None:
    """Its workers wait for it."""
    shared = start_workers(launched, str(free_port()), 2)
    fault = ["server stepping", "fedavg", "3", "SIGKILL", str(tmp_path / "note")]
    own = [*shared, "--run_dir", str(tmp_path / "run"), *flags_of(name), "--checkpoint_every", "1"]
    assert finish(launched.start("benchmarks/planted_fault.py", *fault, "server.py", *own))[0] == -9
    server = launched.start("server.py", *shared, "--resume", tmp_path / "run")
    status, _, errors = finish(server)
    assert status == 0, errors
    assert outcome(tmp_path / "run") == in_one_process(name, folder)
