"""What a client sends in MAML and FOMAML (Finn et al. 2017, arXiv 1703.03400): the gradient of its loss after adapting.

A client's examples are cut into a support part, on which the model takes K steps of SGD from theta to theta_K, and a
query part, on which the loss L of theta_K is taken. MAML's gradient is dL(theta_K)/dtheta, through the K steps, second
derivatives and all; FOMAML's is dL(theta_K)/dtheta_K. The server's optimizer descends along their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perfedavg.seeding import torch_seeds
from perfedavg.training.flat_model import FlatModel
from perfedavg.training.group_training import (
    Gradients,
    GroupMember,
    StackedModel,
    differentiate_through,
    train_together,
)
from perfedavg.training.local_training import LocalTraining, Loss, train_locally

QUERY_BATCH_SIZE = 1024
"""Examples of a query part that are run at a time: all of an ordinary client's, and what bounds the memory of one that
has the data of all. The gradient of a mean is the weighted sum of those of its parts."""


@dataclass(frozen=True)
class MetaTask:
    """A client's two parts.

    support: to adapt on.  query_inputs: (num_examples, ...), query_labels: (num_examples, ...), to measure on.
    query_seed: of the dropout masks while it is measured.
    """

    support: GroupMember
    query_inputs: Tensor
    query_labels: Tensor
    query_seed: int


def cut_task(inputs: Tensor, labels: Tensor, seeds: np.random.SeedSequence, support_fraction: float) -> MetaTask:
    """Cut a client's training part at random, which follows from its seeds, into support and query.

    support_fraction: see `PhaseConfig`. Each part has at least one example; a single example is both.
    """
    cut_seed, query_seed = torch_seeds(seeds, 4)[2:]  # the first two are the batch order's and the dropout's
    num_examples = len(labels)
    if support_fraction == 1 or num_examples == 1:
        return MetaTask(GroupMember(inputs, labels, seeds), inputs, labels, query_seed)
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(cut_seed)).to(labels.device)
    cut = min(max(round(num_examples * support_fraction), 1), num_examples - 1)
    support, query = order[:cut], order[cut:]
    return MetaTask(GroupMember(inputs[support], labels[support], seeds), inputs[query], labels[query], query_seed)


def fomaml_gradient(
    model: FlatModel, task: MetaTask, training: LocalTraining, loss_function: Loss = F.cross_entropy
) -> tuple[Tensor, float]:
    """FOMAML's gradient, (num_parameters,), from the model's present parameters, and the loss on the query part."""
    support = task.support
    train_locally(model, support.inputs, support.labels, training, support.seeds, loss_function)
    model.module.train()
    model.dropout_generator.manual_seed(task.query_seed)
    parts = zip(task.query_inputs.split(QUERY_BATCH_SIZE), task.query_labels.split(QUERY_BATCH_SIZE), strict=True)
    gradient, mean_loss = torch.zeros_like(model.parameters), 0.0
    for inputs, labels in parts:
        share = len(labels) / len(task.query_labels)
        loss = loss_function(model(inputs), labels)
        gradient.add_(model.gradient(loss), alpha=share)
        mean_loss += share * loss.item()
    return gradient, mean_loss


def fomaml_gradients(
    model: StackedModel,
    start: Tensor,
    tasks: Sequence[MetaTask],
    training: LocalTraining,
    loss_function: Loss = F.cross_entropy,
) -> tuple[Tensor, list[float]]:
    """`fomaml_gradient` of every task from `start`, together: (tasks, num_parameters), and the losses."""
    train_together(model, start, [task.support for task in tasks], training, loss_function)
    parts = []
    for inputs, labels, weights, sizes, seeds in _queries(model, tasks):
        for client, seed in enumerate(seeds):
            model.seed_dropout(client, seed)
        parts.append(_flat(*model.differentiate(inputs, labels, weights, sizes, loss_function)))
    return _sum(parts)


def maml_gradients(
    model: StackedModel,
    start: Tensor,
    tasks: Sequence[MetaTask],
    training: LocalTraining,
    loss_function: Loss = F.cross_entropy,
) -> tuple[Tensor, list[float]]:
    """MAML's gradient of every task at `start`: (tasks, num_parameters), and the losses on the query parts.

    training: its optimizer must be plain SGD, the only one that is differentiated through.
    """
    by_size = sorted(range(len(tasks)), key=lambda task: -len(tasks[task].support.labels))
    places = sorted(range(len(tasks)), key=by_size.__getitem__)
    parts = []
    for inputs, labels, weights, sizes, seeds in _queries(model, [tasks[task] for task in by_size]):
        differentiated = differentiate_through(
            model,
            start,
            [tasks[task].support for task in by_size],
            training,
            (inputs, labels, weights),
            sizes,
            seeds,
            loss_function,
        )
        parts.append(_flat(*differentiated))
    gradients, losses = _sum(parts)
    return gradients[places], [losses[place] for place in places]


def _queries(
    model: StackedModel, tasks: Sequence[MetaTask]
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[int], list[int]]]:
    """The tasks' query parts as `StackedModel.differentiate` takes them, up to QUERY_BATCH_SIZE rows of each at a time.

    With each goes a seed of every client's dropout masks. The losses and gradients of all of them add up to the mean's.
    """
    sizes = [len(task.query_labels) for task in tasks]
    counts = torch.tensor(sizes, device=model.device)
    for start in range(0, max(sizes), QUERY_BATCH_SIZE):
        rows = min(QUERY_BATCH_SIZE, max(sizes) - start)
        # What is behind a part are copies of its first example, of weight 0; of one that has ended, only such.
        positions = torch.arange(start, start + rows)
        places = [positions.where(positions < size, start if start < size else 0) for size in sizes]
        inputs = torch.stack([task.query_inputs[place] for task, place in zip(tasks, places, strict=True)])
        labels = torch.stack([task.query_labels[place] for task, place in zip(tasks, places, strict=True)])
        weights = (positions.to(model.device) < counts[:, None]).to(model.parameters.dtype) / counts[:, None]
        part_sizes = [min(max(1, size - start), rows) for size in sizes]
        seeds = [task.query_seed + start for task in tasks]
        yield inputs.to(model.device), labels.to(model.device), weights, part_sizes, seeds


def _flat(gradients: Gradients, losses: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients as one matrix, (clients, num_parameters)."""
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1), losses


def _sum(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[float]]:
    """The sums of gradients and of losses. A single part is left as it is, to the bit."""
    gradients, losses = parts[0]
    for more_gradients, more_losses in parts[1:]:
        gradients, losses = gradients + more_gradients, losses + more_losses
    return gradients, losses.tolist()
