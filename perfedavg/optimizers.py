"""Optimizers of clients and of the server: torch.optim's, and Yogi. None outlives the work it was built for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from perfedavg.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """A fresh optimizer over the given tensors."""
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=config.momentum)
    if config.name == "adam":
        return torch.optim.Adam(parameters, lr=config.learning_rate, betas=config.betas, eps=config.epsilon)
    if config.name == "yogi":
        return Yogi(parameters, config.learning_rate, config.betas, config.epsilon)
    if config.name == "adagrad":
        return torch.optim.Adagrad(parameters, lr=config.learning_rate, eps=config.epsilon)
    raise ValueError(f"unknown optimizer {config.name!r}")


class Yogi(torch.optim.Optimizer):
    """Yogi (Zaheer et al. 2018) as Reddi et al. 2020 (arXiv 2003.00295, algorithm 2) use it for servers.

    With gradient g: m = b1 m + (1 - b1) g; v = v - (1 - b2) g^2 sign(v - g^2); theta = theta - rate m / (sqrt(v) + e),
    where m begins at 0 and v at e^2, without a correction for that. Unlike Adam's, a v that is too large falls slowly.
    """

    def __init__(
        self, parameters: Iterable[Tensor], learning_rate: float, betas: tuple[float, float], epsilon: float
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "betas": betas, "epsilon": epsilon})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the parameters' gradients. A closure is not supported."""
        assert closure is None, "the gradients are there"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, parameter.grad, group)

    def _step_of(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        (first_decay, second_decay), epsilon = group["betas"], group["epsilon"]
        state = self.state[parameter]
        if not state:
            state["first"] = torch.zeros_like(parameter)
            state["second"] = torch.full_like(parameter, epsilon**2)
        first, second = state["first"], state["second"]
        square = gradient * gradient
        first.lerp_(gradient, 1 - first_decay)
        second.sub_(square * torch.sign(second - square), alpha=1 - second_decay)
        parameter.addcdiv_(first, second.sqrt().add_(epsilon), value=-group["lr"])


class ServerOptimizer:
    """Applies the mean update of a round to the global model, as if it were a gradient (Reddi et al. 2020).

    The pseudo-gradient is minus the mean update, so that with sgd, learning rate 1 and no momentum the step is
    `theta + mean update`: FedAvg's average, and Reptile's `theta + step * mean_i(theta_i(K) - theta)` at step 1.
    """

    def __init__(self, config: OptimizerConfig, parameters: Tensor) -> None:
        self._learning_rate = config.learning_rate
        self._parameters = parameters.clone().requires_grad_()
        self._optimizer = build_optimizer(config, [self._parameters])

    @property
    def parameters(self) -> Tensor:
        """The global model after the steps so far, (num_parameters,). A copy."""
        return self._parameters.detach().clone()

    @property
    def dtype(self) -> torch.dtype:
        return self._parameters.dtype

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, by name. Not copies: the next step changes them."""
        state = self._optimizer.state[self._parameters] if self._optimizer.state else {}
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return {"parameters": self._parameters.detach(), **tensors}

    @classmethod
    def from_tensors(cls, config: OptimizerConfig, tensors: Mapping[str, Tensor]) -> ServerOptimizer:
        """The inverse of `tensors`; the new one owns copies. Raises ValueError where there are no parameters."""
        if "parameters" not in tensors:
            raise ValueError("there are no parameters")
        state = {name: tensor.clone() for name, tensor in tensors.items() if name != "parameters"}
        server = cls(config, tensors["parameters"])
        if state:
            server._optimizer.state[server._parameters] = state
        return server

    def step(self, mean_update: Tensor, rate_factor: float = 1.0) -> None:
        """One server step along the mean update, (num_parameters,), at so much of the learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate_factor * self._learning_rate
        self._parameters.grad = -mean_update
        self._optimizer.step()
        self._parameters.grad = None
