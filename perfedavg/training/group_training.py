"""What many clients do at once: `train_locally` and `score` of a whole group, as one computation over stacked models.

A small model leaves most of a processor idle: a step takes its time to be told what to do. Here every client of a
group has a row of one matrix of parameters, and a step of all of them is as many kernels as a step of one. What a
client learns is what it would learn alone (its batches, its dropout masks, its optimizer), up to the rounding of
sums that a larger kernel adds up in another order.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perfedavg.seeding import torch_seeds
from perfedavg.settings import OptimizerConfig
from perfedavg.training.flat_model import flatten, refuse_buffers, refuse_unseedable
from perfedavg.training.layers import GroupBatches, GroupDropout, replace_layers
from perfedavg.training.local_training import SCORING_BATCH_SIZE, LocalTraining, Loss
from perfedavg.training.optimizers import Optimizer

Gradients = dict[str, Tensor]
"""By the name of a parameter, the gradients of the first clients, (clients, *shape)."""
Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs, labels and weights, as `StackedModel.differentiate` takes them; under a vmap those of one client."""


@dataclass(frozen=True)
class GroupMember:
    """A client's training part and its identity, as `train_locally` takes them.

    inputs: (num_examples, ...), labels: (num_examples,), on any device, the same for the whole group.
    """

    inputs: Tensor
    labels: Tensor
    seeds: np.random.SeedSequence


class StackedModel:
    """A private copy of a model for each client of a group, on one device.

    parameters: (group_size, num_parameters) a flat vector a client; writing to a row changes that client's model.
    precision: see `FlatModel`.

    Raises ValueError where a `FlatModel` would, and where a layer cannot be run for many clients at once: recurrent
    ones, for which torch has no rule, and those that mix the examples of a batch.
    """

    def __init__(
        self, model: nn.Module, group_size: int, device: torch.device | str = "cpu", precision: str = "float32"
    ) -> None:
        if group_size < 1:
            raise ValueError(f"a group of {group_size} clients cannot be trained; it needs 1 or more")
        self.device = torch.device(device)
        self._computes_in_bf16 = precision == "bf16"
        refuse_buffers(model)
        generators = [torch.Generator(device=_generator_device(self.device)) for _ in range(group_size)]
        self._batches = GroupBatches(generators, [])
        # Its parameters are never read: a call is given a client's in their place.
        self._module = replace_layers(copy.deepcopy(model), self._replacement)
        self.parameters = flatten(self._module).to(self.device).repeat(group_size, 1)
        self._views: dict[str, Tensor] = {}
        position = 0
        for name, parameter in self._module.named_parameters():
            row = slice(position, position + parameter.numel())
            self._views[name] = self.parameters[:, row].view(group_size, *parameter.shape)
            position = row.stop
        self._frozen = [name for name, parameter in self._module.named_parameters() if not parameter.requires_grad]
        self._uses = _uses_of_parameters(self._module)

    @property
    def group_size(self) -> int:
        return len(self.parameters)

    def load(self, parameters: Tensor) -> None:
        """Take over a flat vector, (num_parameters,), from any device, for every client."""
        self.parameters.copy_(parameters)

    def seed_dropout(self, client: int, seed: int) -> None:
        """Seed the source of a client's dropout masks."""
        self._batches.generators[client].manual_seed(seed)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run the first clients' models for scoring. inputs: (clients, rows, ...), outputs: (clients, rows, ...)."""
        self._module.eval()
        with torch.no_grad():
            return vmap(self._run)(self.first(len(inputs)), inputs)

    def differentiate(
        self, inputs: Tensor, labels: Tensor, weights: Tensor, sizes: list[int], loss_function: Loss
    ) -> tuple[Gradients, Tensor]:
        """Of the first clients, the gradients of their losses, each over its own batch, and the losses, (clients,).

        inputs: (clients, rows, ...), labels: (clients, rows).  weights: (clients, rows), of each example in its
        client's loss.  sizes: of each batch, the largest being `rows`. What is behind a batch has weight 0, and must
        be copies of its first example: what is not finite there would not vanish, and so comes from the batch itself.
        """

        def loss_of_client(parameters: Gradients, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
            return self.loss_of_client(parameters, inputs, labels, weights, loss_function)

        self.begin_batch(sizes)
        with self.computing():
            differentiated = vmap(grad_and_value(loss_of_client))(self.first(len(sizes)), inputs, labels, weights)
        gradients, losses = cast(tuple[Gradients, Tensor], differentiated)
        return self.freeze(gradients), losses

    def loss_of_client(
        self, parameters: Gradients, inputs: Tensor, labels: Tensor, weights: Tensor, loss_function: Loss
    ) -> Tensor:
        """The loss of one client with these parameters over its batch, under a vmap over clients."""
        outputs = self._run(parameters, inputs).to(self.parameters.dtype)
        return (_losses(outputs, labels, loss_function) * weights).sum()

    def begin_batch(self, sizes: list[int]) -> None:
        """Clients with batches of these sizes go through the model next, training."""
        self._batches.sizes = sizes
        self._module.train()

    def computing(self) -> contextlib.AbstractContextManager[object]:
        """In which training computes in the model's precision."""
        if self._computes_in_bf16:
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        return contextlib.nullcontext()

    def first(self, clients: int) -> dict[str, Tensor]:
        """The first clients' parameters by name, each (clients, *shape), as views."""
        return {name: view[:clients] for name, view in self._views.items()}

    def freeze(self, gradients: Gradients) -> Gradients:
        """The gradients, with zeros for the parameters that are not trained."""
        return {name: torch.zeros_like(value) if name in self._frozen else value for name, value in gradients.items()}

    def descend(self, gradients: Gradients, learning_rate: float) -> None:
        """A step of plain SGD of the first clients: parameters -= learning_rate * gradients."""
        for name, gradient in gradients.items():
            self._views[name][: len(gradient)].add_(gradient, alpha=-learning_rate)

    def _run(self, parameters: Gradients, inputs: Tensor) -> Tensor:
        used = {use: parameters[name] for use, name in self._uses.items()}
        return cast(Tensor, functional_call(self._module, used, (inputs,), tie_weights=False))

    def _replacement(self, layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            raise ValueError(
                f"{type(layer).__name__} cannot be trained many at once, nor by maml; use --client_batching 1, and "
                "--fine_tune_method fomaml or reptile"
            )
        if isinstance(layer, _BatchNorm):
            raise ValueError(
                f"{type(layer).__name__} mixes the examples of a batch, so it cannot be trained many at once; "
                "use --client_batching 1, or GroupNorm in its place"
            )
        refuse_unseedable(layer)
        return GroupDropout(layer.p, self._batches) if isinstance(layer, nn.Dropout) else None


def train_together(
    model: StackedModel,
    start: Tensor,
    clients: Sequence[GroupMember],
    training: LocalTraining,
    loss_function: Loss = F.cross_entropy,
    after_epochs: Callable[[dict[int, int]], None] | None = None,
) -> list[float]:
    """Train client i in row i, from `start`, as `train_locally` would; returns what it would return, for each.

    start: (num_parameters,).  clients: 1 to `group_size`; with the largest first, the rows need not be moved at the
    end. The examples of a batch must not influence each other, and the loss must be a plain mean over them.
    after_epochs: is told, by client, the numbers of the epochs (from 1) that end at a step, and may use the model but
    not change it; the clients must then be given with the largest first.
    """
    _refuse_too_many(model, len(clients))
    by_size = sorted(range(len(clients)), key=lambda client: -len(clients[client].labels))
    if after_epochs is not None and by_size != sorted(by_size):
        raise ValueError("the clients must be given with the largest first")
    members = [clients[client] for client in by_size]
    inputs = torch.cat([member.inputs for member in members]).to(model.device)
    labels = torch.cat([member.labels for member in members]).to(model.device)
    steps = _Steps.drawn(model, members, training)
    optimizer = _GroupOptimizer(model, training.optimizer)
    model.load(start)
    last_losses = torch.zeros(len(members), dtype=torch.float64, device=model.device)
    for step, sizes in enumerate(steps.sizes):
        active, rows = len(sizes), max(sizes)
        batch, counts = steps.examples[step, :active, :rows], steps.counts[step, :active]
        weights = weights_of(counts, rows, model.parameters.dtype)
        gradients, losses = model.differentiate(inputs[batch], labels[batch], weights, sizes, loss_function)
        optimizer.step(gradients)
        last_losses[:active] += torch.where(steps.is_last_epoch[step, :active], losses * counts, 0.0)
        if after_epochs is not None and (ended := steps.epochs_ended(step)):
            after_epochs(ended)
    places = sorted(range(len(members)), key=by_size.__getitem__)
    if by_size != sorted(by_size):
        model.parameters[: len(places)] = model.parameters[places]
    means = (last_losses / (steps.counts * steps.is_last_epoch).sum(0)).tolist()
    return [means[place] for place in places]


def differentiate_through(
    model: StackedModel,
    start: Tensor,
    clients: Sequence[GroupMember],
    training: LocalTraining,
    query: Batch,
    query_sizes: list[int],
    query_seeds: Sequence[int],
    loss_function: Loss = F.cross_entropy,
) -> tuple[Gradients, Tensor]:
    """The gradients at `start` of what the clients' losses on their queries are after they have trained from there.

    start: (num_parameters,).  clients: 1 to `group_size`, the largest first; each trains as `train_locally` would.
    training: with plain SGD, whose steps are differentiated too.
    query, query_sizes: as `StackedModel.differentiate` takes them.  query_seeds: of the dropout masks there.
    Returns the gradients and the losses, (clients,). Memory grows with the number of steps.
    """
    _refuse_too_many(model, len(clients))
    steps = _Steps.drawn(model, clients, training)
    inputs = torch.cat([client.inputs for client in clients]).to(model.device)
    labels = torch.cat([client.labels for client in clients]).to(model.device)
    # A client that has ended before others goes on with a batch of weight 0, which moves nothing.
    sizes = [[max(1, count) for count in step] for step in steps.counts.tolist()]
    batches: list[Batch] = []
    for examples, counts, step_sizes in zip(steps.examples, steps.counts, sizes, strict=True):
        rows = max(step_sizes)
        batch = examples[:, :rows]
        batches.append((inputs[batch], labels[batch], weights_of(counts, rows, model.parameters.dtype)))
    learning_rate = training.optimizer.learning_rate

    def loss_of_client(parameters: Gradients, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return model.loss_of_client(parameters, inputs, labels, weights, loss_function)

    def loss_after_training(parameters: Gradients, batches: list[Batch], query: Batch) -> Tensor:
        for step_sizes, batch in zip(sizes, batches, strict=True):
            model.begin_batch(step_sizes)
            gradients = model.freeze(cast(Gradients, grad(loss_of_client)(parameters, *batch)))
            parameters = {name: value - learning_rate * gradients[name] for name, value in parameters.items()}
        for client, seed in enumerate(query_seeds):
            model.seed_dropout(client, seed)
        model.begin_batch(query_sizes)
        return loss_of_client(parameters, *query)

    model.load(start)
    with model.computing():
        differentiated = vmap(grad_and_value(loss_after_training))(model.first(len(clients)), batches, query)
    gradients, losses = cast(tuple[Gradients, Tensor], differentiated)
    return model.freeze(gradients), losses


def score_together(
    model: StackedModel, tests: Sequence[tuple[Tensor, Tensor]], loss_function: Loss = F.cross_entropy
) -> list[tuple[float, float]]:
    """Score row i on a client's examples, as `score` would: mean loss, and accuracy in 0..1, for each.

    tests: inputs, (num_examples, ...), and labels, (num_examples,), of 1 to `group_size` clients, on any device, the
    same for all. About `SCORING_BATCH_SIZE` examples are run at a time; with the largest first, least is run in vain.
    """
    _refuse_too_many(model, len(tests))
    sizes = torch.tensor([len(labels) for _, labels in tests])
    offsets = sizes.cumsum(0) - sizes
    inputs = torch.cat([inputs for inputs, _ in tests]).to(model.device)
    labels = torch.cat([labels for _, labels in tests]).to(model.device)
    losses = torch.zeros(len(tests), dtype=torch.float64, device=model.device)
    correct = torch.zeros(len(tests), dtype=torch.int64, device=model.device)
    is_regression = labels.is_floating_point()
    rows = max(1, SCORING_BATCH_SIZE // len(tests))
    for start in range(0, int(sizes.max()), rows):
        active = int((sizes > start).nonzero().max()) + 1
        positions = torch.arange(start, min(start + rows, int(sizes.max()))).expand(active, -1)
        own = sizes[:active, None]
        batch = (offsets[:active, None] + positions.clamp(max=own - 1)).to(model.device)
        is_real = (positions < own).to(model.device)
        batch_labels = labels[batch]
        outputs = model(inputs[batch])
        batch_losses = _losses(outputs.flatten(0, 1), batch_labels.flatten(0, 1), loss_function).view(is_real.shape)
        losses[:active] += torch.where(is_real, batch_losses, 0.0).sum(dim=1, dtype=torch.float64)
        if not is_regression:
            correct[:active] += ((outputs.argmax(dim=2) == batch_labels) & is_real).sum(dim=1)
    return [
        (loss / size, math.nan if is_regression else right / size)
        for loss, right, size in zip(losses.tolist(), correct.tolist(), sizes.tolist(), strict=True)
    ]


def group_memory_bytes(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    training: LocalTraining,
    loss_function: Loss = F.cross_entropy,
) -> int:
    """A generous estimate of what one client adds to the memory of a group that is trained: the sum of

    - every tensor that a step of it writes (activations, gradients, the optimizer's state, the parameters), as if
      none were freed before the step ends. They are counted on torch's meta device, which has sizes but no memory;
    - its batch and, while the rows are put in order, its parameters once more;
    - its examples, once as given and once in the group's, and the order of its batches.

    inputs, labels: the training part of its largest client. What a library needs inside a kernel (the workspace of a
    convolution) and what an allocator wastes is not in it: leave a margin, also for scoring, which runs
    `SCORING_BATCH_SIZE` examples at a time. Raises ValueError where the model cannot be stacked.
    """
    stacked = StackedModel(model, 1, "meta")
    size = min(len(labels), training.batch_size)
    batch_inputs, batch_labels = (
        torch.empty((1, size, *part.shape[1:]), dtype=part.dtype, device="meta") for part in (inputs, labels)
    )
    weights = torch.empty((1, size), dtype=stacked.parameters.dtype, device="meta")
    with _Written() as written:
        optimizer = _GroupOptimizer(stacked, training.optimizer)
        gradients, _ = stacked.differentiate(batch_inputs, batch_labels, weights, [size], loss_function)
        optimizer.step(gradients)
    order_bytes = 2 * 8 * size * (1 + training.count_steps(len(labels)))
    examples_bytes = 2 * (inputs.nbytes + labels.nbytes) + batch_inputs.nbytes + batch_labels.nbytes
    return int(written.num_bytes + stacked.parameters.nbytes + examples_bytes + order_bytes)


@dataclass(frozen=True)
class _Steps:
    """Which examples enter which step of clients that stand in order of their steps' number, the most first.

    examples: (num_steps, clients, rows) places in the group's examples, one client's behind another's; of a client that
        has ended, its own first one, so that what is not finite in another's cannot reach it.
    counts: (num_steps, clients) how many of the rows are the client's batch: 0 from when it has ended.
    is_last_epoch: (num_steps, clients).
    sizes: for each step, the counts of those that still train, which by that order are the first ones.
    num_batches: of an epoch of each client.
    """

    examples: Tensor
    counts: Tensor
    is_last_epoch: Tensor
    sizes: list[list[int]]
    num_batches: list[int]

    @classmethod
    def drawn(cls, model: StackedModel, members: Sequence[GroupMember], training: LocalTraining) -> _Steps:
        """Draws each client's batches as `train_locally` does, and seeds its dropout."""
        largest = len(members[0].labels)
        batch_size = min(training.batch_size, largest)
        num_steps = training.count_steps(largest)
        examples = torch.zeros(num_steps, len(members), batch_size, dtype=torch.int64)
        counts = torch.zeros(num_steps, len(members), dtype=torch.int64)
        is_last_epoch = torch.zeros(num_steps, len(members), dtype=torch.bool)
        num_batches: list[int] = []
        offset = 0
        for client, member in enumerate(members):
            order_seed, dropout_seed = torch_seeds(member.seeds, 2)
            model.seed_dropout(client, dropout_seed)
            order_generator = torch.Generator().manual_seed(order_seed)
            num_examples = len(member.labels)
            own_steps = training.count_steps(num_examples)
            batches = _padded_batches(num_examples, batch_size, own_steps, order_generator)
            examples[:own_steps, client] = batches + offset
            examples[own_steps:, client] = offset
            offset += num_examples
            epoch_counts = [min(batch_size, num_examples - done) for done in range(0, num_examples, batch_size)]
            num_batches.append(len(epoch_counts))
            num_epochs = -(-own_steps // len(epoch_counts))
            counts[:own_steps, client] = torch.tensor(epoch_counts * num_epochs)[:own_steps]
            is_last_epoch[max(0, num_epochs - 1) * len(epoch_counts) : own_steps, client] = True
        sizes = [[count for count in step if count > 0] for step in counts.tolist()]
        device = model.device
        return cls(examples.to(device), counts.to(device), is_last_epoch.to(device), sizes, num_batches)

    def epochs_ended(self, step: int) -> dict[int, int]:
        """By client, the numbers of the epochs (from 1) of which a step (from 0) is the last; whole ones only."""
        active = range(len(self.sizes[step]))
        return {
            client: (step + 1) // self.num_batches[client]
            for client in active
            if (step + 1) % self.num_batches[client] == 0
        }


def _padded_batches(num_examples: int, batch_size: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """The batches of so many steps, (num_steps, batch_size); in a smaller one, its first example fills the rest."""
    num_batches = -(-num_examples // batch_size)
    num_epochs = max(1, -(-num_steps // num_batches))
    orders = torch.stack([torch.randperm(num_examples, generator=generator) for _ in range(num_epochs)])
    first_of_last = (num_batches - 1) * batch_size
    missing = num_batches * batch_size - num_examples
    filling = orders[:, first_of_last : first_of_last + 1].expand(-1, missing)
    return torch.cat([orders, filling], dim=1).view(-1, batch_size)[:num_steps]


class _GroupOptimizer:
    """A fresh optimizer for every client, as one over the rows of those that still train: every step is elementwise."""

    def __init__(self, model: StackedModel, config: OptimizerConfig) -> None:
        self._model = model
        self._config = config
        self._num_rows = len(model.parameters)
        self._optimizer = Optimizer(config, model.parameters)

    def step(self, gradients: Gradients) -> None:
        """One step of the first clients, never more of them than before."""
        if self._config.name == "sgd":
            self._model.descend(gradients, self._config.learning_rate)
            return
        matrix = torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)
        if len(matrix) < self._num_rows:
            self._narrow(len(matrix))
        self._optimizer.step(matrix)

    def _narrow(self, clients: int) -> None:
        """Go on with the first clients, and let the rows of the others be as they are."""
        state = self._optimizer.state
        self._num_rows = clients
        self._optimizer = Optimizer(self._config, self._model.parameters[:clients])
        self._optimizer.state.update(
            {name: value[:clients] if value.ndim > 0 else value for name, value in state.items()}
        )


class _Written(TorchDispatchMode):
    """Counts the memory of all tensors that were written while it was entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def num_bytes(self) -> int:
        return sum(int(storage.nbytes()) for storage in self._storages.values())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                # Kept, so that no other can get its number.
                storage = result.untyped_storage()
                self._storages[storage._cdata] = storage
        return results


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


def weights_of(counts: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(clients, rows): 1 / count on the first `count` examples of a client, 0 behind them. counts: (clients,)."""
    is_real = torch.arange(rows, device=counts.device) < counts[:, None]
    return is_real.to(dtype) / counts[:, None].clamp(min=1)


def _generator_device(device: torch.device) -> torch.device:
    """Where a device's random numbers come from; the meta device has none."""
    return torch.device("cpu") if device.type == "meta" else device


def _refuse_too_many(model: StackedModel, clients: int) -> None:
    if not 1 <= clients <= model.group_size:
        raise ValueError(f"{clients} clients do not fit a group of {model.group_size}; give 1 to {model.group_size}")
