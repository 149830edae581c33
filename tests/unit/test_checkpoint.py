"""A run goes on from a checkpoint as if nothing had happened, wherever it was stopped and whatever the disk did."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from helpers import Difference, QuadraticClients, half_squared_norm, make_config
from torch import Tensor

from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentOutcome, ExperimentState, experiment_rounds, run_experiment
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.checkpoint import Checkpoints, RunIdentity
from perfedavg.recording.client_states import StateFiles
from perfedavg.recording.files import checked_file
from perfedavg.recording.run_folder import RunFolder
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.flat_model import flatten
from perfedavg.training.optimizers import ServerOptimizer

START = [2.0, -1.0]
CENTRES = [[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5], [0.5, -0.75]]
SIZES = [25, 7, 12, 40, 18, 9]
CLIENTS = QuadraticClients(CENTRES, SIZES, num_unseen=2)
SGD = OptimizerConfig("sgd", 0.1)
CONFIG = make_config(
    num_clients=None,
    cohort_size=3,
    fedavg=PhaseConfig(3, 1, SGD, OptimizerConfig("momentum", 0.7)),
    fine_tune=PhaseConfig(2, 1, SGD, OptimizerConfig("adam", 0.01)),
    eval_every=2,
)
ADAM_FIRST = replace(
    CONFIG,
    fedavg=replace(CONFIG.fedavg, server_optimizer=OptimizerConfig("adam", 0.1)),
    fine_tune=PhaseConfig(3, 1, SGD, OptimizerConfig("momentum", 0.5, momentum=0.5)),
)
RUN = {"world_size": 1}


class StoppedHereError(Exception):
    """Stands for whatever ends a run."""


class Events:
    """Counts what happens in a run, and stops it at the event of a given number."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.count = 0
        self._stop_at = stop_at

    def happened(self) -> None:
        self.count += 1
        if self.count == self._stop_at:
            raise StoppedHereError


class StoppingExecutor:
    """Each request is an event, before it is worked on."""

    def __init__(self, inner: LocalExecutor, events: Events) -> None:
        self._inner = inner
        self._events = events
        self.kernels = inner.kernels

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        self._events.happened()
        return self._inner.train(task, parameters)

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        self._events.happened()
        return self._inner.score(task, parameters)


class StoppingObserver:
    """Each call is an event."""

    def __init__(self, events: Events) -> None:
        self._happened = events.happened

    def phase_started(self, *told: object) -> None:
        self._happened()

    def round_ended(self, *told: object) -> None:
        self._happened()

    def checkpoint_due(self, *told: object) -> None:
        self._happened()

    def scoring_started(self, *told: object) -> None:
        self._happened()

    def phase_ended(self, *told: object) -> None:
        self._happened()


def local_executor(config: ExperimentConfig) -> LocalExecutor:
    return LocalExecutor(config, Difference(START), CLIENTS, loss_function=half_squared_norm)


def start_or_resume(config: ExperimentConfig, folder: RunFolder) -> ExperimentState:
    state = folder.begin(config, CLIENTS, RUN)
    return state or ExperimentState.fresh(config, flatten(Difference(START)))


def run_part(
    config: ExperimentConfig, path: Path, events: Events, saves: bool = True, checkpoint_every: int = 1000
) -> ExperimentOutcome | None:
    """One process's part of the run in a folder: up to the event that stops it (then None), or to the end.

    saves: whether a checkpoint is saved where it stops, as at SIGTERM; without, it ends as at SIGKILL.
    """
    folder = RunFolder(path, {}, checkpoint_every, resume=path.exists())
    state = start_or_resume(config, folder)
    executor = StoppingExecutor(local_executor(config), events)
    watched = StoppingObserver(events)
    try:
        return run_experiment(config, executor, CLIENTS, state, [watched, folder, watched])
    except StoppedHereError:
        if saves and state.has_begun:
            with state.lock:
                folder.save_checkpoint(state)
        return None
    finally:
        folder.close()


def metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "idle_share")} for line in lines]


def assert_same_run(path: Path, outcome: ExperimentOutcome | None, reference: ExperimentOutcome, whole: Path) -> None:
    assert outcome is not None
    assert torch.equal(outcome.parameters, reference.parameters)
    assert outcome.scores == reference.scores
    assert metrics(path) == metrics(whole)
    assert (path / "clients.csv").read_bytes() == (whole / "clients.csv").read_bytes()


@pytest.mark.parametrize(
    ("config", "saves"),
    [
        pytest.param(CONFIG, True, id="momentum then adam, saved where it stopped"),
        pytest.param(ADAM_FIRST, False, id="adam then momentum, killed"),
        pytest.param(CONFIG, False, id="momentum then adam, killed", marks=pytest.mark.slow),
        pytest.param(ADAM_FIRST, True, id="adam then momentum, saved where it stopped", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_anywhere_ends_as_one_left_alone(config: ExperimentConfig, saves: bool, tmp_path: Path) -> None:
    """At every request to the executor, and before and after the files are written at every event."""
    events = Events()
    reference = run_part(config, tmp_path / "whole", events)
    assert reference is not None
    assert events.count >= 40
    for stop_at in range(1, events.count + 1):
        path = tmp_path / str(stop_at)
        assert run_part(config, path, Events(stop_at), saves, checkpoint_every=2) is None
        assert_same_run(path, run_part(config, path, Events()), reference, tmp_path / "whole")


def test_a_run_stopped_again_and_again_ends_as_one_left_alone(tmp_path: Path) -> None:
    reference = run_part(CONFIG, tmp_path / "whole", Events())
    assert reference is not None
    parts = [run_part(CONFIG, tmp_path / "run", Events(8)) for _ in range(6)]
    assert parts == [None] * 6
    outcome = run_part(CONFIG, tmp_path / "run", Events())
    assert_same_run(tmp_path / "run", outcome, reference, tmp_path / "whole")


def test_seconds_are_the_sum_over_all_parts(tmp_path: Path) -> None:
    """The first part claims to have taken 100 seconds."""
    identity = RunIdentity(CONFIG, CLIENTS.fingerprint, {})
    store = Checkpoints(tmp_path / "run" / "checkpoint", identity, StateFiles(tmp_path / "run" / "client_states"))
    run_part(CONFIG, tmp_path / "run", Events(12))
    state = store.load()
    assert state is not None
    assert 0.0 < state.phase_seconds[Phase.FEDAVG] < 50.0
    state.phase_seconds[Phase.FEDAVG] = 100.0
    store.save(state)
    outcome = run_part(CONFIG, tmp_path / "run", Events())
    assert outcome is not None
    assert 100.0 < outcome.phase_seconds[Phase.FEDAVG] < outcome.seconds < 150.0


def checkpoints(path: Path, **changes: Any) -> Checkpoints:
    identity = RunIdentity(CONFIG, CLIENTS.fingerprint, {"torch": "1", "numpy": "2", "commit": None})
    return Checkpoints(path, replace(identity, **changes), StateFiles(path / "client_states"))


def advanced_state(num_rounds: int = 2) -> ExperimentState:
    """A state after some rounds."""
    state = ExperimentState.fresh(CONFIG, flatten(Difference(START)))
    events = Events(2 * num_rounds + 1)  # a round is a request to train, and every second one also to score
    with pytest.raises(StoppedHereError):
        run_experiment(CONFIG, StoppingExecutor(local_executor(CONFIG), events), CLIENTS, state)
    return state


def save(store: Checkpoints, *num_rounds: int) -> None:
    state = advanced_state()
    for number in num_rounds:
        state.num_rounds = number
        store.save(state)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_the_last_two_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / ".fedavg-000001.safetensors.partial").write_text("of a process that was killed")
    store = checkpoints(folder)
    save(store, 1, 2, 3)
    assert names(folder) == ["fedavg-000002.safetensors", "fedavg-000003.safetensors"]
    store.remove()
    assert not folder.exists()


def test_phase_2_comes_after_phase_1(tmp_path: Path) -> None:
    store = checkpoints(tmp_path / "checkpoint")
    save(store, 2, 3)
    state = advanced_state()
    state.begin_phase(list(CONFIG.phases)[1], CONFIG.phases[list(CONFIG.phases)[1]])
    store.save(state)
    loaded = store.load()
    assert loaded is not None
    assert (loaded.phase, loaded.num_rounds) == (state.phase, 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content.replace(b"num_rounds", b"num_sounds"),
        lambda content: pickle.dumps({"parameters": [1.0]}),
    ],
    ids=["truncated", "empty", "a bit", "a name", "a pickle"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: Callable[[bytes], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = checkpoints(tmp_path)
    save(store, 1, 2)
    last = tmp_path / "fedavg-000002.safetensors"
    last.write_bytes(damage(last.read_bytes()))
    state = store.load()
    assert state is not None
    assert state.num_rounds == 1
    assert "damaged, and so set aside: fedavg-000002.safetensors" in capsys.readouterr().err
    assert names(tmp_path) == ["fedavg-000001.safetensors", "fedavg-000002.damaged"]


@pytest.mark.parametrize(
    "change",
    [
        {"phase": 7},
        {"phase": "x"},
        {"phase": "fine_tune", "num_rounds": 99},
        {"num_rounds": "2"},
        {"num_rounds": -1},
        {"pending_record": {"phase": 3}},
        {"pending_record": [1]},
        {"scores": []},
        {"scores": {"fedavg": ["unseen"]}},
        {"scores": {"fedavg": ["everybody"]}},
        {"phase_seconds": [1]},
        {"versions": 3},
        {"config": None},
        {"fingerprint": 3},
    ],
    ids=str,
)
def test_an_edited_checkpoint_gives_way_to_the_one_before(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever edits it may mend the checksum too; what it says must still be a state of this run."""
    store = checkpoints(tmp_path)
    save(store, 1, 2)
    last = tmp_path / "fedavg-000002.safetensors"
    with safetensors.safe_open(last, "pt") as file:
        content = json.loads(file.metadata()["checkpoint"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    text = json.dumps({**content, **change})
    last.write_bytes(checked_file("checkpoint", text, tensors))
    state = store.load()
    assert state is not None
    assert state.num_rounds == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged, and so set aside: fedavg-000002.safetensors" in line


def test_a_step_that_failed_in_its_middle_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where memory runs out between the optimizer's state and the parameters: half a step would be no step."""
    steps = Events(3)
    step = ServerOptimizer.step

    def failing(server: ServerOptimizer, mean_update: Tensor, rate_factor: float) -> None:
        steps.happened()
        step(server, mean_update, rate_factor)

    monkeypatch.setattr(ServerOptimizer, "step", failing)
    folder = RunFolder(tmp_path / "run", {}, checkpoint_every=1)
    with pytest.raises(StoppedHereError):
        run_and_record(CONFIG, local_executor(CONFIG), CLIENTS, Difference(START), folder, RUN)
    folder.close()
    assert "failed in its middle; continue from the checkpoint before it with" in capsys.readouterr().err
    assert names(tmp_path / "run" / "checkpoint") == ["fedavg-000001.safetensors", "fedavg-000002.safetensors"]


def test_an_error_saves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it is; here in the second round, long before a checkpoint is due."""
    folder = RunFolder(tmp_path / "run", {}, checkpoint_every=1000)
    executor = StoppingExecutor(local_executor(CONFIG), Events(3))
    with pytest.raises(StoppedHereError):
        run_and_record(CONFIG, executor, CLIENTS, Difference(START), folder, RUN)
    folder.close()
    said = f"checkpoint of FedAvg round 2 saved; continue with: single_process.py --resume {tmp_path / 'run'}\n"
    assert capsys.readouterr().err.endswith(said)
    assert names(tmp_path / "run" / "checkpoint") == ["fedavg-000002.safetensors"]


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    (tmp_path / "fedavg-000002.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: fedavg-000002.*start a new run"):
        checkpoints(tmp_path).load()
    assert names(tmp_path) == ["fedavg-000002.safetensors"], "neither executed nor thrown away"


def test_another_experiment_is_refused_by_the_settings_that_differ(tmp_path: Path) -> None:
    save(checkpoints(tmp_path), 1)
    other = replace(CONFIG, seed=7, fedavg=replace(CONFIG.fedavg, num_rounds=9))
    with pytest.raises(ValueError, match=r"another experiment: seed is 7, was 0; fedavg.num_rounds is 9, was 3"):
        checkpoints(tmp_path, config=other).load()


def test_other_data_are_refused(tmp_path: Path) -> None:
    save(checkpoints(tmp_path), 1)
    with pytest.raises(ValueError, match=r"made with other data \(fingerprint quadratic, not else\).*--data_root"):
        checkpoints(tmp_path, fingerprint="else").load()


def test_other_versions_are_said_but_not_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(checkpoints(tmp_path), 1)
    assert checkpoints(tmp_path, versions={"torch": "9", "numpy": "2", "commit": None}).load() is not None
    assert "other versions or processors (torch is 9, was 1)" in capsys.readouterr().err


def test_other_processors_are_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The result tells of every kind that the run was computed on, wherever it came to its end."""
    begun, resumed = checkpoints(tmp_path), checkpoints(tmp_path)
    begun._identity.kernels.add({"torch": "2", "torch's kernels": "AVX512"})
    save(begun, 1)
    kernels = resumed._identity.kernels
    kernels.add({"torch": "2", "torch's kernels": "AVX2"})
    assert resumed.load() is not None
    assert "other versions or processors (torch's kernels is AVX2, was AVX512)" in capsys.readouterr().err
    assert kernels.to_dict() == {"torch": ["2"], "torch's kernels": ["AVX2", "AVX512"]}


def test_no_instant_of_a_run_has_a_torn_state(tmp_path: Path) -> None:
    """Another thread saves under the lock, as a signal does, as often as it can; each one must load and go on."""
    folders: list[Path] = []
    state = ExperimentState.fresh(CONFIG, flatten(Difference(START)))
    running = threading.Event()
    running.set()

    def save_all_the_time() -> None:
        while running.is_set():
            with state.lock:
                if state.has_begun:
                    folders.append(tmp_path / str(len(folders)))
                    checkpoints(folders[-1]).save(state)

    thread = threading.Thread(target=save_all_the_time)
    thread.start()
    try:
        for _ in experiment_rounds(CONFIG, local_executor(CONFIG), CLIENTS, state):
            num_saved = len(folders)
            while len(folders) == num_saved and thread.is_alive():  # a thread may be kept waiting for long
                time.sleep(0.001)
        reference = ExperimentOutcome.of(state)
    finally:
        running.clear()
        thread.join()
    assert folders
    for folder in folders[:: max(1, len(folders) // 20)]:
        loaded = checkpoints(folder).load()
        assert loaded is not None
        outcome = run_experiment(CONFIG, local_executor(CONFIG), CLIENTS, loaded)
        assert torch.equal(outcome.parameters, reference.parameters)
        assert outcome.scores == reference.scores


def open_folder(path: Path, resume: bool = False, flags: Sequence[str] = ()) -> RunFolder:
    return RunFolder(path, dict.fromkeys(flags), resume=resume)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"--run_dir .*run is in use by another process"):
        open_folder(tmp_path / "run")
    folder.begin(CONFIG, CLIENTS, RUN)
    with pytest.raises(ValueError, match=r"--resume .*run is in use by another process"):
        open_folder(tmp_path / "run", resume=True)
    folder.close()
    open_folder(tmp_path / "run", resume=True).close()


def test_config_lists_every_resumption_and_keeps_the_original(tmp_path: Path) -> None:
    run_part(CONFIG, tmp_path / "run", Events(12))
    before = json.loads((tmp_path / "run" / "config.json").read_text())
    run_part(CONFIG, tmp_path / "run", Events(5))
    run_part(CONFIG, tmp_path / "run", Events())
    after = json.loads((tmp_path / "run" / "config.json").read_text())
    resumed = after.pop("resumed")
    assert after == before
    assert [set(entry) for entry in resumed] == [{"time", "run", "environment"}] * 2


def test_a_run_without_a_checkpoint_starts_from_its_first_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_part(CONFIG, tmp_path / "run", Events(10), saves=False)
    assert metrics(tmp_path / "run")
    capsys.readouterr()
    folder = open_folder(tmp_path / "run", resume=True)
    assert folder.begin(CONFIG, CLIENTS, RUN) is None
    folder.close()
    assert "no checkpoint yet, so it starts from its first round" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == []


def test_half_a_line_of_a_killed_process_is_no_line(tmp_path: Path) -> None:
    reference = run_part(CONFIG, tmp_path / "whole", Events())
    assert reference is not None
    run_part(CONFIG, tmp_path / "run", Events(15))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"phase": "fed')
    outcome = run_part(CONFIG, tmp_path / "run", Events())
    assert_same_run(tmp_path / "run", outcome, reference, tmp_path / "whole")
