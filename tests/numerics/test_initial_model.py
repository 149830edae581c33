"""`--rounds 0`: phase 2 begins with the initial weights; where there is no phase 2 either, these are what is scored.

If these failed, Reptile or MAML alone could not be had, nor the baseline of clients that train by themselves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers import Difference, QuadraticClients, half_squared_norm, make_config
from torch import Tensor

from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, parameters_sha256, run_experiment
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask
from perfedavg.methods.reptile import Reptile
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.run_folder import RunFolder
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig, Population
from perfedavg.training.flat_model import flatten

START = [2.0, -1.0]
CENTRES = [[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5], [0.5, -0.75]]
CLIENTS = QuadraticClients(CENTRES, (25, 7, 12, 40, 18, 9), num_unseen=2)
SGD = OptimizerConfig("sgd", 0.1)
LEFT_OUT = PhaseConfig(0, 1, SGD, OptimizerConfig("momentum", 1.0))
NO_TRAINING = make_config(num_clients=None, fedavg=LEFT_OUT, fine_tune=None, num_curve_epochs=2)
ONE_STEP = PhaseConfig(2, 1, SGD, OptimizerConfig("sgd", 0.5), num_local_steps=1, method=Reptile())
RUN = {"world_size": 1}


class CountingExecutor:
    """Counts the requests."""

    def __init__(self, config: ExperimentConfig) -> None:
        self._inner = LocalExecutor(config, Difference(START), CLIENTS, loss_function=half_squared_norm)
        self.kernels = self._inner.kernels
        self.num_trainings = 0
        self.scorings: list[ScoringTask] = []

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        self.num_trainings += 1
        return self._inner.train(task, parameters)

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        self.scorings.append(task)
        return self._inner.score(task, parameters)


class StoppedHereError(Exception):
    """Stands for whatever ends a run."""


class StopsAtTheEnd:
    """An observer that ends the run when the phase's scores are there."""

    def phase_ended(self, phase: Phase, scores: Mapping[Phase, object]) -> None:
        raise StoppedHereError

    def __getattr__(self, name: str) -> object:
        return lambda *told: None


def fresh(config: ExperimentConfig) -> ExperimentState:
    return ExperimentState.fresh(config, flatten(Difference(START)))


def test_the_initial_model_is_scored_as_it_is() -> None:
    """Before and after k steps at rate a of each unseen client, which leave (1 - a)^k of its way."""
    executor = CountingExecutor(NO_TRAINING)
    outcome = run_experiment(NO_TRAINING, executor, CLIENTS, fresh(NO_TRAINING))
    assert executor.num_trainings == 0
    assert torch.equal(outcome.parameters, torch.tensor(START, dtype=torch.float64))
    assert list(outcome.scores) == [Phase.FEDAVG]
    for score, size in zip(outcome.scores[Phase.FEDAVG][Population.UNSEEN], (18, 9), strict=True):
        w, centre = torch.tensor(START, dtype=torch.float64), CLIENTS.centres[score.client_id]
        loss = 0.5 * (w - centre).square().sum().item()
        steps = -(-size // NO_TRAINING.batch_size)
        assert score.initial["loss"] == pytest.approx(loss, rel=1e-12)
        assert score.personalized["loss"] == pytest.approx(loss * 0.9 ** (2 * steps), rel=1e-12)
        expected = [loss * 0.9 ** (2 * steps * epoch) for epoch in range(3)]
        assert [point["loss"] for point in score.by_epoch] == pytest.approx(expected, rel=1e-12)


def test_its_run_folder_is_whole_and_names_the_initial_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = RunFolder(tmp_path / "run"), Difference(START)
    run_and_record(NO_TRAINING, CountingExecutor(NO_TRAINING), CLIENTS, model, folder, RUN)
    folder.close()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["model_sha256"] == parameters_sha256(torch.tensor(START, dtype=torch.float64))
    assert result["rounds"] == result["phases"]["fedavg"]["rounds"] == 0
    assert [point["epochs"] for point in result["after_fedavg"]["by_epoch"]] == [0, 1, 2]
    assert result["after_fedavg"]["by_epoch"][0]["loss"] == result["after_fedavg"]["initial"]["loss"]
    assert "after_fine_tune" not in result
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b"", "there was no round"
    assert len((tmp_path / "run" / "clients.csv").read_text().splitlines()) == 3
    output = capsys.readouterr().out
    assert "\nuntrained " in output
    assert "after FedAvg" not in output


def test_phase_2_starts_from_the_initial_weights() -> None:
    """In each round the server goes half of the clients' mean step, which is a tenth of the way to the mean centre."""
    config = dataclasses.replace(NO_TRAINING, fine_tune=ONE_STEP)
    outcome = run_experiment(config, CountingExecutor(config), CLIENTS, fresh(config))
    w, centre = torch.tensor(START, dtype=torch.float64), CLIENTS.centres[:4].mean(0)
    torch.testing.assert_close(outcome.parameters, centre + 0.95**2 * (w - centre), rtol=1e-12, atol=1e-12)
    assert list(outcome.scores) == list(outcome.phase_seconds) == [Phase.FINE_TUNE]


def test_a_result_without_phase_1_has_the_scores_after_phase_2_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(NO_TRAINING, fine_tune=ONE_STEP)
    folder = RunFolder(tmp_path / "run")
    run_and_record(config, CountingExecutor(config), CLIENTS, Difference(START), folder, RUN)
    folder.close()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "after_fedavg" not in result
    assert list(result["phases"]) == ["fine_tune"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["round_number"]) for line in lines] == [("fine_tune", 1), ("fine_tune", 2)]
    assert "by_epoch" in result["after_fine_tune"]
    assert "by_epoch" not in lines[0]["evaluation"], "the curve over epochs is of results only"
    output = capsys.readouterr().out
    assert "after fine-tuning" in output
    assert "after FedAvg" not in output


@pytest.mark.parametrize("fine_tune", [None, ONE_STEP], ids=["no phase 2", "phase 2"])
def test_a_run_that_was_stopped_when_all_was_scored_does_nothing_twice(
    tmp_path: Path, fine_tune: PhaseConfig | None
) -> None:
    """The scores alone are progress, which is worth a checkpoint; they come back with their curves."""
    config = dataclasses.replace(NO_TRAINING, fine_tune=fine_tune)
    expected = run_experiment(config, CountingExecutor(config), CLIENTS, fresh(config))
    folder, state = RunFolder(tmp_path / "run"), fresh(config)
    folder.begin(config, CLIENTS, RUN)
    assert not state.has_begun
    before = state.progress
    with pytest.raises(StoppedHereError):
        run_experiment(config, CountingExecutor(config), CLIENTS, state, [folder, StopsAtTheEnd()])
    assert state.has_begun
    assert state.progress > before
    with state.lock:
        folder.save_checkpoint(state)
    folder.close()

    folder, executor = RunFolder(tmp_path / "run", resume=True), CountingExecutor(config)
    resumed = folder.begin(config, CLIENTS, RUN)
    assert resumed is not None
    assert resumed.progress == state.progress
    outcome = run_experiment(config, executor, CLIENTS, resumed, [folder])
    folder.close()
    assert (executor.num_trainings, executor.scorings) == (0, [])
    assert torch.equal(outcome.parameters, expected.parameters)
    assert outcome.scores == expected.scores
