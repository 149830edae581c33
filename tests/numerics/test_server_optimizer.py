"""The server's optimizer against torch.optim on the pseudo-gradient, compared on the updates of several rounds."""

from __future__ import annotations

import pytest
import torch

from perfedavg.config import OptimizerConfig
from perfedavg.optimizers import ServerOptimizer


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (OptimizerConfig("sgd", 0.5, momentum=0.9), lambda p: torch.optim.SGD([p], lr=0.5, momentum=0.9)),
        (OptimizerConfig("adam", 0.01, betas=(0.5, 0.9)), lambda p: torch.optim.Adam([p], lr=0.01, betas=(0.5, 0.9))),
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


def test_rate_one_without_momentum_adds_the_mean_update() -> None:
    server = ServerOptimizer(OptimizerConfig("sgd", 1.0), torch.tensor([1.0, 2.0]))
    server.step(torch.tensor([0.5, -4.0]))
    assert torch.equal(server.parameters, torch.tensor([1.5, -2.0]))
