"""The model of one client, which is one flat vector, and that is what server and clients exchange.

The vector holds the parameters and then the buffers that a model saves and that are floating-point numbers, such as
BatchNorm's running statistics. They so are initialized, trained, averaged, kept and sent as parameters are.
Other buffers, such as counters of batches, start afresh with each client.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

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
from perfedavg.training.layout import Layout, count_buffer_entries, entries_of, moving_buffers
from perfedavg.training.local_training import Loss


class FlatModel(ClientModels):
    """A private copy of a model on one device, with its parameters and buffers as views of one flat vector.

    module: the copy, with layers that are seeded or faster in place of some (see `perfedavg.training.layers`).
    vector: (num_parameters,) the parameters and buffers; writing to it changes the model, once `refresh` is called.
        A training step moves the buffers in place.
    dropout_generator: the source of every dropout mask.

    precision: `float32`, which leaves every type as it is, or `bf16`: while the model trains, its layers compute in
        bfloat16 as torch.autocast chooses; parameters, optimizer and losses keep their own type.

    Raises ValueError where the model has a layer whose randomness cannot be seeded for each client, or buffers of
    another type than its parameters.
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
        refuse_mixed_types(model)
        self._computes_in_bf16 = precision == "bf16"
        self._deferred = DeferredGradients()
        # The generator is bound after the copy, because a generator cannot be deep-copied.
        self.module = replace_layers(copy.deepcopy(model).to(self.device), self._replacement)
        self.vector = flatten(self.module)
        unflatten_into(self.module, self.vector)
        self.num_buffer_entries = count_buffer_entries(self.module)
        moving = {id(buffer) for buffer in moving_buffers(self.module).values()}
        self._buffers = [
            (layer, name, held)
            for layer in self.module.modules()
            for name, held in layer._buffers.items()
            if held is not None
        ]
        self._fresh_buffers = [(held, held.clone()) for _, _, held in self._buffers if id(held) not in moving]
        self.layout = Layout.of(model)
        self._trainable = {name: view for name, view in self.module.named_parameters() if view.requires_grad}
        self._trained = list(self._trainable.values())
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
        self.vector.copy_(parameters.reshape(-1))
        for layer, name, held in self._buffers:
            if layer._buffers[name] is not held:
                raise ValueError(
                    f"{type(layer).__name__} puts a new tensor in the place of its buffer {name}, which so would pass "
                    f"from client to client; write to it instead, as in self.{name}.copy_(...)"
                )
        for held, fresh in self._fresh_buffers:
            held.copy_(fresh)
        self.module.train()
        self.refresh()

    def refresh(self) -> None:
        for layer in self._dense_layers:
            layer.refresh()

    @property
    def dropout_generators(self) -> list[torch.Generator]:
        return [self.dropout_generator]

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

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        self.module.eval()
        labels = batch.labels[0]
        with torch.no_grad():
            outputs = self(batch.inputs[0])
            losses = self.loss_function(outputs, labels) * len(labels)
            if labels.is_floating_point():
                return losses[None], torch.zeros_like(batch.counts), outputs[None]
            return losses[None], (outputs.argmax(dim=1) == labels).sum()[None], outputs[None]

    def _train_only(self, names: Collection[str] | None) -> None:
        for name, view in self._trainable.items():
            view.requires_grad_(names is None or name in names)
        self._trained = [view for view in self._trainable.values() if view.requires_grad]

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
        """The gradient of the loss, a scalar that the model gave: (num_parameters,), in the vector's order.

        It is 0 for buffers, and for parameters that do not require one.
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


def refuse_mixed_types(model: nn.Module) -> None:
    """Raise ValueError where the model has buffers that have no place in the vector of its parameters."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    for name, buffer in moving_buffers(model).items():
        if kinds and buffer.dtype not in kinds:
            raise ValueError(
                f"the model's buffer {name} is {buffer.dtype}, its parameters are {', '.join(map(str, kinds))}; make "
                "them alike, as in model.float()"
            )


def refuse_unseedable(layer: nn.Module) -> None:
    """Raise ValueError where a layer, other than an `nn.Dropout`, has randomness that no seed of a client reaches."""
    if isinstance(layer, nn.Dropout):
        return
    if isinstance(layer, _DropoutNd) or (isinstance(layer, nn.RNNBase) and layer.dropout > 0):
        raise ValueError(f"{type(layer).__name__} draws from torch's global generator; use nn.Dropout in its place")
    if isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0:
        raise ValueError(f"{type(layer).__name__} draws from torch's global generator; give it dropout=0")


def flatten(model: nn.Module) -> Tensor:
    """A copy of the model as one vector, (num_parameters,): `entries_of`, one behind the other."""
    return torch.cat([entry.detach().reshape(-1) for entry in entries_of(model).values()])


def unflatten_into(model: nn.Module, vector: Tensor) -> None:
    """Let a model's parameters and buffers be views of its vector, (num_parameters,), of the same device and type."""
    buffers = moving_buffers(model)
    nn.utils.vector_to_parameters(vector, model.parameters())
    position = len(vector) - sum(buffer.numel() for buffer in buffers.values())
    views = {}
    for buffer in buffers.values():
        # .data, because views share a count of writes, by which autograd would take one buffer's for another's.
        views[id(buffer)] = vector[position : position + buffer.numel()].view_as(buffer).data
        position += buffer.numel()
    for layer in model.modules():
        for name, held in layer._buffers.items():
            layer._buffers[name] = views.get(id(held), held)


def copy_into(model: nn.Module, vector: Tensor) -> None:
    """Give a model's own parameters and buffers the values of a vector, (num_parameters,)."""
    entries = entries_of(model).values()
    with torch.no_grad():
        for entry, values in zip(entries, vector.split([entry.numel() for entry in entries]), strict=True):
            entry.copy_(values.view_as(entry))
