"""The model of one client, whose parameters are one flat vector, which is what server and clients exchange."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from perfedavg.training.client_models import Batch, ClientModels
from perfedavg.training.layers import (
    DeferredGradients,
    FactoredLinear,
    SeededDropout,
    blocks,
    channels_last,
    is_plain_linear,
    replace_layers,
)
from perfedavg.training.local_training import Loss


class FlatModel(ClientModels):
    """A private copy of a model on one device, with its parameters as views of one flat vector.

    module: the copy, with layers that are seeded or faster in place of some (see `perfedavg.training.layers`).
    vector: (num_parameters,) the parameters; writing to it changes the model, once `refresh` is called.
    dropout_generator: the source of every dropout mask.

    precision: `float32`, which leaves every type as it is, or `bf16`: while the model trains, its layers compute in
        bfloat16 as torch.autocast chooses; parameters, optimizer and losses keep their own type.

    Raises ValueError where the model has buffers (running statistics of BatchNorm would pass from one client to the
    next) or a layer whose randomness cannot be seeded for each client.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        loss_function: Loss = F.cross_entropy,
    ) -> None:
        self.loss_function = loss_function
        self.device = torch.device(device)
        self.dropout_generator = torch.Generator(device=self.device)
        refuse_buffers(model)
        self._computes_in_bf16 = precision == "bf16"
        self._deferred = DeferredGradients()
        # The generator is bound after the copy, because a generator cannot be deep-copied.
        self.module = replace_layers(copy.deepcopy(model).to(self.device), self._replacement)
        self.vector = flatten(self.module)
        unflatten_into(self.module, self.vector)
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
        return outputs.to(self.vector.dtype)

    @property
    def parameters(self) -> Tensor:
        return self.vector[None]

    def load(self, parameters: Tensor, num_clients: int = 1) -> None:
        refuse_too_many(num_clients, 1)
        self.vector.copy_(parameters)
        self.module.train()
        self.refresh()

    def refresh(self) -> None:
        for layer in self._dense_layers:
            layer.refresh()

    def seed_dropout(self, client: int, seed: int) -> None:
        self.dropout_generator.manual_seed(seed)

    def descend_on(self, batch: Batch, learning_rate: float) -> Tensor:
        loss = self._training_loss(batch)
        self.descend(loss, learning_rate)
        return loss.detach()[None]

    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = self._training_loss(batch)
        gradient, losses = self.gradient(loss)[None], loss.detach()[None]
        share = batch.sizes[0] / batch.totals[0]
        return (gradient, losses) if share == 1 else (gradient.mul_(share), losses * share)

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.module.eval()
        labels = batch.labels[0]
        with torch.no_grad():
            outputs = self(batch.inputs[0])
            losses = self.loss_function(outputs, labels) * len(labels)
            if labels.is_floating_point():
                return losses[None], torch.zeros_like(batch.counts)
            return losses[None], (outputs.argmax(dim=1) == labels).sum()[None]

    def _training_loss(self, batch: Batch) -> Tensor:
        if not self.module.training:
            self.module.train()
        return self.loss_function(self(batch.inputs[0]), batch.labels[0])

    def descend(self, loss: Tensor, learning_rate: float) -> None:
        """A step of plain SGD: parameters -= learning_rate * gradient of the loss, a scalar that the model gave."""
        self._deferred.begin(learning_rate)
        gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
        with torch.no_grad():
            for view, gradient in zip(self._trained, gradients, strict=True):
                if gradient is not None:
                    view.add_(gradient, alpha=-learning_rate)
            for weight, outputs_gradient, rows in self._deferred.end():
                outputs_gradient, rows = outputs_gradient.to(weight.dtype), rows.to(weight.dtype)
                for block in blocks(weight):
                    weight[block].addmm_(outputs_gradient[:, block].t(), rows, alpha=-learning_rate)
        self.refresh()

    def gradient(self, loss: Tensor) -> Tensor:
        """The gradient of the loss, a scalar that the model gave: (num_parameters,), in the parameters' order.

        It is 0 for parameters that do not require one.
        """
        self._deferred.begin(None)
        gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
        flat = torch.zeros_like(self.vector)
        parts: dict[Tensor, Tensor] = {}
        position = 0
        for view in self.module.parameters():
            parts[view] = flat[position : position + view.numel()].view_as(view)
            position += view.numel()
        for view, gradient in zip(self._trained, gradients, strict=True):
            if gradient is not None:
                parts[view].copy_(gradient)
        for weight, outputs_gradient, rows in self._deferred.end():
            parts[weight].addmm_(outputs_gradient.to(weight.dtype).t(), rows.to(weight.dtype))
        return flat

    def _replacement(self, layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, nn.Dropout):
            return SeededDropout(layer.p, self.dropout_generator)
        refuse_unseedable(layer)
        if is_plain_linear(layer):
            return FactoredLinear(layer, self._deferred, torch.bfloat16 if self._computes_in_bf16 else None)
        return None


def refuse_too_many(num_clients: int, room: int) -> None:
    """Raise ValueError where models have no room for so many clients."""
    if not 1 <= num_clients <= room:
        raise ValueError(f"{num_clients} clients do not fit a group of {room}; give 1 to {room}")


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
