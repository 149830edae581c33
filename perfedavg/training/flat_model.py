"""A model whose parameters are one flat vector, which is what server and clients exchange."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from perfedavg.training.layers import (
    FactoredLinear,
    Factors,
    SeededDropout,
    blocks,
    channels_last,
    is_plain_linear,
    replace_layers,
)


class FlatModel:
    """A private copy of a model on one device, with its parameters as views of one flat vector.

    module: the copy, with layers that are seeded or faster in place of some (see `perfedavg.training.layers`).
    parameters: (num_parameters,) the flat vector; writing to it changes the model, once `refresh` is called.
    dropout_generator: the source of every dropout mask; seed it before training a client.

    precision: `float32`, which leaves every type as it is, or `bf16`: while the model trains, its layers compute in
        bfloat16 as torch.autocast chooses; parameters, optimizer and losses keep their own type.

    Raises ValueError where the model has buffers (running statistics of BatchNorm would pass from one client to the
    next) or a layer whose randomness cannot be seeded for each client.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu", precision: str = "float32") -> None:
        self.device = torch.device(device)
        self.dropout_generator = torch.Generator(device=self.device)
        refuse_buffers(model)
        self._computes_in_bf16 = precision == "bf16"
        self._factors = Factors()
        # The generator is bound after the copy, because a generator cannot be deep-copied.
        self.module = replace_layers(copy.deepcopy(model).to(self.device), self._replacement)
        self.parameters = flatten(self.module)
        unflatten_into(self.module, self.parameters)
        self._trained = [view for view in self.module.parameters() if view.requires_grad]
        layers = list(self.module.modules())
        self._dense_layers = [layer for layer in layers if isinstance(layer, FactoredLinear)]
        # On a CPU, torch's pooling is many times faster with the channels side by side, its convolutions a little.
        convolves = any(isinstance(layer, nn.Conv2d) for layer in layers)
        self._prefers_channels_last = convolves and self.device.type == "cpu"

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run the model, in the memory format and the precision that are due."""
        if self._prefers_channels_last and inputs.ndim == 4:
            inputs = channels_last(inputs)
        if not (self._computes_in_bf16 and self.module.training):
            outputs: Tensor = self.module(inputs)
            return outputs
        with torch.autocast(self.device.type, torch.bfloat16):
            outputs = self.module(inputs)
        return outputs.to(self.parameters.dtype)

    def load(self, parameters: Tensor) -> None:
        """Take over a flat vector of the same size, from any device."""
        self.parameters.copy_(parameters)
        self.refresh()

    def refresh(self) -> None:
        """The flat vector has been written to: bring what is derived from it up to date."""
        for layer in self._dense_layers:
            layer.refresh()

    def descend(self, loss: Tensor, learning_rate: float) -> None:
        """A step of plain SGD: parameters -= learning_rate * gradient of the loss, a scalar that the model gave."""
        self._factors.begin(learning_rate)
        gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
        with torch.no_grad():
            for view, gradient in zip(self._trained, gradients, strict=True):
                if gradient is not None:
                    view.add_(gradient, alpha=-learning_rate)
            for weight, outputs_gradient, rows in self._factors.end():
                outputs_gradient, rows = outputs_gradient.to(weight.dtype), rows.to(weight.dtype)
                for block in blocks(weight):
                    weight[block].addmm_(outputs_gradient[:, block].t(), rows, alpha=-learning_rate)
        self.refresh()

    def gradient(self, loss: Tensor) -> Tensor:
        """The gradient of the loss, a scalar that the model gave: (num_parameters,), in the parameters' order.

        It is 0 for parameters that do not require one.
        """
        self._factors.begin(None)
        gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
        flat = torch.zeros_like(self.parameters)
        parts: dict[Tensor, Tensor] = {}
        position = 0
        for view in self.module.parameters():
            parts[view] = flat[position : position + view.numel()].view_as(view)
            position += view.numel()
        for view, gradient in zip(self._trained, gradients, strict=True):
            if gradient is not None:
                parts[view].copy_(gradient)
        for weight, outputs_gradient, rows in self._factors.end():
            parts[weight].addmm_(outputs_gradient.to(weight.dtype).t(), rows.to(weight.dtype))
        return flat

    def _replacement(self, layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, nn.Dropout):
            return SeededDropout(layer.p, self.dropout_generator)
        refuse_unseedable(layer)
        if is_plain_linear(layer):
            return FactoredLinear(layer, self._factors, torch.bfloat16 if self._computes_in_bf16 else None)
        return None


def refuse_buffers(model: nn.Module) -> None:
    """Raise ValueError where the model has buffers."""
    buffers = [name for name, _ in model.named_buffers()]
    if buffers:
        raise ValueError(
            f"the model has buffers ({', '.join(buffers[:3])}), which would pass from client to client; "
            "use layers without running state, such as GroupNorm in place of BatchNorm"
        )


def refuse_unseedable(layer: nn.Module) -> None:
    """Raise ValueError where a layer, other than an `nn.Dropout`, has randomness that no seed of a client reaches."""
    if isinstance(layer, nn.Dropout):
        return
    if isinstance(layer, _DropoutNd) or (isinstance(layer, nn.RNNBase) and layer.dropout > 0):
        raise ValueError(f"{type(layer).__name__} draws from torch's global generator; use nn.Dropout in its place")


def flatten(model: nn.Module) -> Tensor:
    """A copy of the model's parameters as one vector, (num_parameters,), in the order of `model.parameters()`."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def unflatten_into(model: nn.Module, parameters: Tensor) -> None:
    """Let a model's parameters be views of a flat vector, (num_parameters,), of the same device and type."""
    nn.utils.vector_to_parameters(parameters, model.parameters())
