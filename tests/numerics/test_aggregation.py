"""What a client sends can be changed before it is added, and the mean after it, with the same bits whoever adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import Difference, QuadraticClients, half_squared_norm, make_config, with_method
from torch import Tensor

from perfedavg.aggregation.base import Aggregation
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.methods import Reptile
from perfedavg.seeding import Purpose, seed_sequence, torch_seeds
from perfedavg.settings import OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.flat_model import flatten

START = [2.0, -1.0]
CENTRES = [[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5]]
CLIP, NOISE = 1.5, 0.3


def noise(seeds: np.random.SeedSequence) -> Tensor:
    generator = torch.Generator().manual_seed(torch_seeds(seeds, 1)[0])
    return NOISE * torch.randn(2, generator=generator, dtype=torch.float64)


class ClippedAndNoisy(Aggregation):
    """As in DP-FedAvg (McMahan et al. 2018): updates of norm CLIP at most, and noise on their mean."""

    def before_add(self, update: Tensor, num_parameters: int, client_id: int) -> Tensor:
        update = super().before_add(update, num_parameters, client_id)
        return update * min(1.0, CLIP / torch.linalg.vector_norm(update).item())

    def after_mean(self, mean: Tensor, num_updates: int, seeds: np.random.SeedSequence) -> Tensor:
        return mean + noise(seeds) / num_updates


@dataclass(frozen=True)
class PrivateReptile(Reptile):
    name: ClassVar[str] = "private_reptile"

    def aggregation(self) -> Aggregation:
        return ClippedAndNoisy()


def final_model(num_slots: int, client_batching: int, centres: list[list[float]]) -> Tensor:
    """Two rounds in which all four training clients go half of the way to their centres."""
    phase = PhaseConfig(2, 1, OptimizerConfig("sgd", 0.5), OptimizerConfig("sgd", 1.0), num_local_steps=1)
    config = make_config(num_clients=5, fedavg=phase, fine_tune=None, client_batching=client_batching)
    config = with_method(config, Phase.FEDAVG, PrivateReptile())
    clients, model = QuadraticClients(centres, (25, 7, 12, 40, 18), num_unseen=1), Difference(START)
    executor = LocalExecutor(config, model, clients, num_slots=num_slots, loss_function=half_squared_norm)
    return run_experiment(config, executor, clients, ExperimentState.fresh(config, flatten(model))).parameters


def expected_model(centres: Tensor) -> Tensor:
    w = torch.tensor(START, dtype=torch.float64)
    for round_number in (1, 2):
        updates = 0.5 * (centres - w)
        norms = torch.linalg.vector_norm(updates, dim=1, keepdim=True)
        assert norms.min() < CLIP < norms.max(), "some are clipped, some are not"
        seeds = seed_sequence(0, Purpose.AGGREGATION, phase=Phase.FEDAVG, round_number=round_number)
        w = w + (updates * (CLIP / norms).clamp(max=1)).mean(0) + noise(seeds) / len(centres)
    return w


@pytest.mark.parametrize("client_batching", [1, 3])
def test_updates_are_clipped_and_noise_is_added_once_a_round(client_batching: int) -> None:
    one, two = (final_model(num_slots, client_batching, CENTRES) for num_slots in (1, 2))
    assert torch.equal(one, two)
    expected = expected_model(torch.tensor(CENTRES[:4], dtype=torch.float64))
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


def test_what_is_refused_is_not_counted() -> None:
    """The noise is a mean's over three."""
    diverging = [*CENTRES[:3], [float("nan"), 0.0], CENTRES[4]]
    expected = expected_model(torch.tensor(CENTRES[:3], dtype=torch.float64))
    torch.testing.assert_close(final_model(1, 1, diverging), expected, rtol=1e-12, atol=1e-12)
