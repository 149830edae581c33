"""Ditto: FedAvg's global model, and beside it each client's own, which is pulled towards the global one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from second_models import (
    CENTRES,
    RATE,
    SGD,
    SIZES,
    START,
    TRAINING,
    Scored,
    clients_at_centres,
    image_clients,
    models_of,
    network,
    outcome_of,
    quadratic_models,
)
from torch import Tensor, nn

from perfedavg.methods import Ditto, FedAvg
from perfedavg.settings import OptimizerConfig, Phase, Population
from perfedavg.training.client_models import Client
from perfedavg.training.flat_model import flatten
from perfedavg.training.local_training import LocalTraining

LAMBDA = 0.5


def after_steps(v: Tensor, w: Tensor, num_steps: int) -> Tensor:
    """Each, v <- v - a (v - c + lambda (v - w)), shrinks v - (c + lambda w) / (1 + lambda) by 1 - a (1 + lambda)."""
    target = (CENTRES + LAMBDA * w) / (1 + LAMBDA)
    return target + (1 - RATE * (1 + LAMBDA)) ** num_steps * (v - target)


@pytest.mark.parametrize("group", [1, 3])
def test_personal_models_have_a_closed_form_through_the_rounds(group: int) -> None:
    """The second round begins at another global model, with the personal ones of the first."""
    method, training = Ditto(ditto_lambda=LAMBDA), LocalTraining(SGD, 1, 10, num_steps=4)
    models, other_w = quadratic_models(group), torch.tensor([0.5, 7.0], dtype=torch.float64)
    clients = clients_at_centres()
    expected = START.expand(3, -1)
    for w in (START, other_w):
        for first in range(0, 3, group):
            updates, _ = method.update(models, w, clients[first : first + group], training)
            local = (1 - RATE) ** 4 * (w - CENTRES) + CENTRES
            torch.testing.assert_close(updates, (local - w)[first : first + group], rtol=1e-12, atol=1e-12)
            for client in clients[first : first + group]:
                client.state = {name: value.clone() for name, value in client.state.items()}
        expected = after_steps(expected, w, 4)
        torch.testing.assert_close(kept(clients), expected, rtol=1e-12, atol=1e-12)


def kept(clients: list[Client]) -> Tensor:
    return torch.stack([client.state["model"] for client in clients])


@pytest.mark.parametrize("client_batching", [1, 4])
def test_the_global_model_is_fedavgs_to_the_bit(client_batching: int) -> None:
    fedavg = outcome_of(FedAvg(), client_batching)
    ditto = outcome_of(Ditto(ditto_lambda=LAMBDA), client_batching)
    assert torch.equal(ditto.parameters, fedavg.parameters)
    unpulled = outcome_of(Ditto(ditto_lambda=0), client_batching)
    scores, of_fedavg, of_unpulled = (outcome.scores[Phase.FEDAVG] for outcome in (ditto, fedavg, unpulled))
    assert scores[Population.UNSEEN] != of_fedavg[Population.UNSEEN], "unseen clients are pulled"
    assert of_unpulled[Population.UNSEEN] == of_fedavg[Population.UNSEEN], "and without a pull are not"


@pytest.mark.parametrize("group", [1, len(SIZES)])
def test_without_a_pull_it_is_local_training_to_the_bit(group: int) -> None:
    """From where it stood, whatever the global model became."""
    model, method = network(0.4), Ditto(ditto_lambda=0.0)
    start = flatten(model)
    clients = image_clients(SIZES[:group])
    method.update(models_of(model, group), start, clients, TRAINING)
    states = [{name: value.clone() for name, value in client.state.items()} for client in clients]
    later = image_clients(SIZES[:group], round_number=2, states=states)
    method.update(models_of(model, group), 3 * start, later, TRAINING)
    local = models_of(model, group)
    local.train(start, [client.in_pass(0) for client in image_clients(SIZES[:group])], TRAINING)
    local.train(local.parameters, [client.in_pass(0) for client in later], TRAINING)
    assert torch.equal(kept(later), local.parameters)


OPTIMIZERS = {
    "sgd": (SGD, lambda parameters: torch.optim.SGD(parameters, RATE)),
    "momentum": (OptimizerConfig("momentum", RATE), lambda parameters: torch.optim.SGD(parameters, RATE, momentum=0.9)),
    "adam": (OptimizerConfig("adam", 0.01), lambda parameters: torch.optim.Adam(parameters, 0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("group", [1, 2])
def test_it_is_what_autograd_makes_of_the_objective(group: int, name: str) -> None:
    """One batch holds all examples, so that their order means nothing. v begins where the client had left it."""
    config, build_optimizer = OPTIMIZERS[name]
    plain = network()
    w, v = flatten(plain), flatten(plain) + 0.1
    clients = image_clients((12, 12)[:group], states=[{"model": v.clone()} for _ in range(group)])
    Ditto(ditto_lambda=LAMBDA, ditto_epochs=4).update(
        models_of(plain, group), w, clients, LocalTraining(config, 2, batch_size=20)
    )
    for client in clients:
        expected = copy.deepcopy(plain)
        nn.utils.vector_to_parameters(v.clone(), expected.parameters())
        optimizer = build_optimizer(expected.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            distance = nn.utils.parameters_to_vector(expected.parameters()) - w
            loss = F.cross_entropy(expected(client.inputs), client.labels)
            (loss + LAMBDA / 2 * distance.square().sum()).backward()
            optimizer.step()
        torch.testing.assert_close(client.state["model"], flatten(expected), rtol=1e-8, atol=1e-9)


def test_personalization_goes_on_from_the_kept_model_and_the_initial_one_is_the_global() -> None:
    """An unseen client goes on from the global model."""
    own = torch.tensor([9.0, 9.0], dtype=torch.float64)
    models, w = quadratic_models(3), torch.tensor([0.5, 7.0], dtype=torch.float64)
    clients = clients_at_centres()
    clients[0].state["model"] = own
    scored = Scored(models)
    Ditto(ditto_lambda=LAMBDA).personalize(models, w, clients, LocalTraining(SGD, 2, 10), scored)
    beginnings = torch.stack([own, w, w])
    for epoch in (1, 2):
        after = torch.stack([client[epoch] for client in scored.after])
        torch.testing.assert_close(after, after_steps(beginnings, w, epoch), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(client[0], w) for client in scored.after)
    assert torch.equal(own, torch.tensor([9.0, 9.0], dtype=torch.float64)), "scoring changes nothing"
