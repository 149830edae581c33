"""FedProx: a client's loss has mu/2 * ||w - w_global||^2 more, whoever it trains with and whatever its optimizer."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Difference, QuadraticClients, digits_dataset, half_squared_norm, make_config, with_method
from torch import Tensor, nn

from datasets.clients.split import SplitDataset
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.methods import FedAvg, FedProx, Method
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.client_models import Client, ClientModels
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import LocalTraining
from perfedavg.training.stacked_model import StackedModel

MU, RATE, STEPS = 0.5, 0.1, 4
START = torch.tensor([2.0, -1.0], dtype=torch.float64)
CENTRES = [[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5]]
SIZES = (25, 7, 12, 40, 18)
SGD = OptimizerConfig("sgd", RATE)
LEFT_OUT = PhaseConfig(0, 1, SGD, SGD)


def run(config: ExperimentConfig, clients: QuadraticClients | SplitDataset, model: nn.Module) -> Tensor:
    loss = {"loss_function": half_squared_norm} if isinstance(clients, QuadraticClients) else {}
    executor = LocalExecutor(config, model, clients, num_slots=2, **loss)
    return run_experiment(config, executor, clients, ExperimentState.fresh(config, flatten(model))).parameters


@pytest.mark.parametrize("client_batching", [1, 3])
@pytest.mark.parametrize("phase", Phase)
def test_clients_with_a_quadratic_loss_have_a_closed_form(phase: Phase, client_batching: int) -> None:
    """With d = w - w0, a step at rate a on 0.5 ||w - c||^2 + mu/2 ||d||^2 is d <- (1 - a (1 + mu)) d + a (c - w0).

    So after k steps d = (1 - (1 - a (1 + mu))^k) / (1 + mu) * (c - w0), and the server goes to the mean by examples.
    """
    trained = PhaseConfig(1, 1, SGD, OptimizerConfig("sgd", 1.0), num_local_steps=STEPS)
    phases = (
        {"fedavg": trained, "fine_tune": None} if phase is Phase.FEDAVG else {"fedavg": LEFT_OUT, "fine_tune": trained}
    )
    config = with_method(make_config(num_clients=5, client_batching=client_batching, **phases), phase, FedProx(MU))
    clients = QuadraticClients(CENTRES, SIZES, num_unseen=1)
    weights = torch.tensor(SIZES[:4], dtype=torch.float64) / sum(SIZES[:4])
    share = (1 - (1 - RATE * (1 + MU)) ** STEPS) / (1 + MU)
    expected = START + share * (weights @ clients.centres[:4] - START)
    torch.testing.assert_close(run(config, clients, Difference(START.tolist())), expected, rtol=1e-12, atol=1e-12)


@cache
def digits() -> SplitDataset:
    return digits_dataset(20)


def dense_with_dropout() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(784, 16), nn.Tanh(), nn.Linear(16, 10))


@cache
def final_model(method: Method, phase: Phase, client_batching: int, precision: str = "float32") -> Tensor:
    config = make_config(cohort_size=6, client_batching=client_batching, precision=precision)
    return run(with_method(config, phase, method), digits(), dense_with_dropout())


@pytest.mark.parametrize("client_batching", [1, 4])
@pytest.mark.parametrize("phase", Phase)
def test_without_a_pull_it_is_fedavg_to_the_bit(phase: Phase, client_batching: int) -> None:
    fedavg = final_model(FedAvg(), phase, client_batching)
    assert torch.equal(final_model(FedProx(0.0), phase, client_batching), fedavg)
    assert not torch.equal(final_model(FedProx(MU), phase, client_batching), fedavg)


def test_clients_in_groups_and_in_bf16_go_where_those_alone_go() -> None:
    alone = final_model(FedProx(MU), Phase.FEDAVG, 1)
    torch.testing.assert_close(final_model(FedProx(MU), Phase.FEDAVG, 4), alone, rtol=1e-4, atol=1e-5)
    start = flatten(dense_with_dropout())
    distance = torch.linalg.vector_norm(final_model(FedProx(MU), Phase.FEDAVG, 1, "bf16") - alone)
    assert distance < 0.1 * torch.linalg.vector_norm(alone - start)


OPTIMIZERS = {
    "sgd": (SGD, lambda parameters: torch.optim.SGD(parameters, RATE)),
    "momentum": (OptimizerConfig("momentum", RATE), lambda parameters: torch.optim.SGD(parameters, RATE, momentum=0.9)),
    "adam": (OptimizerConfig("adam", 0.01), lambda parameters: torch.optim.Adam(parameters, 0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("group_size", [1, 2])
def test_it_is_what_autograd_makes_of_the_penalized_loss(group_size: int, name: str) -> None:
    """One batch holds all examples, so that their order means nothing."""
    config, build_optimizer = OPTIMIZERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 3))
        inputs, labels = torch.rand(12, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (12,))
    start = flatten(plain.double())
    expected = copy.deepcopy(plain)
    optimizer = build_optimizer(expected.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        distance = nn.utils.parameters_to_vector(expected.parameters()) - start
        (F.cross_entropy(expected(inputs), labels) + MU / 2 * distance.square().sum()).backward()
        optimizer.step()
    models: ClientModels = FlatModel(plain) if group_size == 1 else StackedModel(plain, 2)
    clients = [Client(inputs, labels, np.random.SeedSequence(0)) for _ in range(group_size)]
    updates, _ = FedProx(MU).update(models, start, clients, LocalTraining(config, STEPS, batch_size=20))
    for update in updates:
        torch.testing.assert_close(start + update, flatten(expected), rtol=1e-9, atol=1e-10)
