"""APFL: FedAvg's local model beside a client's own, and the mixture of both, with which it predicts."""

from __future__ import annotations

import pytest
import torch
from second_models import (
    RATE,
    SGD,
    SIZES,
    TRAINING,
    Scored,
    batches_of,
    gradient_at,
    image_clients,
    loss_at,
    models_of,
    network,
    outcome_of,
)
from torch import Tensor

from perfedavg.methods import APFL, FedAvg
from perfedavg.settings import OptimizerConfig
from perfedavg.training.client_models import Client
from perfedavg.training.flat_model import flatten
from perfedavg.training.local_training import LocalTraining

GROUPS = [1, len(SIZES)]
UNFUSED = LocalTraining(OptimizerConfig("momentum", RATE, momentum=0.0), num_epochs=2, batch_size=4)
"""SGD that asks for gradients, as APFL does for v; plain SGD's steps are rounded otherwise."""


def others(start: Tensor, count: int) -> list[dict[str, Tensor]]:
    """Kept models that are not the global one."""
    generator = torch.Generator().manual_seed(9)
    return [
        {"model": start + 0.1 * torch.randn(len(start), generator=generator, dtype=torch.float64)} for _ in range(count)
    ]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("client_batching", [1, 4])
def test_the_global_model_is_fedavgs_to_the_bit(client_batching: int, adaptive: bool) -> None:
    """Whatever the share, because w learns nothing of v; the dropout masks of w are FedAvg's too."""
    fedavg = outcome_of(FedAvg(), client_batching)
    apfl = outcome_of(APFL(apfl_alpha=0.5, apfl_adaptive=adaptive), client_batching)
    assert torch.equal(apfl.parameters, fedavg.parameters)
    assert apfl.scores != fedavg.scores


@pytest.mark.parametrize("client_batching", [1, 4])
def test_without_a_share_unseen_clients_score_as_in_fedavg_to_the_bit(client_batching: int) -> None:
    assert outcome_of(APFL(apfl_alpha=0.0), client_batching).scores == outcome_of(FedAvg(), client_batching).scores


@pytest.mark.parametrize("group", GROUPS)
def test_without_a_share_clients_that_trained_score_as_in_fedavg_to_the_bit(group: int) -> None:
    model = network(0.4)
    start = flatten(model)
    models = models_of(model, group)
    apfl, fedavg = Scored(models), Scored(models)
    clients = image_clients(SIZES[:group], states=others(start, group))
    APFL(apfl_alpha=0.0).personalize(models, start, clients, TRAINING, apfl)
    FedAvg().personalize(models, start, clients, TRAINING, fedavg)
    assert all(
        torch.equal(mine[epoch], theirs[epoch])
        for mine, theirs in zip(apfl.after, fedavg.after, strict=True)
        for epoch in (0, 1, 2)
    )


@pytest.mark.parametrize("group", GROUPS)
def test_with_the_whole_share_it_is_local_training_to_the_bit(group: int) -> None:
    """Of the client's own model, which the global one does not reach, in training and in scoring."""
    model = network(0.4)
    start = flatten(model)
    models, local = models_of(model, group), models_of(model, group)
    own = others(start, group)
    clients = image_clients(SIZES[:group], states=[dict(kept) for kept in own])
    APFL(apfl_alpha=1.0).update(models, start, clients, UNFUSED)
    local.train(torch.stack([kept["model"] for kept in own]), clients, UNFUSED)
    assert torch.equal(torch.stack([client.state["model"] for client in clients]), local.parameters)

    scored, expected = Scored(models), Scored(local)
    APFL(apfl_alpha=1.0).personalize(models, 3 * start, clients, UNFUSED, scored)
    local.train(local.parameters.clone(), clients, UNFUSED, after_epochs=expected)
    for mine, theirs in zip(scored.after, expected.after, strict=True):
        assert torch.equal(mine[0], 3 * start)
        assert all(torch.equal(mine[epoch], theirs[epoch]) for epoch in (1, 2))


def plainly(client: Client, start: Tensor, v: Tensor, alpha: float, adapts: bool) -> tuple[list[Tensor], Tensor, float]:
    """The mixtures after each epoch, v and alpha, of plain loops. The last mixture's w comes last in the list."""
    model, w, mixtures = network(), start.clone(), []
    num_batches = -(-len(client.labels) // TRAINING.batch_size)
    for number, (inputs, labels) in enumerate(batches_of(client, TRAINING), 1):
        gradient = gradient_at(model, alpha * v + (1 - alpha) * w, inputs, labels)
        slope = torch.dot(v - w, gradient).item()
        v = v - RATE * alpha * gradient
        w = w - RATE * gradient_at(model, w, inputs, labels)
        if adapts and number == 1:
            alpha = min(max(alpha - RATE * slope, 0.0), 1.0)
        if number % num_batches == 0:
            mixtures.append(alpha * v + (1 - alpha) * w)
    return [*mixtures, w], v, alpha


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_it_is_what_plain_loops_compute(group: int, adaptive: bool) -> None:
    model, method = network(), APFL(apfl_alpha=0.3, apfl_adaptive=adaptive)
    start, models = flatten(model), models_of(model, group)
    states = others(start, group)
    if adaptive:
        states[0]["alpha"] = torch.tensor([0.6], dtype=torch.float64)
    clients = image_clients(SIZES[:group], states=states)
    expected = [
        plainly(client, start, client.state["model"], 0.6 if "alpha" in client.state else 0.3, adaptive)
        for client in clients
    ]
    scored = Scored(models)
    method.personalize(models, start, clients, TRAINING, scored)
    updates, _ = method.update(models, start, clients, TRAINING)
    for client, update, after, (mixtures, v, alpha) in zip(clients, updates, scored.after, expected, strict=True):
        close = {"rtol": 1e-8, "atol": 1e-10}
        torch.testing.assert_close(torch.stack([after[1], after[2]]), torch.stack(mixtures[:2]), **close)
        torch.testing.assert_close(update, mixtures[2] - start, **close)
        torch.testing.assert_close(client.state["model"], v, **close)
        assert set(client.state) == ({"model", "alpha"} if adaptive else {"model"})
        assert not adaptive or client.state["alpha"].item() == pytest.approx(alpha)
        assert not adaptive or abs(alpha - 0.3) > 1e-6


def test_the_share_moves_against_the_slope_of_the_mixtures_loss() -> None:
    """The slope is measured. One batch holds all examples."""
    model = network()
    start = flatten(model)
    (kept,) = others(start, 1)
    v, (client,) = kept["model"], image_clients((12,), states=[kept])

    def loss(alpha: float) -> float:
        return loss_at(model, alpha * v + (1 - alpha) * start, client.inputs, client.labels).item()

    slope = (loss(0.3 + 1e-5) - loss(0.3 - 1e-5)) / 2e-5
    APFL(apfl_alpha=0.3, apfl_adaptive=True).update(models_of(model, 1), start, [client], LocalTraining(SGD, 1, 20))
    assert client.state["alpha"].item() == pytest.approx(0.3 - RATE * slope, rel=1e-6)
    assert abs(slope) > 1e-3


def test_the_share_stays_between_nothing_and_all() -> None:
    model = network()
    start = flatten(model)
    clients = image_clients((12, 12), states=[{"model": start + far * torch.sign(start)} for far in (30.0, -30.0)])
    training = LocalTraining(OptimizerConfig("sgd", 1e6), 1, 20, num_steps=1)
    APFL(apfl_alpha=0.5, apfl_adaptive=True).update(models_of(model, 2), start, clients, training)
    assert {client.state["alpha"].item() for client in clients} <= {0.0, 1.0}
