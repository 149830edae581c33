"""Optimizers of clients and of the server: torch.optim's, and Yogi. None outlives the work it was built for.

They call the functions behind torch.optim's classes. The classes import torch's compiler when one is built, to tell it
not to compile them, which makes each process start later; nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from perfedavg.settings import OptimizerConfig


class Optimizer:
    """A fresh optimizer over one tensor, which its steps change.

    columns: the only ones that it changes, of a tensor of rows; None for all.
    state: all that the next step depends on besides, by name; empty before the first step, and without momentum.
    Raises ValueError where the configuration names no optimizer.
    """

    def __init__(self, config: OptimizerConfig, parameters: Tensor, columns: slice | None = None) -> None:
        steps = {
            "sgd": self._sgd,
            "momentum": self._sgd,
            "adam": self._adam,
            "yogi": self._yogi,
            "adagrad": self._adagrad,
        }
        if config.name not in steps:
            raise ValueError(f"unknown optimizer {config.name!r}")
        self.state: dict[str, Tensor] = {}
        self._config = config
        self._columns = columns
        self._parameters = parameters if columns is None else parameters[:, columns]
        self._step = steps[config.name]

    @property
    def rate_of_plain_sgd(self) -> float | None:
        """The learning rate where a step is `parameters -= rate * gradient` and there is no state; else None."""
        return self._config.learning_rate if self._config.name == "sgd" else None

    def narrow(self, num_rows: int) -> None:
        """Go on with the first rows of the tensor only, and leave the others as they are."""
        if num_rows < len(self._parameters):
            self._parameters = self._parameters[:num_rows]
            self.state = {name: value[:num_rows] if value.ndim else value for name, value in self.state.items()}

    @torch.no_grad()
    def step(self, gradient: Tensor, rate_factor: float = 1.0) -> None:
        """One step along a gradient of the tensor's shape, at so much of the learning rate."""
        gradient = gradient if self._columns is None else gradient[:, self._columns]
        self._step(gradient, rate_factor * self._config.learning_rate)

    def _sgd(self, gradient: Tensor, rate: float) -> None:
        momentum = self._config.momentum if self._config.name == "momentum" else 0.0
        buffers = [self.state.get("momentum_buffer")]
        own: dict[str, Any] = {"dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "maximize": False}
        sgd([self._parameters], [gradient], buffers, lr=rate, momentum=momentum, **own)
        if momentum and buffers[0] is not None:
            self.state["momentum_buffer"] = buffers[0]

    def _adam(self, gradient: Tensor, rate: float) -> None:
        first, second, steps = self._kept("exp_avg"), self._kept("exp_avg_sq"), self._count()
        beta1, beta2 = self._config.decay_rates
        own: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "amsgrad": False, "weight_decay": 0.0, "maximize": False}
        adam([self._parameters], [gradient], [first], [second], [], [steps], lr=rate, eps=self._config.epsilon, **own)

    def _adagrad(self, gradient: Tensor, rate: float) -> None:
        total, steps = self._kept("sum"), self._count()
        own: dict[str, Any] = {"lr_decay": 0.0, "weight_decay": 0.0, "maximize": False}
        adagrad([self._parameters], [gradient], [total], [steps], lr=rate, eps=self._config.epsilon, **own)

    def _yogi(self, gradient: Tensor, rate: float) -> None:
        """Yogi (Zaheer et al. 2018) as Reddi et al. 2020 (arXiv 2003.00295, algorithm 2) use it for servers.

        With gradient g: m = b1 m + (1 - b1) g; v = v - (1 - b2) g^2 sign(v - g^2);
        theta = theta - rate m / (sqrt(v) + e), where m begins at 0 and v at e^2, without a correction for that.
        Unlike Adam's, a v that is too large falls slowly.
        """
        (first_decay, second_decay), epsilon = self._config.decay_rates, self._config.epsilon
        first, second = self._kept("first"), self._kept("second", epsilon**2)
        square = gradient * gradient
        first.lerp_(gradient, 1 - first_decay)
        second.sub_(square * torch.sign(second - square), alpha=1 - second_decay)
        self._parameters.addcdiv_(first, second.sqrt().add_(epsilon), value=-rate)

    def _kept(self, name: str, beginning: float = 0.0) -> Tensor:
        """A tensor of the state, which begins with one value everywhere."""
        if name not in self.state:
            self.state[name] = torch.full_like(self._parameters, beginning)
        return self.state[name]

    def _count(self) -> Tensor:
        """The number of steps taken, on the CPU, as torch.optim keeps it."""
        return self.state.setdefault("step", torch.tensor(0.0))


class ServerOptimizer:
    """Applies the mean update of a round to the global model, as if it were a gradient (Reddi et al. 2020).

    The pseudo-gradient is minus the mean update, so that with sgd and learning rate 1 the step is
    `theta + mean update`: FedAvg's average, and Reptile's `theta + step * mean_i(theta_i(K) - theta)` at step 1.

    num_buffer_entries: how many entries, the last ones, are a model's buffers, such as BatchNorm's running statistics.
        They are no weights to be optimized: each gets its mean change, whatever the optimizer and its rate.
    """

    def __init__(self, config: OptimizerConfig, parameters: Tensor, num_buffer_entries: int = 0) -> None:
        self._parameters = parameters.detach().clone()
        self.num_buffer_entries = num_buffer_entries
        self._optimizer = Optimizer(config, self.without_buffers(self._parameters))

    @property
    def parameters(self) -> Tensor:
        """The global model after the steps so far, (num_parameters,). A copy."""
        return self._parameters.clone()

    def without_buffers(self, vector: Tensor) -> Tensor:
        """The entries of a vector, (num_parameters,), that the optimizer steps on."""
        return vector[: -self.num_buffer_entries] if self.num_buffer_entries else vector

    @property
    def dtype(self) -> torch.dtype:
        return self._parameters.dtype

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, by name. Not copies: the next step changes them."""
        buffers = self._parameters[len(self._parameters) - self.num_buffer_entries :]
        kept = {"buffers": buffers} if self.num_buffer_entries else {}
        return {"parameters": self.without_buffers(self._parameters), **kept, **self._optimizer.state}

    @classmethod
    def from_tensors(cls, config: OptimizerConfig, tensors: Mapping[str, Tensor]) -> ServerOptimizer:
        """The inverse of `tensors`; the new one owns copies. Raises ValueError where they are no optimizer's."""
        if "parameters" not in tensors:
            raise ValueError("there are no parameters")
        state = {name: tensor.clone() for name, tensor in tensors.items()}
        parameters = state.pop("parameters")
        buffers = state.pop("buffers", parameters[:0])
        if parameters.ndim != 1 or any(tensor.ndim and tensor.shape != parameters.shape for tensor in state.values()):
            raise ValueError("the optimizer's state is not that of its parameters")
        if (buffers.ndim, buffers.dtype) != (1, parameters.dtype):
            raise ValueError("the buffers are not those of the parameters")
        server = cls(config, torch.cat([parameters, buffers]), len(buffers))
        server._optimizer.state.update(state)
        return server

    def step(self, mean_update: Tensor, rate_factor: float = 1.0) -> None:
        """One server step along the mean update, (num_parameters,), at so much of the learning rate."""
        self._optimizer.step(-self.without_buffers(mean_update), rate_factor)
        if self.num_buffer_entries:
            self._parameters[-self.num_buffer_entries :] += mean_update[-self.num_buffer_entries :]
