"""Our optimizers are torch.optim's: the same numbers, to the bit, from the functions behind its classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from perfedavg.settings import OptimizerConfig
from perfedavg.training.optimizers import Optimizer, ServerOptimizer

CLASSES: dict[str, tuple[OptimizerConfig, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "sgd": (OptimizerConfig("sgd", 0.3), lambda tensors: torch.optim.SGD(tensors, lr=0.3)),
    "momentum": (
        OptimizerConfig("momentum", 0.3),
        lambda tensors: torch.optim.SGD(tensors, lr=0.3, momentum=0.9),
    ),
    "adam": (
        OptimizerConfig("adam", 0.3, betas=(0.8, 0.95), epsilon=0.01),
        lambda tensors: torch.optim.Adam(tensors, lr=0.3, betas=(0.8, 0.95), eps=0.01),
    ),
    "adagrad": (
        OptimizerConfig("adagrad", 0.3, epsilon=0.01),
        lambda tensors: torch.optim.Adagrad(tensors, lr=0.3, eps=0.01),
    ),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torchs_class(name: str, dtype: torch.dtype) -> None:
    """Also at a part of the learning rate, and with what the next step depends on under torch's names."""
    config, build = CLASSES[name]
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(50, generator=generator, dtype=dtype)
    theirs = start.clone().requires_grad_()
    ours, optimizer = start.clone(), build([theirs])
    own = Optimizer(config, ours)
    for factor in (1.0, 0.5, 0.25, 1.0):
        gradient = torch.randn(50, generator=generator, dtype=dtype)
        for group in optimizer.param_groups:
            group["lr"] = factor * 0.3
        theirs.grad = gradient.clone()
        optimizer.step()
        own.step(gradient, factor)
        assert torch.equal(ours, theirs.detach())
    state = {key: value for key, value in optimizer.state[theirs].items() if value is not None}
    assert own.state.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(own.state[key], value), key


@pytest.mark.parametrize("name", [*CLASSES, "yogi"])
def test_a_server_goes_on_from_its_tensors(name: str) -> None:
    """Or a resumed run would take other steps."""
    config = CLASSES[name][0] if name in CLASSES else OptimizerConfig("yogi", 0.3, betas=(0.9, 0.99), epsilon=0.01)
    generator = torch.Generator().manual_seed(5)
    first = ServerOptimizer(config, torch.randn(20, generator=generator))
    first.step(torch.randn(20, generator=generator))
    second = ServerOptimizer.from_tensors(config, first.tensors())
    for factor in (1.0, 0.5):
        update = torch.randn(20, generator=generator)
        first.step(update, factor)
        second.step(update, factor)
    assert torch.equal(first.parameters, second.parameters)
    with pytest.raises(ValueError, match="there are no parameters"):
        ServerOptimizer.from_tensors(config, {})
