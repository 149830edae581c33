"""Clients' private models, side by side: what one client does and what a group does at once, written once.

`FlatModel` is the fast way for one client, `StackedModel` takes a group in one computation. In a group a client learns
what it would learn alone (its batches, its dropout masks, its optimizer), up to the rounding of sums that a larger
kernel adds up in another order.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from perfedavg.metrics import Metric
from perfedavg.seeding import torch_seeds
from perfedavg.training.layout import Columns, Layout
from perfedavg.training.local_training import LocalTraining, Loss, Steps
from perfedavg.training.optimizers import Optimizer

SCORING_BATCH_SIZE = 512
"""Examples that are scored at a time, of all clients together."""
QUERY_BATCH_SIZE = 1024
"""Examples of each client over which a gradient is taken at a time: all of an ordinary client's, and what bounds the
memory of one that has the data of all."""

Penalty = Callable[[Tensor], Tensor]
"""Clients' parameters, (clients, num_parameters), to the gradients of what is added to their losses, of equal shape.
Those of buffers count as 0."""
AfterEpochs = Callable[[dict[int, int]], None]
"""Is told, by the client's place, the number of each epoch that has just ended; 0 before the first step."""


def pull_to(anchor: Tensor, strength: float) -> Penalty:
    """The gradient of strength/2 * ||w - anchor||^2 by w.

    anchor: (num_parameters,), or a row a client. What a call returns is overwritten by the next, because memory that
    is new in every step costs more than the arithmetic.
    """
    kept: list[Tensor] = []

    def pull(parameters: Tensor) -> Tensor:
        if not kept or len(kept[0]) < len(parameters):
            kept[:] = [torch.empty_like(parameters)]
        rows = anchor[: len(parameters)] if anchor.ndim > 1 else anchor
        return torch.sub(parameters, rows, out=kept[0][: len(parameters)]).mul_(strength)

    return pull


@dataclass
class Client:
    """A client as its method sees it.

    inputs: (num_examples, ...), labels: (num_examples,) or (num_examples, ...), its training part, on any device.
    seeds: its identity, from which everything random about it follows.
    state: what it kept in its last round, by name, on any device; empty for one that was never trained, and for
        methods without state.
    """

    inputs: Tensor
    labels: Tensor
    seeds: np.random.SeedSequence
    state: dict[str, Tensor] = field(default_factory=dict)

    def in_pass(self, number: int) -> Client:
        """The same client with other seeds, for further passes over its examples; 0 and above."""
        entropy, key = self.seeds.entropy, (*self.seeds.spawn_key, number)
        return replace(self, seeds=np.random.SeedSequence(entropy, spawn_key=key))


def kept_rows(clients: Sequence[Client], name: str, otherwise: Tensor) -> Tensor:
    """What each client kept by that name, or else another value, on its device. A copy, (clients, *its shape)."""
    return torch.stack([client.state.get(name, otherwise).to(otherwise.device) for client in clients])


class Query(NamedTuple):
    """Examples on which a client's gradient is taken, and the seed of the dropout masks there."""

    inputs: Tensor
    labels: Tensor
    dropout_seed: int


class Batch(NamedTuple):
    """A batch of each of the first clients.

    inputs: (clients, rows, ...), labels: (clients, rows) or (clients, rows, ...). Behind a client's own rows are
        copies of its first one, because 0 * inf is NaN.
    sizes: by client, the number of its own rows, but 1 where it has none.
    counts: (clients,) the number of its own rows, on the models' device.
    totals: examples over which each client's mean loss is taken: all of `sizes`, or more where this is a piece.
    """

    inputs: Tensor
    labels: Tensor
    sizes: Sequence[int]
    counts: Tensor
    totals: Sequence[int]


class ClientModels(ABC):
    """Private models of clients, which train, are differentiated and are scored together.

    Clients are given with the largest first, those of a call are the first ones here.

    loss_function: a plain mean over the examples of a batch, which must not influence each other.
    num_buffer_entries: how many of a row's entries, the last ones, are the model's buffers. Training moves them
        without gradients.
    layout: which column of a row is which parameter's.
    """

    device: torch.device
    loss_function: Loss
    num_buffer_entries: int
    layout: Layout
    _frozen: Columns | None = None

    @property
    @abstractmethod
    def parameters(self) -> Tensor:
        """(clients, num_parameters): a row for each client of the last call, parameters and buffers. Not a copy."""

    @property
    def num_weights(self) -> int:
        """How many of a row's entries, the first ones, are parameters, which gradients move, and not buffers."""
        return self.parameters.shape[1] - self.num_buffer_entries

    @abstractmethod
    def load(self, parameters: Tensor, num_clients: int = 1) -> None:
        """Let so many clients start from a flat vector, (num_parameters,), or from a row each, of any device.

        Raises ValueError where there is no room for them.
        """

    @abstractmethod
    def refresh(self) -> None:
        """`parameters` has been written to: bring what is derived from it up to date."""

    @abstractmethod
    def seed_dropout(self, client: int, seed: int) -> None:
        """Seed the source of a client's dropout masks."""

    @property
    @abstractmethod
    def dropout_generators(self) -> Sequence[torch.Generator]:
        """The sources of the dropout masks, a client each."""

    @contextlib.contextmanager
    def repeating_dropout(self) -> Iterator[None]:
        """What is run meanwhile has the dropout masks that the next batch has afterwards."""
        states = [(generator, generator.get_state()) for generator in self.dropout_generators]
        yield
        for generator, state in states:
            generator.set_state(state)

    @abstractmethod
    def descend_on(self, batch: Batch, learning_rate: float) -> Tensor:
        """A step of plain SGD on each client's batch. Returns the losses before it, (clients,)."""

    @abstractmethod
    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The gradients, (clients, num_parameters), and losses, (clients,), of each client's batch.

        Of a piece, its part in the mean over `totals`: those of all pieces add up.
        """

    @abstractmethod
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the losses and numbers of right answers, each (clients,), and the outputs, (clients, rows, ...).

        Dropout rests.
        """

    @abstractmethod
    def _train_only(self, names: Collection[str] | None) -> None:
        """From now on differentiate by these parameters only; None for all that the model itself lets train."""

    @contextlib.contextmanager
    def training_only(self, names: Collection[str] | None) -> Iterator[None]:
        """Meanwhile only these parameters, at least one, are trained; gradients of others are 0 and cost nothing.

        None trains all.
        """
        if names is None:
            yield
            return
        self._frozen = self.layout.columns(self.layout.others(names))
        self._train_only(names)
        try:
            yield
        finally:
            self._frozen = None
            self._train_only(None)

    def gradients_through_training(
        self, start: Tensor, clients: Sequence[Client], queries: Sequence[Query], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        """The gradients at `start` of the loss that each client has on its query after it has trained from there.

        training: with plain SGD, whose steps are differentiated too. Memory grows with their number.
        Returns (clients, num_parameters), and the losses. Only stacked models can.
        """
        raise NotImplementedError(f"{type(self).__name__} does not differentiate through training")

    def train(
        self,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        penalty: Penalty | None = None,
        after_epochs: AfterEpochs | None = None,
        trained: Collection[str] | None = None,
    ) -> list[float]:
        """Train each client from `start`, with a fresh optimizer.

        start: (num_parameters,), or a row a client, (clients, num_parameters); `parameters` to go on from there.
        after_epochs: as `steps` takes it.
        trained: the names of the parameters to train (see `training_only`); None for all.
        Returns each client's mean loss, without the penalty (see `LocalSteps.losses`).
        """
        self.load(start, len(clients))
        steps = self.steps(clients, training, after_epochs)
        span = None if trained is None else self.layout.columns(trained).span
        optimizer = Optimizer(training.optimizer, self.parameters, span)
        with self.training_only(trained):
            for batch in steps:
                steps.note(self.take_step(batch, optimizer, penalty))
        return steps.losses

    def steps(
        self, clients: Sequence[Client], training: LocalTraining, after_epochs: AfterEpochs | None = None
    ) -> LocalSteps:
        """The batches of the clients' local training, to iterate over once. Seeds their dropout too."""
        return LocalSteps(self, clients, training, after_epochs)

    def take_step(self, batch: Batch, optimizer: Optimizer, penalty: Penalty | None = None) -> Tensor:
        """A step of each client on its batch. Returns the losses before it, (clients,).

        optimizer: of `parameters`, whose rows of clients that have ended stay as they are.
        """
        # Before the step, which changes the parameters.
        pull = None if penalty is None else penalty(self.parameters[: len(batch.sizes)])
        if pull is not None and self.num_buffer_entries:
            pull[:, -self.num_buffer_entries :] = 0
        if pull is not None and self._frozen is not None:
            self._frozen.clear(pull)
        rate = optimizer.rate_of_plain_sgd
        if rate is not None:
            losses = self.descend_on(batch, rate)
            if pull is not None:
                self.parameters[: len(pull)].add_(pull, alpha=-rate)
                self.refresh()
            return losses
        gradients, losses = self.differentiate(batch)
        optimizer.narrow(len(gradients))
        optimizer.step(gradients if pull is None else gradients.add_(pull))
        self.refresh()
        return losses

    def gradients(self, queries: Sequence[Query]) -> tuple[Tensor, list[float]]:
        """The gradients of each client's mean loss over its query at `parameters`, and the losses; dropout is on.

        Returns (clients, num_parameters), which may be changed, and the losses.
        """

        def differentiate(batch: Batch, seeds: list[int]) -> tuple[Tensor, Tensor]:
            for client, seed in enumerate(seeds):
                self.seed_dropout(client, seed)
            return self.differentiate(batch)

        return self.sum_over_pieces(queries, differentiate)

    def score(
        self, tests: Sequence[tuple[Tensor, Tensor]], metrics: Mapping[str, Metric] = MappingProxyType({})
    ) -> list[dict[str, float]]:
        """Each client's mean `loss` and `accuracy`, 0..1, at `parameters` on its test part, and the values of metrics.

        tests: inputs, (num_examples, ...), and labels, in any order of size: classes, (num_examples,), or of each of an
        example's places, (num_examples, places), whose outputs are (num_examples, classes, places) and which all count
        alike. Labels that are not whole numbers are targets of a regression, of which the accuracy is NaN.
        metrics: by the names of their values.
        """
        losses = torch.zeros(len(tests), dtype=torch.float64, device=self.device)
        correct = torch.zeros(len(tests), dtype=torch.int64, device=self.device)
        outputs: list[list[Tensor]] = [[] for _ in tests]
        for _, batch in self.pieces(tests, max(1, SCORING_BATCH_SIZE // len(tests))):
            sums, numbers, rows = self.evaluate(batch)
            losses[: len(sums)] += sums
            correct[: len(sums)] += numbers
            if metrics:
                for client, count in enumerate(batch.counts.tolist()):
                    outputs[client].append(rows[client, :count].cpu())
        scores = [
            {
                "loss": loss / len(labels),
                "accuracy": math.nan if labels.is_floating_point() else right / labels.numel(),
            }
            for loss, right, (_, labels) in zip(losses.tolist(), correct.tolist(), tests, strict=True)
        ]
        if metrics:
            for score, parts, (_, labels) in zip(scores, outputs, tests, strict=True):
                whole = torch.cat(parts), labels.cpu()
                score |= {name: float(metric.value_of(*whole)) for name, metric in metrics.items()}
        return scores

    def draw_steps(self, clients: Sequence[Client], training: LocalTraining) -> Steps:
        """The clients' batches. Seeds their dropout too."""
        order_seeds = []
        for place, client in enumerate(clients):
            order_seed, dropout_seed = torch_seeds(client.seeds, 2)
            self.seed_dropout(place, dropout_seed)
            order_seeds.append(order_seed)
        return Steps.draw([len(client.labels) for client in clients], order_seeds, training, self.device)

    def together(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the clients, one behind the other, on the models' device."""
        if len(parts) == 1:
            inputs, labels = parts[0]
        else:
            inputs, labels = (torch.cat([part[kind] for part in parts]) for kind in (0, 1))
        return inputs.to(self.device), labels.to(self.device)

    def pieces(self, parts: Sequence[tuple[Tensor, Tensor]], num_rows: int) -> Iterator[tuple[int, Batch]]:
        """The clients' examples in order, up to so many of each at a time, and the place of the first of them.

        Clients behind the last one that has any left are not in it; others that have ended have copies of an example.
        """
        totals = [len(labels) for _, labels in parts]
        inputs, labels = self.together(parts)
        ends = torch.tensor(totals).cumsum(0)[:, None]
        lengths = torch.tensor(totals)[:, None]
        for first in range(0, max(totals), num_rows):
            active = 1 + max(place for place, total in enumerate(totals) if total > first)
            left = (lengths[:active] - first).clamp(0, num_rows)
            sizes = left.clamp(min=1).flatten().tolist()
            counts = left.flatten().to(self.device)
            if len(parts) == 1:
                rows = slice(first, first + sizes[0])
                yield first, Batch(inputs[None, rows], labels[None, rows], sizes, counts, totals)
                continue
            row = torch.arange(max(sizes))
            own_first = first * (left > 0)
            places = (ends - lengths)[:active] + own_first + row.where(row < left, 0)
            places = places.to(self.device)
            yield first, Batch(inputs[places], labels[places], sizes, counts, totals[:active])

    def sum_over_pieces(
        self, queries: Sequence[Query], differentiate: Callable[[Batch, list[int]], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[float]]:
        """Gradients and losses on queries of any size, which are run in pieces.

        differentiate: is given a piece and a seed of each client's dropout masks there.
        """
        total: tuple[Tensor, Tensor] | None = None
        for first, batch in self.pieces([(query.inputs, query.labels) for query in queries], QUERY_BATCH_SIZE):
            seeds = [query.dropout_seed + first for query in queries[: len(batch.sizes)]]
            part = differentiate(batch, seeds)
            if total is None:
                total = part
            else:
                for whole, more in zip(total, part, strict=True):
                    whole[: len(more)] += more
        assert total is not None, "each client has an example"
        return total[0], total[1].tolist()


class LocalSteps:
    """The batches of clients' local training, one after the other. See `ClientModels.steps`.

    after_epochs: is told of epochs when the next batch is asked for. It may use the models but not change them. Where
        steps are counted, an epoch that is cut short has no end; a group may still train beside a client whose epoch
        has ended.
    """

    def __init__(
        self,
        models: ClientModels,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs | None = None,
    ) -> None:
        self._inputs, self._labels = models.together([(client.inputs, client.labels) for client in clients])
        self._steps = models.draw_steps(clients, training)
        self._after_epochs = after_epochs
        self._sums = torch.zeros(len(clients), dtype=torch.float64, device=models.device)
        self._step, self._counts = 0, self._steps.counts[:1]

    def __iter__(self) -> Iterator[Batch]:
        steps, after_epochs = self._steps, self._after_epochs
        if after_epochs is not None:
            after_epochs(dict.fromkeys(range(len(self._sums)), 0))
        for self._step, (positions, self._counts, sizes) in enumerate(steps):
            yield Batch(self._inputs[positions], self._labels[positions], sizes, self._counts, sizes)
            if after_epochs is not None and (ended := steps.epochs_ended(self._step)):
                after_epochs(ended)

    def note(self, losses: Tensor) -> None:
        """The losses of the present batch, (clients,), before the step."""
        if self._step >= self._steps.first_of_last_epochs:
            is_last = self._steps.is_last_epoch[self._step, : len(losses)]
            self._sums[: len(losses)] += torch.where(is_last, losses * self._counts, 0.0)

    @property
    def losses(self) -> list[float]:
        """Each client's mean loss over the examples of its last epoch, each before its step; NaN where it took none."""
        means: list[float] = (self._sums / self._steps.num_last_examples).tolist()
        return means
