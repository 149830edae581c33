"""Clients with loss 0.5 * ||w - c||^2, for which every phase has an exact answer.

From w, a step of SGD at rate a leads to w - a (w - c), so after k steps w - c has shrunk by r = (1 - a)^k:
the client's update is (1 - r) (c - w).
"""

from __future__ import annotations

import dataclasses

import torch
from helpers import Difference, QuadraticClients, half_squared_norm, make_config
from torch import Tensor

from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentOutcome, ExperimentState, run_experiment
from perfedavg.methods.reptile import Reptile
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig, Population
from perfedavg.training.flat_model import flatten

START = [2.0, -1.0]
CENTRES = [[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5]]
SIZES = [25, 7, 12, 40, 18]
LOCAL_LR, LOCAL_EPOCHS, BATCH = 0.1, 3, 10
PERSONALIZATION_EPOCHS = 2


def config(fedavg_rounds: int, server: OptimizerConfig, fine_tune: PhaseConfig | None = None) -> ExperimentConfig:
    return make_config(
        num_clients=5,
        cohort_size=4,
        batch_size=BATCH,
        fedavg=PhaseConfig(fedavg_rounds, LOCAL_EPOCHS, OptimizerConfig("sgd", LOCAL_LR), server),
        fine_tune=fine_tune,
        num_personalization_epochs=PERSONALIZATION_EPOCHS,
    )


def run(settings: ExperimentConfig) -> ExperimentOutcome:
    dataset, model = QuadraticClients(CENTRES, SIZES, num_unseen=1), Difference(START)
    executor = LocalExecutor(settings, model, dataset, loss_function=half_squared_norm)
    return run_experiment(settings, executor, dataset, ExperimentState.fresh(settings, flatten(model)))


def shrinkage(size: int, epochs: int, rate: float) -> float:
    """(1 - rate) to the number of steps; the last, smaller batch of an epoch is a step too."""
    return float((1 - rate) ** (epochs * -(-size // BATCH)))


def updates(w: Tensor, epochs: int, rate: float) -> list[Tensor]:
    centres = torch.tensor(CENTRES, dtype=torch.float64)
    return [(1 - shrinkage(SIZES[i], epochs, rate)) * (centres[i] - w) for i in range(4)]


def fedavg_mean(w: Tensor) -> Tensor:
    """Weighted by examples, of which the four training clients have different numbers."""
    parts = updates(w, LOCAL_EPOCHS, LOCAL_LR)
    return sum((SIZES[i] * parts[i] for i in range(4)), torch.zeros(2)) / sum(SIZES[:4])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_fedavg_averages_by_examples() -> None:
    start = torch.tensor(START, dtype=torch.float64)
    outcome = run(config(1, OptimizerConfig("sgd", 1.0)))
    assert_close(outcome.parameters, start + fedavg_mean(start))


def test_the_servers_momentum_lives_through_the_rounds() -> None:
    """v <- 0.9 v + mean update; w <- w + 0.7 v. Losing v between rounds would give another w after the second."""
    w, v = torch.tensor(START, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        v = 0.9 * v + fedavg_mean(w)
        w = w + 0.7 * v
    outcome = run(config(3, OptimizerConfig("momentum", 0.7)))
    assert_close(outcome.parameters, w)


def test_reptile_steps_towards_the_unweighted_mean() -> None:
    """theta + step * mean_i(theta_i(K) - theta), from where FedAvg ended, without its momentum."""
    reptile = PhaseConfig(2, 4, OptimizerConfig("sgd", 0.05), OptimizerConfig("sgd", 0.3), method=Reptile())
    w = run(config(2, OptimizerConfig("momentum", 1.0))).parameters
    for _ in range(2):
        w = w + 0.3 * torch.stack(updates(w, 4, 0.05)).mean(dim=0)
    outcome = run(config(2, OptimizerConfig("momentum", 1.0), reptile))
    assert_close(outcome.parameters, w)


def test_reptile_with_adam_on_the_server() -> None:
    """Adam's first step (Kingma and Ba 2015) is lr * g / (|g| + eps): the mean update's sign, whatever its size."""
    reptile = PhaseConfig(1, 1, OptimizerConfig("sgd", 0.05), OptimizerConfig("adam", 0.01), method=Reptile())
    before = run(config(1, OptimizerConfig("sgd", 1.0))).parameters
    direction = torch.stack(updates(before, 1, 0.05)).mean(dim=0)
    outcome = run(config(1, OptimizerConfig("sgd", 1.0), reptile))
    torch.testing.assert_close(outcome.parameters, before + 0.01 * direction.sign(), rtol=0, atol=1e-8)


def test_a_clients_adam_starts_afresh_in_every_round() -> None:
    """With one step a client, each client moves by exactly lr towards its centre, round after round.

    A second moment kept from the round or the client before would change the length of the step.
    """
    adam = OptimizerConfig("adam", 0.001, betas=(0.0, 0.999))
    settings = dataclasses.replace(
        config(1, OptimizerConfig("sgd", 1.0), PhaseConfig(3, 1, adam, OptimizerConfig("sgd", 1.0), method=Reptile())),
        batch_size=50,
    )
    before = run(dataclasses.replace(settings, fine_tune=None)).parameters
    centres = torch.tensor(CENTRES[:4], dtype=torch.float64)
    w = before
    for _ in range(3):
        w = w + 0.001 * (centres - w).sign().mean(dim=0)
    torch.testing.assert_close(run(settings).parameters, w, rtol=0, atol=1e-8)


def test_personalization_scores_before_and_after_adapting() -> None:
    outcome = run(config(1, OptimizerConfig("sgd", 1.0)))
    (score,) = outcome.scores[Phase.FEDAVG][Population.UNSEEN]
    distance = (outcome.parameters - torch.tensor(CENTRES[4], dtype=torch.float64)).square().sum().item()
    shrunk = shrinkage(SIZES[4], PERSONALIZATION_EPOCHS, LOCAL_LR)
    assert (score.client_id, score.num_train_examples, score.num_test_examples) == (4, 18, 1)
    assert abs(score.initial["loss"] - 0.5 * distance) < 1e-12
    assert abs(score.personalized["loss"] - 0.5 * shrunk**2 * distance) < 1e-12


def test_scoring_does_not_change_the_global_model() -> None:
    often = dataclasses.replace(config(3, OptimizerConfig("momentum", 1.0)), eval_every=1)
    never = dataclasses.replace(often, eval_every=100)
    assert torch.equal(run(often).parameters, run(never).parameters)
