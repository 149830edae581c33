"""Real processes that die, hang and come back: the result must be that of a run that was left alone."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    TINY,
    Launched,
    assert_one_clear_line,
    finish,
    free_port,
    launch_fork,
    network_flags,
    one_phase,
    read_result,
    wait_for_line,
    wait_until_stopped,
)

from benchmarks.faults import EXPERIMENT, MATRIX, Result, Row, run_row, run_undisturbed
from perfedavg.recording.files import read_tensors

ALWAYS = (
    Row("worker training", "fedavg", 2, "SIGKILL", "again"),
    Row("worker scoring", "fedavg", 4, "SIGSTOP", "continued"),
    Row("server stepping", "fine_tune", 1, "SIGTERM", "again"),
)
"""Of the fault matrix, the rows that every run of the tests goes through: each process, each kind of signal, each kind
of what follows in which the struck process comes back."""
REST = [row for row in MATRIX if row not in ALWAYS]
LIGHT = [*EXPERIMENT, "--model", "mlp", "--local_epochs", "12", "--fine_tune_local_epochs", "12"]
"""The experiment with a smaller model; a worker that is started again has work to do when it comes back."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed") / "run", launch_fork, LIGHT)


@pytest.fixture(scope="module")
def whole_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run_undisturbed(tmp_path_factory.mktemp("whole") / "run", launch_fork)


def assert_same(result: Result, undisturbed: Result) -> None:
    assert result.model_sha256 == undisturbed.model_sha256
    assert result.rounds == undisturbed.rounds, "the metrics have no gaps and no repeats"
    assert result.scores == undisturbed.scores


def test_the_rows_of_every_run_are_of_the_matrix() -> None:
    assert set(ALWAYS) < set(MATRIX)


@pytest.mark.parametrize("row", ALWAYS, ids=[row.name for row in ALWAYS])
def test_a_fault_changes_nothing_in_the_result(row: Row, undisturbed: Result, tmp_path: Path) -> None:
    assert_same(run_row(row, tmp_path / "run", launch_fork, LIGHT), undisturbed)


def test_a_fault_changes_nothing_with_keys_either(undisturbed: Result, keys: Path, tmp_path: Path) -> None:
    """Death in the middle of a message that is encrypted and over the server's one port, and another worker in place
    of the first."""
    row = Row("worker sending", "fedavg", 1, "SIGKILL", "again")
    assert_same(run_row(row, tmp_path / "run", launch_fork, LIGHT, network_flags("keys", keys)), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("row", REST, ids=[row.name for row in REST])
def test_the_rest_of_the_fault_matrix(row: Row, whole_undisturbed: Result, tmp_path: Path) -> None:
    """With the experiment of benchmarks/faults.py, which leaves every struck process the time to come back."""
    assert_same(run_row(row, tmp_path / "run", launch_fork), whole_undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "transport", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("tcp", "keys")]
)
@pytest.mark.parametrize("row", MATRIX, ids=[row.name for row in MATRIX])
def test_the_fault_matrix_on_the_servers_one_port(
    row: Row, transport: str, whole_undisturbed: Result, keys: Path, tmp_path: Path
) -> None:
    """In plain text and encrypted; gloo carried the tensors in the rows above. Each has its own test process."""
    network = network_flags(transport, keys)
    assert_same(run_row(row, tmp_path / "run", launch_fork, network=network), whole_undisturbed)


KEEPING = [*one_phase(LIGHT), "--method", "ditto"]
"""The experiment with a method that keeps a model of each client's own."""
KEEPING_ROWS = [
    Row("worker training", "fedavg", 3, "SIGKILL", "again"),
    Row("worker sending", "fedavg", 3, "SIGKILL", "others"),
    Row("worker scoring", "fedavg", 4, "SIGKILL", "others"),
    Row("server waiting", "fedavg", 3, "SIGKILL", "again"),
    Row("server keeping", "fedavg", 3, "SIGKILL", "again"),
    Row("server keeping", "fedavg", 4, "SIGTERM", "again"),
    Row("server stepping", "fedavg", 4, "SIGKILL", "again"),
    Row("server saving", "fedavg", 4, "SIGKILL", "again"),
]


@pytest.fixture(scope="module")
def keeping_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, str]]:
    folder = tmp_path_factory.mktemp("keeping") / "run"
    return run_undisturbed(folder, launch_fork, KEEPING), states_of(folder)


def states_of(folder: Path) -> dict[str, str]:
    """The checksums of what each client keeps at the end, by the names of the files."""
    files = (folder / "run" / "client_states").iterdir()
    return {file.name: read_tensors(file)[1]["crc32"] for file in files}


@pytest.mark.slow
@pytest.mark.parametrize("row", KEEPING_ROWS, ids=[row.name for row in KEEPING_ROWS])
def test_a_fault_changes_nothing_in_what_clients_keep(
    row: Row, keeping_undisturbed: tuple[Result, dict[str, str]], tmp_path: Path
) -> None:
    """Nor in the scores of those that trained, which start from it."""
    undisturbed, states = keeping_undisturbed
    assert any("trained" in line for line in undisturbed.scores)
    assert_same(run_row(row, tmp_path / "run", launch_fork, KEEPING), undisturbed)
    assert states_of(tmp_path / "run") == states


def test_a_worker_more_is_taken_in_and_then_the_first_ones_may_leave(launched: Launched, tmp_path: Path) -> None:
    """world_size is the number to start with; ranks beyond it may join, and the run may go over to them.

    The first worker stops itself and stands still until the other is there, so that the run cannot end before.
    """
    flags = [*TINY, "--rounds", "10"]
    server, port = launched.start_server(tmp_path / "run", 2, *flags, "--worker_timeout_seconds", "300")
    fault = ("worker training", "fedavg", "3", "SIGSTOP", tmp_path / "stopped")
    words = ("client_worker.py", "--port", str(port), "--rank", "1", "--device", "cpu")
    first = launched.start("benchmarks/planted_fault.py", *fault, *words)
    wait_until_stopped(first)
    launched.start_worker(port, 2, 7)
    wait_for_line(server, "worker 7 is ready")
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    wait_for_line(server, "lost worker 1")
    status, _, errors = finish(server)
    assert status == 0, errors
    single = launched.start("single_process.py", *flags, "--run_dir", tmp_path / "single")
    assert finish(single)[0] == 0
    assert read_result(tmp_path / "run")["model_sha256"] == read_result(tmp_path / "single")["model_sha256"]


def test_without_workers_the_run_is_saved_and_ends(launched: Launched, tmp_path: Path) -> None:
    flags = ("--rounds", "100000", "--checkpoint_every", "100000", "--worker_wait_seconds", "2")
    server, port = launched.start_server(tmp_path / "run", 2, *TINY, *flags)
    worker = launched.start_worker(port, 2, 1)
    wait_for_line(server, "FedAvg round 2/")
    worker.kill()
    wait_for_line(server, "lost worker 1")
    wait_for_line(server, "saved; continue with: ")
    assert_one_clear_line(server, "no worker is left, and none came within 2 s (--worker_wait_seconds)")
    assert list((tmp_path / "run" / "checkpoint").glob("fedavg-*.safetensors"))


def test_a_client_that_cannot_be_worked_on_ends_the_run_with_its_reason(launched: Launched, tmp_path: Path) -> None:
    """It would fail on every worker, so it must not use them up one after the other."""
    (tmp_path / "own.py").write_text(
        """
import torch

class Tones:
    num_classes = 2
    fingerprint = "tones"
    train_client_ids, unseen_client_ids = range(8), range(8, 10)

    def __init__(self, data_root, num_clients, seed):
        pass

    def num_train_examples(self, client_id):
        return 16

    def client_data(self, client_id):
        if client_id == 3:
            raise ValueError("client 3 has no data today")
        return Client()

    def build_model(self):
        return torch.nn.Linear(1, 2)

class Client:
    train_inputs, train_labels = torch.ones(16, 1), torch.zeros(16, dtype=torch.int64)
    test_inputs, test_labels = torch.ones(4, 1), torch.zeros(4, dtype=torch.int64)
"""
    )
    port = str(free_port())
    flags = ("--dataset", "own:Tones", "--client_num_per_round", "8", "--run_dir", tmp_path / "run", "--port", port)
    server = launched.start("server.py", *flags, cwd=tmp_path)
    words = ("client_worker.py", "--port", port, "--device", "cpu", "--rank")
    for worker in [launched.start(*words, rank, cwd=tmp_path) for rank in ("1", "2")]:
        assert_one_clear_line(worker, "client 3 has no data today")
    assert_one_clear_line(server, "client 3 has no data today")


def test_a_run_begins_with_the_workers_for_which_there_are_descriptors(launched: Launched, tmp_path: Path) -> None:
    """gloo ends the process that runs out of them; the workers for which there are none are refused with a line.

    The run begins when all have asked, or one might come when it is over.
    """
    (tmp_path / "server_with_few.py").write_text(
        f"""
import resource, runpy, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from multi_process.server import WorkerPool
from multi_process.transport.server_network import ServerNetwork
asked, check, setup = threading.Semaphore(0), ServerNetwork._check_descriptors, WorkerPool.setup

def count_and_check(network, control):
    asked.release()
    check(network, control)

def set_up_when_all_have_asked(pool):
    for _ in range(5):
        asked.acquire()
    setup(pool)

ServerNetwork._check_descriptors, WorkerPool.setup = count_and_check, set_up_when_all_have_asked
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
runpy.run_path({str(ROOT / "server.py")!r}, run_name="__main__")
"""
    )
    port = str(free_port())
    flags = ("--port", port, "--world_size", "6", "--run_dir", str(tmp_path / "run"), *TINY)
    server = launched.start(tmp_path / "server_with_few.py", *flags)
    workers = [launched.start_worker(int(port), 6, rank, "--threads", "1") for rank in range(1, 6)]
    ends = [finish(process) for process in workers]
    status, _, errors = finish(server)
    assert status == 0, errors
    assert "file descriptors run short" in errors
    refused = [errors for status, _, errors in ends if status == 2]
    assert 1 <= len(refused) <= 4
    assert all("the server has no file descriptors left for another worker" in errors for errors in refused)
    assert all(status in (0, 2) for status, _, _ in ends)
    assert (tmp_path / "run" / "result.json").exists()
