"""What clients keep between rounds, in memory and in files: when it is there, what is left of it, what faults do."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CountingFedAvg,
    Difference,
    QuadraticClients,
    half_squared_norm,
    make_config,
    read_result,
    with_method,
)

from perfedavg.contracts import ClientStateStore
from perfedavg.engine.client_states import BATCH_BYTES, ClientState, StatesInMemory, in_batches
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.methods import FedAvg
from perfedavg.recorded_run import run_and_record
from perfedavg.recording import client_states
from perfedavg.recording.client_states import References, StateFiles
from perfedavg.recording.files import read_checked
from perfedavg.recording.run_folder import RunFolder
from perfedavg.recording.runs import RecordedRun
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.flat_model import flatten


def state(value: float) -> ClientState:
    return {"model": torch.full((3,), value), "rounds": torch.tensor([int(value)])}


def value_of(store: ClientStateStore, client_id: int) -> float | None:
    kept = store.get(client_id)
    return float(kept["model"][0]) if kept else None


def put_round(store: ClientStateStore, round_number: int, *client_ids: int, phase: Phase = Phase.FEDAVG) -> None:
    """Clients keep the number of the round."""
    store.begin_round(phase, round_number)
    for client_id in client_ids:
        store.put(client_id, state(round_number))
    store.commit(client_ids)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def settled(store: StateFiles) -> StateFiles:
    """The store, once its writer has done all that it was asked for."""
    store._writer.submit(lambda: None).result()
    return store


@pytest.fixture(params=["memory", "files"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ClientStateStore:
    return StatesInMemory() if request.param == "memory" else StateFiles(tmp_path / "client_states")


def test_what_is_put_is_there_when_the_round_is_over(store: ClientStateStore) -> None:
    assert store.get(1) == {}
    store.begin_round(Phase.FEDAVG, 1)
    store.put(1, state(1.0))
    assert store.get(1) == {}, "its result may still get lost"
    store.commit([1])
    assert value_of(store, 1) == 1.0
    assert torch.equal(store.get(1)["rounds"], torch.tensor([1]))


def test_what_was_put_and_not_taken_over_is_forgotten(store: ClientStateStore) -> None:
    """As of a client whose worker died before its result came, or whose update was refused."""
    put_round(store, 1, 1, 2)
    store.begin_round(Phase.FEDAVG, 2)
    store.put(1, state(2.0))
    store.put(2, state(2.0))
    store.commit([2])
    store.begin_round(Phase.FEDAVG, 3)
    store.put(1, state(3.0))
    store.begin_round(Phase.FEDAVG, 4)
    store.commit([])
    assert [value_of(store, client_id) for client_id in (1, 2)] == [1.0, 2.0]


def test_what_is_put_again_replaces_what_was(store: ClientStateStore) -> None:
    store.begin_round(Phase.FEDAVG, 1)
    store.put(1, state(7.0))
    store.put(1, state(1.0))
    store.commit([1])
    assert value_of(store, 1) == 1.0


def test_what_is_given_out_may_be_changed(store: ClientStateStore) -> None:
    put_round(store, 1, 1)
    store.get(1)["model"].fill_(9.0)
    assert value_of(store, 1) == 1.0


def test_a_phase_begins_without_any(store: ClientStateStore) -> None:
    put_round(store, 1, 1)
    store.reset()
    assert store.get(1) == {}


def test_reading_ahead_changes_nothing(store: ClientStateStore) -> None:
    put_round(store, 1, 1, 2, 3)
    store.versions() if isinstance(store, StateFiles) else None
    store.read_ahead([1, 2, 3, 4])
    assert [value_of(store, client_id) for client_id in (3, 1, 4, 2, 1)] == [1.0, 1.0, None, 1.0, 1.0]
    put_round(store, 2, 1, 2)
    store.read_ahead([1, 2, 3])
    assert [value_of(store, client_id) for client_id in (1, 2, 3)] == [2.0, 2.0, 1.0]


def test_no_more_is_read_ahead_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one file, and so two: the next is read when one of them has been asked for."""
    store = StateFiles(tmp_path / "states")
    put_round(store, 1, *range(5))
    store.versions()
    size = (tmp_path / "states" / "0-fedavg-000001.safetensors").stat().st_size
    monkeypatch.setattr(client_states, "MAX_AHEAD_BYTES", size + 1)
    store.read_ahead(range(5))
    assert len(store._ahead) == 2
    for client_id, num_ahead in zip(range(5), (2, 2, 2, 1, 0), strict=True):
        assert value_of(store, client_id) == 1.0
        assert len(store._ahead) == num_ahead


def test_only_what_a_client_keeps_and_what_a_checkpoint_refers_to_is_on_the_disk(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    store = StateFiles(folder)
    assert not folder.exists(), "a method without state has no folder"
    put_round(store, 1, 1, 2)
    put_round(store, 2, 1)
    assert store.versions() == {1: 2, 2: 1}
    assert names(settled(store)._folder) == ["1-fedavg-000002.safetensors", "2-fedavg-000001.safetensors"]
    store.keep([References(Phase.FEDAVG, store.versions())])
    put_round(store, 3, 1)
    put_round(store, 4, 1)
    store.begin_round(Phase.FEDAVG, 5)
    store.put(2, state(5.0))
    store.begin_round(Phase.FEDAVG, 6)
    kept = ["1-fedavg-000002.safetensors", "1-fedavg-000004.safetensors", "2-fedavg-000001.safetensors"]
    assert store.versions() == {1: 4, 2: 1}
    assert names(settled(store)._folder) == kept
    store.reset()
    assert names(settled(store)._folder) == [kept[0], kept[2]], "phase 1's last checkpoint refers to them"
    store.keep([References(Phase.FINE_TUNE, {})])
    assert names(settled(store)._folder) == []


def test_a_run_that_goes_on_keeps_what_its_checkpoint_says(tmp_path: Path) -> None:
    """And nothing of what the process that was killed wrote after it."""
    folder = tmp_path / "states"
    killed = StateFiles(folder)
    put_round(killed, 1, 1, 2)
    references = References(Phase.FEDAVG, killed.versions())
    killed.keep([references])
    put_round(killed, 2, 2, 3)
    killed.versions()
    (folder / ".4-fedavg-000002.safetensors.partial").write_bytes(b"half")
    (folder / "of the user's own").touch()
    store = StateFiles(folder)
    store.check(references)
    store.go_on(references, [references])
    assert [value_of(store, client_id) for client_id in (1, 2, 3)] == [1.0, 1.0, None]
    expected = ["1-fedavg-000001.safetensors", "2-fedavg-000001.safetensors", "of the user's own"]
    assert names(settled(store)._folder) == expected
    put_round(store, 2, 2)
    assert value_of(store, 2) == 2.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x07"),
        lambda path: path.write_bytes((path.parent / "2-fedavg-000001.safetensors").read_bytes()),
    ],
    ids=["missing", "cut short", "a byte", "another client's"],
)
def test_what_is_damaged_is_a_line_and_no_state(damage: Callable[[Path], object], tmp_path: Path) -> None:
    store = StateFiles(tmp_path)
    put_round(store, 1, 1, 2)
    references = References(Phase.FEDAVG, store.versions())
    damage(tmp_path / "1-fedavg-000001.safetensors")
    line = r"1-fedavg-000001.safetensors: what client 1 keeps cannot be read \([^\n]+\)$"
    with pytest.raises(ValueError, match=line):
        store.get(1)
    assert value_of(store, 2) == 1.0
    with pytest.raises(ValueError, match=line):
        store.versions()  # to which no checkpoint may refer
    with pytest.raises(ValueError, match=line):
        StateFiles(tmp_path).check(references)


class Disk:
    """Lets the writing of states wait, or fail as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        self.is_free = threading.Event()
        self.is_free.set()
        self.is_asked = threading.Event()
        self._replace = client_states.replace_file
        monkeypatch.setattr(client_states, "replace_file", self._write)

    def _write(self, *args: Any, **kwargs: Any) -> None:
        is_full = self.is_full
        self.is_asked.set()
        assert self.is_free.wait(60)
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._replace(*args, **kwargs)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.is_free.set()


def test_training_goes_on_while_states_are_written(disk: Disk, tmp_path: Path) -> None:
    disk.is_free.clear()
    store = StateFiles(tmp_path)
    put_round(store, 1, 1, 2)
    put_round(store, 2, 1)
    assert [value_of(store, client_id) for client_id in (1, 2)] == [2.0, 1.0]
    assert not names(tmp_path)
    disk.is_free.set()
    assert store.versions() == {1: 2, 2: 1}
    assert [value_of(StateFiles(tmp_path), client_id) for client_id in (1, 2)] == [None, None]
    assert names(settled(store)._folder) == ["1-fedavg-000002.safetensors", "2-fedavg-000001.safetensors"]


def test_who_brings_more_than_may_wait_waits(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the memory of a server whose disk is slower than its workers stays bounded."""
    monkeypatch.setattr(client_states, "MAX_UNWRITTEN_BYTES", 1)
    disk.is_free.clear()
    store = StateFiles(tmp_path)
    bringing = threading.Thread(target=put_round, args=(store, 1, 1, 2))
    bringing.start()
    assert disk.is_asked.wait(60)
    bringing.join(0.2)
    assert bringing.is_alive()
    assert len(store._unwritten) == 1
    disk.is_free.set()
    bringing.join(60)
    assert store.versions() == {1: 1, 2: 1}


def test_a_round_that_is_repeated_keeps_what_is_put_then(disk: Disk, tmp_path: Path) -> None:
    """The writer, still busy with the first attempt's state, writes the second's before it removes the first's."""
    disk.is_free.clear()
    store = StateFiles(tmp_path)
    store.begin_round(Phase.FEDAVG, 1)
    store.put(1, state(7.0))
    assert disk.is_asked.wait(60)
    put_round(store, 1, 1)
    disk.is_free.set()
    assert store.versions() == {1: 1}
    assert value_of(settled(store), 1) == 1.0


def test_a_failure_of_before_is_no_answer(disk: Disk, tmp_path: Path) -> None:
    """There is room again when a checkpoint asks for the states, while a write of before is still to fail."""
    disk.is_full = True
    disk.is_free.clear()
    store = StateFiles(tmp_path)
    put_round(store, 1, 1, 2)
    assert disk.is_asked.wait(60)
    disk.is_full = False
    threading.Timer(0.2, disk.is_free.set).start()
    assert store.versions() == {1: 1, 2: 1}


def test_on_a_full_disk_what_can_wait_waits(disk: Disk, tmp_path: Path) -> None:
    store = StateFiles(tmp_path)
    disk.is_full = True
    put_round(store, 1, 1, 2)
    put_round(store, 2, 1)
    with pytest.raises(OSError, match="No space left"):
        store.versions()
    assert [value_of(store, client_id) for client_id in (1, 2)] == [2.0, 1.0]
    disk.is_full = False
    assert store.versions() == {1: 2, 2: 1}
    assert names(settled(store)._folder) == ["1-fedavg-000002.safetensors", "2-fedavg-000001.safetensors"]


def test_states_travel_a_few_at_a_time_and_are_read_when_they_leave() -> None:
    read: list[int] = []

    def states() -> Iterator[tuple[int, ClientState]]:
        for client_id in range(6):
            read.append(client_id)
            yield client_id, {} if client_id == 1 else {"model": torch.zeros(BATCH_BYTES // 8, dtype=torch.float32)}

    batches = in_batches(states())
    assert list(next(batches)) == [0, 2]
    assert read == [0, 1, 2]
    assert [list(batch) for batch in batches] == [[3, 4], [5]]


START = [2.0, -1.0]
CENTRES = [[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5]]
CLIENTS = QuadraticClients(CENTRES, (10, 10, 10, 10, 10), num_unseen=1)


def counting(method: FedAvg | None = None) -> ExperimentConfig:
    """Two of four clients a round, in two phases of three rounds."""
    phase = PhaseConfig(3, 1, OptimizerConfig("sgd", 0.5), OptimizerConfig("sgd", 1.0), num_local_steps=1)
    config = make_config(num_clients=5, cohort_size=2, fedavg=phase, fine_tune=phase)
    for each in Phase:
        config = with_method(config, each, method or CountingFedAvg())
    return config


def run_or_go_on(path: Path, config: ExperimentConfig, checkpoint_every: int = 2) -> None:
    folder = RunFolder(path, None, checkpoint_every, resume=path.exists())
    executor = LocalExecutor(config, Difference(START), CLIENTS, loss_function=half_squared_norm)
    try:
        run_and_record(config, executor, CLIENTS, Difference(START), folder, {"world_size": 1})
    finally:
        folder.client_states._writer.shutdown()  # no thread outlives a process, whose place the next run takes
        folder.close()


def final_states(path: Path) -> dict[str, int]:
    """How many rounds each client has counted, by the name of its file."""
    files = (path / "client_states").iterdir()
    return {file.name: int(read_checked(file, "client_state")[1]["rounds"]) for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run_or_go_on(path, counting())
    return path


def assert_same_end(path: Path, whole: Path) -> None:
    assert read_result(path)["model_sha256"] == read_result(whole)["model_sha256"]
    assert (path / "clients.csv").read_bytes() == (whole / "clients.csv").read_bytes()
    assert final_states(path) == final_states(whole)
    assert not (path / "checkpoint").exists()


def test_the_states_at_the_end_stay_and_can_be_read(whole: Path) -> None:
    run = RecordedRun.read(whole)
    files = final_states(whole)
    assert 2 <= len(files) <= 4
    for client_id in range(5):
        trained = [name for name in files if name.startswith(f"{client_id}-fine_tune-")]
        rounds = run.client_state(client_id).get("rounds")
        assert (rounds is None) == (not trained)
        assert rounds is None or 1 <= int(rounds) <= 3


def test_a_method_without_state_writes_nothing(tmp_path: Path) -> None:
    run_or_go_on(tmp_path / "run", counting(FedAvg()))
    assert not (tmp_path / "run" / "client_states").exists()
    assert RecordedRun.read(tmp_path / "run").client_state(0) == {}


class KilledError(Exception):
    """Stands for SIGKILL: from the file operation of a given number on, nothing reaches the disk any more."""


class Kill:
    def __init__(self, at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._at = at
        self._lock = threading.Lock()
        for owner, name in ((os, "replace"), (Path, "unlink"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.count += 1
                if self._at is not None and self.count >= self._at:
                    raise KilledError
            return operation(*args, **kwargs)

        return counted


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_server_that_dies_at_any_write_ends_with_the_same_states(stride: int, whole: Path, tmp_path: Path) -> None:
    """Before and after a state, a checkpoint or a result gets its name, and before and after an old one is removed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill = Kill(None, monkeypatch)
        run_or_go_on(tmp_path / "counted", counting())
    assert kill.count > 60
    for at in range(7, kill.count + 1, stride):  # from the first one after config.json's on
        path = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Kill(at, monkeypatch)
            with contextlib.suppress(KilledError, OSError):
                run_or_go_on(path, counting())
        if not (path / "result.json").exists():
            run_or_go_on(path, counting())
            assert_same_end(path, whole)
        for client_id in range(5):  # also where what is older has not been removed after the result was written
            assert RecordedRun.read(path).client_state(client_id) == RecordedRun.read(whole).client_state(client_id)


@pytest.mark.parametrize("is_older_one_left", [True, False])
def test_a_lost_state_gives_way_to_the_checkpoint_before(
    is_older_one_left: bool, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where that does not refer to it too."""
    path = tmp_path / "run"

    class StopError(Exception):
        pass

    def stop(*told: object) -> None:
        raise StopError

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(RunFolder, "phase_ended", stop)
        with pytest.raises(StopError):
            run_or_go_on(path, counting(), checkpoint_every=1)
    last = {file.name.partition("-")[0]: file for file in sorted((path / "client_states").iterdir())}
    (lost, *_) = [file for file in last.values() if file.stem.endswith("3") == is_older_one_left]
    lost.write_bytes(lost.read_bytes()[:-1])
    capsys.readouterr()
    if is_older_one_left:
        run_or_go_on(path, counting())
        assert_same_end(path, whole)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert "damaged, and so set aside: fedavg-000003.safetensors" in line
        assert f"{lost.name}: what client" in line
        assert "going on from fedavg-000002.safetensors" in line
    else:
        with pytest.raises(ValueError, match=f"no checkpoint in .* can be read: .*{lost.name}: what client"):
            run_or_go_on(path, counting())


def test_a_state_that_is_lost_during_the_run_ends_it_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no checkpoint may refer to it."""
    original = RunFolder.checkpoint_due

    def damage(folder: RunFolder, state: ExperimentState) -> None:
        original(folder, state)
        if state.num_rounds == 1:
            folder.client_states.versions()  # which are files then
            for file in (folder.path / "client_states").iterdir():
                file.write_bytes(b"")

    monkeypatch.setattr(RunFolder, "checkpoint_due", damage)
    with pytest.raises(ValueError, match=r"what client . keeps cannot be read"):
        run_or_go_on(tmp_path / "run", counting(), checkpoint_every=1000)
    assert "was saved (" in capsys.readouterr().err


def test_a_disk_too_full_for_states_ends_the_run_with_a_line_and_a_checkpoint(
    disk: Disk, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_states, "MAX_UNWRITTEN_BYTES", 1)
    original = RunFolder.checkpoint_due

    def fill(folder: RunFolder, state: ExperimentState) -> None:
        original(folder, state)
        disk.is_full = True

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunFolder, "checkpoint_due", fill)
        with pytest.raises(OSError, match=r"what clients keep cannot be written to .*No space left.*make room there$"):
            run_or_go_on(tmp_path / "run", counting(), checkpoint_every=1)
    assert "continue with: single_process.py --resume" in capsys.readouterr().err
    disk.is_full = False
    run_or_go_on(tmp_path / "run", counting())
    assert_same_end(tmp_path / "run", whole)


def test_in_memory_the_run_is_the_same(whole: Path) -> None:
    config = counting()
    executor = LocalExecutor(config, Difference(START), CLIENTS, loss_function=half_squared_norm)
    outcome = run_experiment(config, executor, CLIENTS, ExperimentState.fresh(config, flatten(Difference(START))))
    assert outcome.model_sha256 == read_result(whole)["model_sha256"]
