"""Clients, models and plain references for the tests of methods with a second model or local steps of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from helpers import Difference, digits_dataset, half_squared_norm, make_config, with_method
from torch import Tensor, nn
from torch.func import functional_call

from datasets.clients.split import SplitDataset
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentOutcome, ExperimentState, run_experiment
from perfedavg.methods import Method
from perfedavg.seeding import torch_seeds
from perfedavg.settings import OptimizerConfig, Phase
from perfedavg.training.client_models import Client, ClientModels
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import LocalTraining
from perfedavg.training.stacked_model import StackedModel

RATE = 0.1
SGD = OptimizerConfig("sgd", RATE)
SIZES = (14, 9, 6, 3, 1)
"""Of a group's clients, which so end at different steps."""
TRAINING = LocalTraining(SGD, num_epochs=2, batch_size=4)
START = torch.tensor([2.0, -1.0], dtype=torch.float64)
CENTRES = torch.tensor([[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5]], dtype=torch.float64)


def clients_at_centres() -> list[Client]:
    """Clients of ten examples each that are all a centre, so that the gradient at w is w minus it (`Difference`)."""
    return [
        Client(centre.expand(10, -1), torch.zeros(10, dtype=torch.int64), seeds(client))
        for client, centre in enumerate(CENTRES)
    ]


def quadratic_models(num_clients: int) -> ClientModels:
    return models_of(Difference(START.tolist()), num_clients, loss_function=half_squared_norm)


def models_of(model: nn.Module, num_clients: int, **options: Any) -> ClientModels:
    return FlatModel(model, **options) if num_clients == 1 else StackedModel(model, num_clients, **options)


def seeds(client: int, round_number: int = 1) -> np.random.SeedSequence:
    return np.random.SeedSequence(5, spawn_key=(round_number, client))


def image_clients(
    sizes: Sequence[int] = SIZES, round_number: int = 1, states: Sequence[dict[str, Tensor]] | None = None
) -> list[Client]:
    """With the same images in every round."""
    clients = []
    for client, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(client)
        images = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 3, (size,), generator=generator)
        clients.append(Client(images, labels, seeds(client, round_number), {} if states is None else states[client]))
    return clients


def network(dropout: float = 0.0) -> nn.Module:
    """Smooth, so that slopes can be measured."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(108, 6), nn.Tanh())
        return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(6, 3)).double()


def loss_at(model: nn.Module, parameters: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of a model with these parameters, (num_parameters,), as plain torch computes it."""
    named, position = {}, 0
    for name, parameter in model.named_parameters():
        named[name] = parameters[position : position + parameter.numel()].view_as(parameter)
        position += parameter.numel()
    return F.cross_entropy(functional_call(model, named, (inputs,)), labels)


def gradient_at(model: nn.Module, parameters: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    parameters = parameters.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(model, parameters, inputs, labels), parameters)
    return gradient


def batches_of(client: Client, training: LocalTraining) -> Iterator[tuple[Tensor, Tensor]]:
    """A client's batches: whole epochs, each in an order that follows from its seeds."""
    order = torch.Generator().manual_seed(torch_seeds(client.seeds, 1)[0])
    for _ in range(training.num_epochs):
        for places in torch.randperm(len(client.labels), generator=order).split(training.batch_size):
            yield client.inputs[places], client.labels[places]


class Scored:
    """Is told of epochs as an engine's scoring is. models: client's parameters after each epoch, by epoch."""

    def __init__(self, models: ClientModels) -> None:
        self._models = models
        self.after: list[dict[int, Tensor]] = []

    def __call__(self, ended: dict[int, int]) -> None:
        self.after += [{} for _ in range(max(ended) + 1 - len(self.after))]
        for client, epoch in ended.items():
            assert epoch not in self.after[client], "each epoch is told of once"
            self.after[client][epoch] = self._models.parameters[client].clone()


@cache
def digits() -> SplitDataset:
    return digits_dataset(20)


@cache
def dense_with_dropout() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(784, 16), nn.Tanh(), nn.Linear(16, 10))


@cache
def outcome_of(method: Method, client_batching: int = 1) -> ExperimentOutcome:
    """Of two rounds on digits, without a second phase."""
    config = make_config(cohort_size=6, client_batching=client_batching, fine_tune=None, num_curve_epochs=2)
    config = with_method(config, Phase.FEDAVG, method)
    executor = LocalExecutor(config, dense_with_dropout(), digits(), num_slots=2)
    state = ExperimentState.fresh(config, flatten(dense_with_dropout()))
    return run_experiment(config, executor, digits(), state)
