"""pFedMe: clients step along the gradients of their Moreau envelopes."""

from __future__ import annotations

import pytest
import torch
from helpers import Difference, QuadraticClients, half_squared_norm, make_config
from second_models import (
    CENTRES,
    RATE,
    SGD,
    SIZES,
    START,
    Scored,
    batches_of,
    clients_at_centres,
    gradient_at,
    image_clients,
    loss_at,
    models_of,
    network,
    quadratic_models,
)
from torch import Tensor

from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.methods import PFedMe
from perfedavg.settings import OptimizerConfig, PhaseConfig
from perfedavg.training.flat_model import flatten
from perfedavg.training.local_training import LocalTraining

LAMBDA, ETA = 4.0, 0.05
EXACT = OptimizerConfig("sgd", 1 / (1 + LAMBDA))
"""One step on 0.5 ||theta - c||^2 + lambda/2 ||theta - w||^2 leads to its minimum, (c + lambda w) / (1 + lambda)."""
NUM_STEPS = 3


@pytest.mark.parametrize("client_batching", [1, 3])
@pytest.mark.parametrize("beta", [1.0, 0.5, 2.0])
def test_clients_with_a_quadratic_loss_have_a_closed_form(beta: float, client_batching: int) -> None:
    """w - theta(w) is (w - c) / (1 + lambda), so each local step shrinks w - c by r = 1 - eta lambda / (1 + lambda).

    The server mixes the plain mean, whatever the clients' sizes, and beta = 1 is the mean itself.
    """
    method = PFedMe(pfedme_lambda=LAMBDA, pfedme_eta=ETA, pfedme_steps=1, pfedme_beta=beta)
    phase = PhaseConfig(2, 1, EXACT, OptimizerConfig("sgd", 1.0), num_local_steps=NUM_STEPS, method=method)
    config = make_config(num_clients=5, fedavg=phase, fine_tune=None, client_batching=client_batching)
    centres = [[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5]]
    clients = QuadraticClients(centres, (25, 7, 12, 40, 18), num_unseen=1)
    model = Difference(START.tolist())
    executor = LocalExecutor(config, model, clients, loss_function=half_squared_norm)
    outcome = run_experiment(config, executor, clients, ExperimentState.fresh(config, flatten(model)))
    w, shrinkage = START, (1 - ETA * LAMBDA / (1 + LAMBDA)) ** NUM_STEPS
    for _ in range(2):
        mean = torch.stack([centre + shrinkage * (w - centre) for centre in clients.centres[:4]]).mean(0)
        w = (1 - beta) * w + beta * mean
    torch.testing.assert_close(outcome.parameters, w, rtol=1e-12, atol=1e-12)


def test_a_local_step_goes_along_the_envelopes_gradient() -> None:
    """Which is measured, as the slope of min over theta of f(theta) + lambda/2 ||theta - w||^2 in some directions."""
    model = network()
    w, (client,) = flatten(model), image_clients((12,))

    def envelope(w: Tensor) -> float:
        theta = w.clone()
        for _ in range(100):
            theta -= 0.05 * (gradient_at(model, theta, client.inputs, client.labels) + LAMBDA * (theta - w))
        distance = (theta - w).square().sum()
        return (loss_at(model, theta, client.inputs, client.labels) + LAMBDA / 2 * distance).item()

    method = PFedMe(pfedme_lambda=LAMBDA, pfedme_eta=ETA, pfedme_steps=100)
    training = LocalTraining(OptimizerConfig("sgd", 0.05), 1, batch_size=20)
    (update,), _ = method.update(models_of(model, 1), w, [client], training)
    gradient = -update / ETA
    for seed in range(3):
        direction = torch.randn(len(w), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slope = (envelope(w + 1e-4 * direction) - envelope(w - 1e-4 * direction)) / 2e-4
        assert (gradient @ direction).item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("group", [1, len(SIZES)])
def test_it_is_what_plain_loops_compute(group: int) -> None:
    """theta goes on from batch to batch. The loss is that of theta before its first step on each batch."""
    model, method = network(), PFedMe(pfedme_lambda=LAMBDA, pfedme_eta=ETA, pfedme_steps=3)
    training, start = LocalTraining(SGD, 2, 4), flatten(model)
    clients = image_clients(SIZES[:group])
    updates, losses = method.update(models_of(model, group), start, clients, training)
    for client, update, loss in zip(clients, updates, losses, strict=True):
        w, theta, measured = start.clone(), start.clone(), []
        for inputs, labels in batches_of(client, training):
            measured.append(len(labels) * loss_at(model, theta, inputs, labels).item())
            for _ in range(3):
                theta = theta - RATE * (gradient_at(model, theta, inputs, labels) + LAMBDA * (theta - w))
            w = w - ETA * LAMBDA * (w - theta)
        torch.testing.assert_close(update, w - start, rtol=1e-8, atol=1e-10)
        last_epoch = measured[len(measured) // 2 :]
        assert loss == pytest.approx(sum(last_epoch) / len(client.labels))
        assert client.state == {}


def test_personalization_approaches_theta_of_the_global_model() -> None:
    models = quadratic_models(3)
    scored = Scored(models)
    PFedMe(pfedme_lambda=LAMBDA).personalize(models, START, clients_at_centres(), LocalTraining(EXACT, 2, 10), scored)
    for client, centre in zip(scored.after, CENTRES, strict=True):
        assert torch.equal(client[0], START)
        torch.testing.assert_close(client[2], (centre + LAMBDA * START) / (1 + LAMBDA), rtol=1e-12, atol=1e-12)
