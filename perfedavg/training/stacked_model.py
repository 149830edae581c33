"""The models of a group of clients, trained as one computation.

A small model leaves most of a processor idle: a step takes its time to be told what to do. Here every client of a
group has a row of one matrix of parameters, and a step of all of them is as many kernels as a step of one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from perfedavg.settings import flag
from perfedavg.training.client_models import Batch, Client, ClientModels, Query
from perfedavg.training.flat_model import (
    flatten,
    refuse_mixed_types,
    refuse_too_many,
    refuse_unseedable,
)
from perfedavg.training.layers import GroupBatches, GroupDropout, replace_layers
from perfedavg.training.layout import Layout, count_buffer_entries, moving_buffers
from perfedavg.training.local_training import LocalTraining, Loss

Gradients = dict[str, Tensor]
"""By the name of a parameter, the gradients of the first clients, (clients, *shape)."""
Rows = tuple[Tensor, Tensor, Tensor]
"""Inputs, labels and weights of the first clients' batches; under a vmap those of one client."""


class StackedModel(ClientModels):
    """A private copy of a model for each client of a group, on one device.

    group_size: clients there is room for.  precision: see `FlatModel`.

    Raises ValueError where a `FlatModel` would, and where a layer cannot be run for many clients at once: recurrent
    ones, for which torch has no rule, and those that mix the examples of a batch or move their buffers in training.
    So buffers are constants here, and the same for all clients.
    """

    def __init__(
        self,
        model: nn.Module,
        group_size: int,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        loss_function: Loss = F.cross_entropy,
    ) -> None:
        if group_size < 1:
            raise ValueError(f"a group of {group_size} clients cannot be trained; it needs 1 or more")
        self.device = torch.device(device)
        self.loss_function = loss_function
        self._num_clients = group_size
        self._computes_in_bf16 = precision == "bf16"
        refuse_mixed_types(model)
        generators = [torch.Generator(device=_generator_device(self.device)) for _ in range(group_size)]
        self._batches = GroupBatches(generators, [])
        # Its parameters are never read: a call is given a client's in their place.
        self._module = replace_layers(copy.deepcopy(model), self._replacement)
        self._matrix = flatten(self._module).to(self.device).repeat(group_size, 1)
        self._views: dict[str, Tensor] = {}
        position = 0
        for name, parameter in self._module.named_parameters():
            row = slice(position, position + parameter.numel())
            self._views[name] = self._matrix[:, row].view(group_size, *parameter.shape)
            position = row.stop
        for layer in self._module.modules():
            layer._buffers.update(
                {name: held.to(self.device) for name, held in layer._buffers.items() if held is not None}
            )
        self.num_buffer_entries = count_buffer_entries(self._module)
        self.layout = Layout.of(model)
        self._trainable = [name for name, parameter in self._module.named_parameters() if parameter.requires_grad]
        self._trained = self._trainable
        self._uses = _uses_of_parameters(self._module)

    @property
    def parameters(self) -> Tensor:
        return self._matrix[: self._num_clients]

    def load(self, parameters: Tensor, num_clients: int = 1) -> None:
        refuse_too_many(num_clients, len(self._matrix))
        self._num_clients = num_clients
        self._matrix[:num_clients] = parameters
        if self.num_buffer_entries:
            buffers = moving_buffers(self._module).values()
            values = self._matrix[0, -self.num_buffer_entries :].split([buffer.numel() for buffer in buffers])
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value.view_as(buffer))

    def refresh(self) -> None:
        """Nothing is derived from the parameters."""

    @property
    def dropout_generators(self) -> Sequence[torch.Generator]:
        return self._batches.generators

    def seed_dropout(self, client: int, seed: int) -> None:
        self._batches.generators[client].manual_seed(seed)

    def descend_on(self, batch: Batch, learning_rate: float) -> Tensor:
        gradients, losses = self._differentiate(batch)
        for name, gradient in gradients.items():
            self._views[name][: len(gradient)].add_(gradient, alpha=-learning_rate)
        return losses

    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        gradients, losses = self._differentiate(batch)
        return self._flat(gradients), losses

    def _train_only(self, names: Collection[str] | None) -> None:
        self._trained = [name for name in self._trainable if names is None or name in names]

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        is_real = _is_real(batch)
        self._module.eval()
        with torch.no_grad():
            outputs = vmap(self._run)(*self._first(len(batch.sizes)), batch.inputs)
            losses = _losses(outputs.flatten(0, 1), batch.labels.flatten(0, 1), self.loss_function).view(is_real.shape)
            sums = torch.where(is_real, losses, 0.0).sum(dim=1, dtype=torch.float64)
            if batch.labels.is_floating_point():
                return sums, torch.zeros_like(batch.counts), outputs
            # An example has a class, or one at each of several places.
            right = (outputs.argmax(dim=2) == batch.labels).view(*is_real.shape, -1)
            return sums, (right & is_real[:, :, None]).sum(dim=(1, 2)), outputs

    def gradients_through_training(
        self, start: Tensor, clients: Sequence[Client], queries: Sequence[Query], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        def differentiate(query: Batch, seeds: list[int]) -> tuple[Tensor, Tensor]:
            supports = clients[: len(seeds)]
            self.load(start, len(supports))
            return self._differentiate_through(supports, training, query, seeds)

        return self.sum_over_pieces(queries, differentiate)

    def _differentiate_through(
        self, clients: Sequence[Client], training: LocalTraining, query: Batch, query_seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Gradients and losses of the clients' queries after training, at the parameters before it."""
        inputs, labels = self.together([(client.inputs, client.labels) for client in clients])
        steps = self.draw_steps(clients, training)
        # A client that has ended before others goes on with a batch of weight 0, which moves nothing.
        sizes = [[max(1, count) for count in step] for step in steps.counts.tolist()]
        batches: list[Rows] = []
        for places, counts, step_sizes in zip(steps.examples, steps.counts, sizes, strict=True):
            places = places[:, : max(step_sizes)]
            batches.append(self._rows(Batch(inputs[places], labels[places], step_sizes, counts, step_sizes)))
        learning_rate = training.optimizer.learning_rate

        def loss_after_training(trained: Gradients, frozen: Gradients, batches: list[Rows], query: Rows) -> Tensor:
            for step_sizes, batch in zip(sizes, batches, strict=True):
                self._begin_batch(step_sizes)
                gradients = cast(Gradients, grad(self._loss_of_client)(trained, frozen, *batch))
                trained = {name: value - learning_rate * gradients[name] for name, value in trained.items()}
            for client, seed in enumerate(query_seeds):
                self.seed_dropout(client, seed)
            self._begin_batch(query_sizes)
            return self._loss_of_client(trained, frozen, *query)

        query_sizes = query.sizes
        with self._computing():
            differentiated = vmap(grad_and_value(loss_after_training))(
                *self._first(len(clients)), batches, self._rows(query)
            )
        gradients, losses = cast(tuple[Gradients, Tensor], differentiated)
        return self._flat(gradients), losses

    def _differentiate(self, batch: Batch) -> tuple[Gradients, Tensor]:
        """The gradients of what is trained, each client's over its own batch, and the losses, (clients,)."""
        self._begin_batch(batch.sizes)
        with self._computing():
            differentiated = vmap(grad_and_value(self._loss_of_client))(
                *self._first(len(batch.sizes)), *self._rows(batch)
            )
        return cast(tuple[Gradients, Tensor], differentiated)

    def _rows(self, batch: Batch) -> Rows:
        """With the weight of each example in its client's loss."""
        is_whole = batch.totals is batch.sizes
        totals = batch.counts if is_whole else torch.tensor(batch.totals, device=self.device)
        weights = _is_real(batch).to(self._matrix.dtype) / totals[:, None].clamp(min=1)
        return batch.inputs, batch.labels, weights

    def _loss_of_client(
        self, trained: Gradients, frozen: Gradients, inputs: Tensor, labels: Tensor, weights: Tensor
    ) -> Tensor:
        """The loss of one client with these parameters over its batch, under a vmap over clients."""
        outputs = self._run(trained, frozen, inputs).to(self._matrix.dtype)
        return (_losses(outputs, labels, self.loss_function) * weights).sum()

    def _begin_batch(self, sizes: Sequence[int]) -> None:
        """Clients with batches of these sizes go through the model next, training."""
        self._batches.sizes = sizes
        self._module.train()

    def _computing(self) -> contextlib.AbstractContextManager[object]:
        """In which training computes in the model's precision."""
        if self._computes_in_bf16:
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        return contextlib.nullcontext()

    def _first(self, clients: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The first clients' parameters by name, each (clients, *shape), as views: those trained, and the others."""
        trained = {name: self._views[name][:clients] for name in self._trained}
        return trained, {name: view[:clients] for name, view in self._views.items() if name not in trained}

    def _flat(self, gradients: Gradients) -> Tensor:
        """As one matrix, (clients, num_parameters), with zeros for what is not trained."""
        (num_clients, *_), *_ = (gradient.shape for gradient in gradients.values())
        parts = [
            gradients[name].flatten(1) if name in gradients else torch.zeros_like(view[:num_clients]).flatten(1)
            for name, view in self._views.items()
        ]
        if self.num_buffer_entries:
            parts.append(parts[0].new_zeros(num_clients, self.num_buffer_entries))
        return torch.cat(parts, dim=1)

    def _run(self, trained: Gradients, frozen: Gradients, inputs: Tensor) -> Tensor:
        parameters = {**frozen, **trained}
        used = {use: parameters[name] for use, name in self._uses.items()}
        return cast(Tensor, functional_call(self._module, used, (inputs,), tie_weights=False))

    def _replacement(self, layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            raise ValueError(
                f"{type(layer).__name__} cannot be trained many at once, nor differentiated twice; use "
                f"{flag('client_batching')} 1, and a method without second derivatives"
            )
        if isinstance(layer, _BatchNorm):
            raise ValueError(
                f"{type(layer).__name__} mixes the examples of a batch, so it cannot be trained many at once; "
                f"use {flag('client_batching')} 1 and a method without second derivatives, or GroupNorm in its place"
            )
        if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
            raise ValueError(
                f"{type(layer).__name__} with track_running_stats moves its buffers, so it cannot be trained many at "
                f"once; use {flag('client_batching')} 1, or leave that out"
            )
        refuse_unseedable(layer)
        return GroupDropout(layer.p, self._batches) if isinstance(layer, nn.Dropout) else None


def _uses_of_parameters(module: nn.Module) -> dict[str, str]:
    """By every name that stands for a parameter in a layer, the first name of that parameter; each layer once.

    Tied weights have several uses. `functional_call` would find them itself, but of a layer that has two names it
    keeps the parameters that it was called with (torch 2.13).
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        use: names[parameter]
        for prefix, layer in module.named_modules()
        for use, parameter in layer.named_parameters(prefix, recurse=False, remove_duplicate=False)
    }


def _losses(outputs: Tensor, labels: Tensor, loss_function: Loss) -> Tensor:
    """The loss of each example, (rows,), as that of a batch of one."""
    return vmap(lambda output, label: loss_function(output[None], label[None]))(outputs, labels)


def _is_real(batch: Batch) -> Tensor:
    """(clients, rows): which rows are the client's own."""
    return torch.arange(batch.inputs.shape[1], device=batch.counts.device) < batch.counts[:, None]


def _generator_device(device: torch.device) -> torch.device:
    """Where a device's random numbers come from; the meta device has none."""
    return torch.device("cpu") if device.type == "meta" else device
