"""What a client keeps is the server's: it goes out with the client, comes back with its result, and is checkpointed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers import CountingFedAvg, Difference, QuadraticClients, half_squared_norm, make_config, with_method
from torch import Tensor

from perfedavg.engine.client_states import StatesInMemory
from perfedavg.engine.cohorts import draw_cohort
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.engine.tasks import CohortTask
from perfedavg.methods import FedAvg
from perfedavg.recording.checkpoint import Checkpoints, RunIdentity
from perfedavg.recording.client_states import StateFiles
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.client_models import Client, ClientModels
from perfedavg.training.flat_model import flatten
from perfedavg.training.local_training import LocalTraining

START = [2.0, -1.0]
CENTRES = [[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5]]
NUM_ROUNDS = 5


def counting(client_batching: int = 1, method: FedAvg | None = None) -> ExperimentConfig:
    """Two of four clients a round, each half of the way to its centre, in two phases."""
    phase = PhaseConfig(NUM_ROUNDS, 1, OptimizerConfig("sgd", 0.5), OptimizerConfig("sgd", 1.0), num_local_steps=1)
    config = make_config(num_clients=5, cohort_size=2, fedavg=phase, fine_tune=phase, client_batching=client_batching)
    for each in Phase:
        config = with_method(config, each, method or CountingFedAvg())
    return config


def clients(centres: Sequence[Sequence[float]] = CENTRES) -> QuadraticClients:
    return QuadraticClients(centres, (10, 10, 10, 10, 10), num_unseen=1)


def executor(config: ExperimentConfig, num_slots: int = 1, dataset: QuadraticClients | None = None) -> LocalExecutor:
    return LocalExecutor(
        config, Difference(START), dataset or clients(), num_slots=num_slots, loss_function=half_squared_norm
    )


def fresh(config: ExperimentConfig) -> ExperimentState:
    return ExperimentState.fresh(config, flatten(Difference(START)))


def expected_model(config: ExperimentConfig) -> Tensor:
    """A client's n-th update of a phase is an n-th of what it would be without the counter."""
    w, centres = torch.tensor(START, dtype=torch.float64), torch.tensor(CENTRES, dtype=torch.float64)
    for phase in Phase:
        counts = dict.fromkeys(range(4), 0)
        for round_number in range(1, NUM_ROUNDS + 1):
            cohort = draw_cohort(config, range(4), phase, round_number)
            for client in cohort:
                counts[client] += 1
            w = w + torch.stack([0.5 * (centres[client] - w) / counts[client] for client in cohort]).mean(0)
        assert max(counts.values()) > 1, "a client trains more than once"
    return w


@pytest.mark.parametrize("client_batching", [1, 2])
def test_each_client_counts_its_own_rounds_of_the_phase(client_batching: int) -> None:
    config = counting(client_batching)
    one, two = (
        run_experiment(config, executor(config, num_slots), clients(), fresh(config)).parameters for num_slots in (1, 2)
    )
    assert torch.equal(one, two)
    torch.testing.assert_close(one, expected_model(config), rtol=1e-12, atol=1e-12)


class StopError(Exception):
    pass


class StopsAfter:
    """An observer that saves the state after so many rounds, and ends the run."""

    def __init__(self, checkpoints: Checkpoints, num_rounds: int) -> None:
        self._checkpoints = checkpoints
        self._num_left = num_rounds

    def checkpoint_due(self, state: ExperimentState) -> None:
        self._num_left -= 1
        if self._num_left == 0:
            self._checkpoints.save(state)
            raise StopError

    def __getattr__(self, name: str) -> object:
        return lambda *told: None


@pytest.mark.parametrize("num_rounds", [1, 3, NUM_ROUNDS, NUM_ROUNDS + 2])
def test_a_run_that_goes_on_from_a_checkpoint_counts_on(num_rounds: int, tmp_path: Path) -> None:
    config = counting()
    files = StateFiles(tmp_path / "client_states")
    checkpoints = Checkpoints(tmp_path / "checkpoint", RunIdentity(config, "quadratic", {}), files)
    begun = ExperimentState.fresh(config, flatten(Difference(START)), client_states=files)
    with pytest.raises(StopError):
        run_experiment(config, executor(config), clients(), begun, [StopsAfter(checkpoints, num_rounds)])
    state = checkpoints.load()
    assert state is not None
    assert any(state.client_states.get(client_id) for client_id in range(4)), "somebody has counted"
    resumed = run_experiment(config, executor(config), clients(), state).parameters
    assert torch.equal(resumed, run_experiment(config, executor(config), clients(), fresh(config)).parameters)


def test_a_client_whose_update_is_refused_keeps_what_it_had() -> None:
    """Its training diverged, and so may have what it kept."""
    config = counting()
    diverging = clients([[float("nan"), 0.0], *CENTRES[1:]])
    state = fresh(config)
    run_experiment(config, executor(config, dataset=diverging), diverging, state)
    assert state.client_states.get(0) == {}
    assert any(state.client_states.get(client_id) for client_id in (1, 2, 3))


def test_without_anything_kept_nothing_is_stored() -> None:
    config = counting(method=FedAvg())
    state = fresh(config)
    run_experiment(config, executor(config), clients(), state)
    assert not any(state.client_states.get(client_id) for client_id in range(4))


@dataclass(frozen=True)
class KeepsItsModel(FedAvg):
    """Keeps a view of the model that it trained with, and changes what it kept before."""

    name: ClassVar[str] = "keeps_its_model"
    keeps_state: ClassVar[bool] = True

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        updates, losses = super().update(models, start, clients, training)
        for client, row in zip(clients, models.parameters, strict=True):
            if "old" in client.state:
                client.state["old"].fill_(torch.nan)
            client.state["old"] = row
        return updates, losses


def test_what_is_kept_is_a_copy() -> None:
    """Of a model that the next client trains with; and what an undelivered result changed must be as it was."""
    config = counting(method=KeepsItsModel())
    pool = executor(config)
    start = flatten(Difference(START))
    states = StatesInMemory()
    states.commit(pool.train(CohortTask(Phase.FEDAVG, 1, (0, 1), 20, states), start).keeping)
    before = [states.get(client_id)["old"] for client_id in (0, 1)]
    assert not torch.equal(*before)
    assert pool.train(CohortTask(Phase.FEDAVG, 2, (0, 1), 20, states), start).keeping == {0, 1}
    assert all(torch.equal(states.get(client_id)["old"], kept) for client_id, kept in enumerate(before))
