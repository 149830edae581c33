"""One table for all methods: what holds for each of them, in one process. A method that is added is in it.

With processes: tests/integration/test_method_runs.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import digits_dataset, make_config
from torch import Tensor, nn

from datasets.clients.partition import Partition
from datasets.clients.split import SplitDataset
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, parameters_sha256, run_experiment
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import ScoringTask
from perfedavg.methods import METHODS
from perfedavg.recording.checkpoint import Checkpoints, RunIdentity
from perfedavg.recording.client_states import StateFiles
from perfedavg.settings import ExperimentConfig, OptimizerConfig, PhaseConfig
from perfedavg.training.flat_model import flatten

SETTINGS: dict[str, dict[str, Any]] = {
    "fedrep": {"head_epochs": 2},
    "pfedme": {"pfedme_lambda": 2.0, "pfedme_steps": 2},
    "per_fedavg": {"per_fedavg_beta": 0.003},
}
"""Where the defaults take long, or are too fast for the rate here, which would make much of rounding."""
NUM_ROUNDS, LAST_SAVED = 5, 2


@cache
def dataset() -> SplitDataset:
    """Clients of unequal sizes."""
    return digits_dataset(10, partition=Partition("quantity", 0.5))


def model() -> nn.Module:
    """With dropout, normalization and a last layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 12), nn.GroupNorm(3, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 10)
        )


def config_of(name: str, client_batching: int = 1) -> ExperimentConfig:
    """Five of eight clients a round, so that most train more than once; then fine-tuning, where that has a meaning."""
    method = METHODS[name](**SETTINGS.get(name, {}))
    client = OptimizerConfig("sgd", 0.1)
    fedavg = PhaseConfig(NUM_ROUNDS, 1, client, OptimizerConfig("momentum", 1.0), num_local_steps=4, method=method)
    config = make_config(num_clients=10, cohort_size=5, fedavg=fedavg, fine_tune=None, client_batching=client_batching)
    config = replace(config, batch_size=12, eval_every=100)
    if not method.goes_on:
        return config
    return replace(config, fine_tune=replace(fedavg, num_rounds=1, method=METHODS["reptile"]()))


Result = tuple[Tensor, dict[int, ClientScore]]


def go_on(config: ExperimentConfig, state: ExperimentState, num_slots: int) -> Result:
    """The model, and the scores of all clients with what they keep."""
    executor = LocalExecutor(config, model(), dataset(), num_slots=num_slots)
    outcome = run_experiment(config, executor, dataset(), state)
    everybody = (*dataset().train_client_ids, *dataset().unseen_client_ids)
    task = ScoringTask(state.phase, state.num_rounds, everybody, states=state.client_states)
    scores = {score.client_id: score for score in executor.score(task, outcome.parameters)}
    assert len(scores) == len(everybody)
    return outcome.parameters, scores


@cache
def result(name: str, client_batching: int = 1, num_slots: int = 1) -> Result:
    config = config_of(name, client_batching)
    return go_on(config, ExperimentState.fresh(config, flatten(model())), num_slots)


class StopError(Exception):
    pass


class Stops:
    """Saves the state after some rounds, and ends the run in the next one."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def checkpoint_due(self, state: ExperimentState) -> None:
        if state.num_rounds == LAST_SAVED:
            self._checkpoints.save(state)
        if state.num_rounds > LAST_SAVED:
            raise StopError

    def __getattr__(self, name: str) -> object:
        return lambda *told: None


@pytest.mark.parametrize("name", METHODS)
def test_every_method_personalizes(name: str) -> None:
    """Clients that trained, and unseen ones; and unlike FedAvg, else the other tests would prove nothing."""
    parameters, scores = result(name)
    for population in (dataset().train_client_ids, dataset().unseen_client_ids):
        gains = [scores[one].initial["loss"] - scores[one].personalized["loss"] for one in population]
        assert sum(gains) > 0.0
    if name != "fedavg":
        other, other_scores = result("fedavg")
        assert not torch.equal(parameters, other) or scores != other_scores


@pytest.mark.parametrize("name", METHODS)
def test_slots_do_not_change_a_bit(name: str) -> None:
    parameters, scores = result(name)
    other, other_scores = result(name, num_slots=3)
    assert parameters_sha256(parameters) == parameters_sha256(other)
    assert scores == other_scores


@pytest.mark.parametrize("name", METHODS)
def test_groups_change_no_more_than_the_rounding(name: str) -> None:
    """Of four clients and one, with what each keeps."""
    parameters, scores = result(name)
    other, other_scores = result(name, client_batching=4)
    torch.testing.assert_close(other, parameters, rtol=2e-4, atol=2e-5)
    for client_id, score in scores.items():
        assert other_scores[client_id].initial["loss"] == pytest.approx(score.initial["loss"], rel=2e-3)
        assert other_scores[client_id].personalized["loss"] == pytest.approx(score.personalized["loss"], rel=2e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_as_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    """The round after the checkpoint is trained twice, by clients that had changed what they keep."""
    config, files = config_of(name), StateFiles(tmp_path / "client_states")
    checkpoints = Checkpoints(tmp_path / "checkpoint", RunIdentity(config, "digits", {}), files)
    begun = ExperimentState.fresh(config, flatten(model()), client_states=files)
    with pytest.raises(StopError):
        run_experiment(config, LocalExecutor(config, model(), dataset()), dataset(), begun, [Stops(checkpoints)])
    state = checkpoints.load()
    assert state is not None
    assert state.num_rounds == LAST_SAVED
    keeping = [client_id for client_id in dataset().train_client_ids if state.client_states.get(client_id)]
    assert bool(keeping) == METHODS[name].keeps_state
    parameters, scores = go_on(config, state, num_slots=2)
    expected, expected_scores = result(name)
    assert parameters_sha256(parameters) == parameters_sha256(expected)
    assert scores == expected_scores
