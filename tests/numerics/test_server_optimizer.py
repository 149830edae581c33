"""The server's optimizer against references on the pseudo-gradient, compared on the updates of several rounds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedavg.settings import OptimizerConfig
from perfedavg.training.optimizers import ServerOptimizer

YOGI = OptimizerConfig("yogi", 0.03, betas=(0.8, 0.9), epsilon=1e-3)
STATEFUL = [
    OptimizerConfig("momentum", 0.5),
    OptimizerConfig("adam", 0.01, betas=(0.5, 0.9)),
    YOGI,
    OptimizerConfig("adagrad", 0.1, epsilon=1e-3),
]


def updates(number: int) -> Iterator[Tensor]:
    """Mean updates of rounds, (7,), of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    for size in (1.0, 0.01, 3.0, 0.1, 0.001, 2.0)[:number]:
        yield size * torch.randn(7, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (OptimizerConfig("momentum", 0.5), lambda p: torch.optim.SGD([p], lr=0.5, momentum=0.9)),
        (OptimizerConfig("adam", 0.01, betas=(0.5, 0.9)), lambda p: torch.optim.Adam([p], lr=0.01, betas=(0.5, 0.9))),
        (OptimizerConfig("adagrad", 0.1, epsilon=1e-3), lambda p: torch.optim.Adagrad([p], lr=0.1, eps=1e-3)),
    ],
)
def test_a_round_is_a_step_against_minus_the_mean_update(config: OptimizerConfig, reference: object) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=generator, dtype=torch.float64)
    server, parameter = ServerOptimizer(config, start), start.clone().requires_grad_()
    optimizer = reference(parameter)
    for _ in range(4):
        update = torch.randn(7, generator=generator, dtype=torch.float64)
        before, expected_before = server.parameters, parameter.detach().clone()
        server.step(update)
        parameter.grad = -update
        optimizer.step()
        torch.testing.assert_close(server.parameters - before, parameter.detach() - expected_before, rtol=0, atol=0)


def fedyogi(
    x: NDArray[np.float64], deltas: list[NDArray[np.float64]], rate: float, beta_1: float, beta_2: float, tau: float
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """The models and second moments after each round, by FedYogi's lines of algorithm 2 in Reddi et al. 2020."""
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    models, seconds = [], []
    for delta in deltas:
        m = beta_1 * m + (1 - beta_1) * delta
        v = v - (1 - beta_2) * delta**2 * np.sign(v - delta**2)
        x = x + rate * m / (np.sqrt(v) + tau)
        models.append(x)
        seconds.append(v)
    return models, seconds


def test_yogi_is_fedyogi() -> None:
    """arXiv 2003.00295. Through rounds in which the second moment grows, and such in which it falls."""
    start = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deltas = [update.numpy() for update in updates(6)]
    models, seconds = fedyogi(start.numpy(), deltas, YOGI.learning_rate, *YOGI.betas, YOGI.epsilon)
    changes = np.diff(seconds, axis=0)
    assert changes.min() < 0 < changes.max()
    server = ServerOptimizer(YOGI, start)
    for update, model in zip(updates(6), models, strict=True):
        server.step(update)
        torch.testing.assert_close(server.parameters, torch.from_numpy(model), rtol=1e-14, atol=1e-14)


def test_rate_one_without_momentum_adds_the_mean_update() -> None:
    server = ServerOptimizer(OptimizerConfig("sgd", 1.0), torch.tensor([1.0, 2.0]))
    server.step(torch.tensor([0.5, -4.0]))
    assert torch.equal(server.parameters, torch.tensor([1.5, -2.0]))


@pytest.mark.parametrize("num_before", [0, 1, 3])
@pytest.mark.parametrize("config", STATEFUL, ids=lambda config: config.name)
def test_it_goes_on_from_its_tensors_as_if_it_had_never_stopped(config: OptimizerConfig, num_before: int) -> None:
    """Momentum, moments and the number of steps: what is not in them would be lost with every resumption."""
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)
    whole, stopped = ServerOptimizer(config, start), ServerOptimizer(config, start)
    all_updates = list(updates(6))
    for update in all_updates[:num_before]:
        whole.step(update)
        stopped.step(update)
    resumed = ServerOptimizer.from_tensors(config, {name: part.clone() for name, part in stopped.tensors().items()})
    forgetful = ServerOptimizer(config, stopped.parameters)
    for update in all_updates[num_before:]:
        for server in (whole, resumed, forgetful):
            server.step(update)
    assert torch.equal(resumed.parameters, whole.parameters)
    assert torch.equal(forgetful.parameters, whole.parameters) == (num_before == 0)


@pytest.mark.parametrize("config", STATEFUL, ids=lambda config: config.name)
def test_what_goes_on_owns_its_tensors(config: OptimizerConfig) -> None:
    """A step of the one must not move the other."""
    first = ServerOptimizer(config, torch.ones(7, dtype=torch.float64))
    first.step(next(updates(1)))
    second = ServerOptimizer.from_tensors(config, first.tensors())
    before = {name: tensor.clone() for name, tensor in first.tensors().items()}
    second.step(next(updates(1)))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("config", STATEFUL, ids=lambda config: config.name)
def test_a_round_may_take_a_part_of_the_rate(config: OptimizerConfig) -> None:
    """Of that round only, and of the step only: what the optimizer remembers does not follow the rate."""
    start = torch.zeros(7, dtype=torch.float64)
    whole, part = ServerOptimizer(config, start), ServerOptimizer(config, start)
    for update, factor in zip(updates(3), (0.25, 0.0, 1.0), strict=True):
        before, part_before = whole.parameters, part.parameters
        whole.step(update)
        part.step(update, factor)
        moved = whole.parameters - before
        torch.testing.assert_close(part.parameters - part_before, factor * moved, rtol=1e-12, atol=1e-15)
        assert moved.abs().min() > 0
