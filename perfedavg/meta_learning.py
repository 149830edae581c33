"""What a client sends in MAML and FOMAML (Finn et al. 2017, arXiv 1703.03400): the gradient of its loss after adapting.

A client's examples are cut into a support part, on which the model takes K steps of SGD from theta to theta_K, and a
query part, on which the loss L of theta_K is taken. MAML's gradient is dL(theta_K)/dtheta, through the K steps, second
derivatives and all; FOMAML's is dL(theta_K)/dtheta_K. The server's optimizer descends along their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perfedavg.flat_model import FlatModel
from perfedavg.group_training import GroupMember, StackedModel, differentiate_through, train_together, weights_of
from perfedavg.local_training import LocalTraining, Loss, train_locally
from perfedavg.seeding import torch_seeds


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
    loss = loss_function(model(task.query_inputs), task.query_labels)
    return model.gradient(loss), loss.item()


def fomaml_gradients(
    model: StackedModel,
    start: Tensor,
    tasks: Sequence[MetaTask],
    training: LocalTraining,
    loss_function: Loss = F.cross_entropy,
) -> tuple[Tensor, list[float]]:
    """`fomaml_gradient` of every task from `start`, together: (tasks, num_parameters), and the losses."""
    train_together(model, start, [task.support for task in tasks], training, loss_function)
    inputs, labels, weights, sizes = _queries(model, tasks)
    for client, task in enumerate(tasks):
        model.seed_dropout(client, task.query_seed)
    gradients, losses = model.differentiate(inputs, labels, weights, sizes, loss_function)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1), losses.tolist()


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
    inputs, labels, weights, sizes = _queries(model, tasks)
    by_size = sorted(range(len(tasks)), key=lambda task: -len(tasks[task].support.labels))
    places = sorted(range(len(tasks)), key=by_size.__getitem__)
    gradients, losses = differentiate_through(
        model,
        start,
        [tasks[task].support for task in by_size],
        training,
        (inputs[by_size], labels[by_size], weights[by_size]),
        [sizes[task] for task in by_size],
        [tasks[task].query_seed for task in by_size],
        loss_function,
    )
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)[places], losses[places].tolist()


def _queries(model: StackedModel, tasks: Sequence[MetaTask]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The tasks' query parts as one batch a task, as `StackedModel.differentiate` takes them."""
    sizes = [len(task.query_labels) for task in tasks]
    rows = max(sizes)
    # What is behind a part are copies of its first example, of weight 0.
    places = [torch.arange(rows).where(torch.arange(rows) < size, torch.tensor(0)) for size in sizes]
    inputs = torch.stack([task.query_inputs[place] for task, place in zip(tasks, places, strict=True)])
    labels = torch.stack([task.query_labels[place] for task, place in zip(tasks, places, strict=True)])
    counts = torch.tensor(sizes, device=model.device)
    weights = weights_of(counts, rows, model.parameters.dtype)
    return inputs.to(model.device), labels.to(model.device), weights, sizes
