"""Optimizers of clients and of the server. All of them are torch.optim's; none outlives the work it was built for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from perfedavg.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """A fresh optimizer over the given tensors."""
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=config.momentum)
    if config.name == "adam":
        return torch.optim.Adam(parameters, lr=config.learning_rate, betas=config.betas)
    raise ValueError(f"unknown optimizer {config.name!r}")


class ServerOptimizer:
    """Applies the mean update of a round to the global model, as if it were a gradient (Reddi et al. 2020).

    The pseudo-gradient is minus the mean update, so that with sgd, learning rate 1 and no momentum the step is
    `theta + mean update`: FedAvg's average, and Reptile's `theta + step * mean_i(theta_i(K) - theta)` at step 1.
    """

    def __init__(self, config: OptimizerConfig, parameters: Tensor) -> None:
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

    def step(self, mean_update: Tensor) -> None:
        """One server step along the mean update, (num_parameters,)."""
        self._parameters.grad = -mean_update
        self._optimizer.step()
        self._parameters.grad = None
