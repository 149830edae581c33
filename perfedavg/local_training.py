"""What one client does: a few epochs of its own optimizer from the global model, and scoring. The hot path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfedavg.config import OptimizerConfig
from perfedavg.flat_model import FlatModel
from perfedavg.optimizers import build_optimizer
from perfedavg.seeding import torch_seeds

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, labels) -> the mean loss over the batch, a scalar."""

SCORING_BATCH_SIZE = 512


@dataclass(frozen=True)
class LocalTraining:
    """What a client is told to do with its training part."""

    optimizer: OptimizerConfig
    num_epochs: int
    batch_size: int


def train_locally(
    model: FlatModel,
    inputs: Tensor,
    labels: Tensor,
    training: LocalTraining,
    seeds: np.random.SeedSequence,
    loss_function: Loss = F.cross_entropy,
) -> float:
    """Train the model in place and return the mean loss over the examples of the last epoch, each before its step.

    inputs: (num_examples, ...), labels: (num_examples,), both on the model's device.
    seeds: the client's identity; the batch order and the dropout masks follow from it alone. The optimizer is built
    here, so none of its state outlives the call.
    """
    order_seed, dropout_seed = torch_seeds(seeds, 2)
    order_generator = torch.Generator().manual_seed(order_seed)
    model.dropout_generator.manual_seed(dropout_seed)
    step = _step_of(model, training.optimizer)
    model.module.train()
    epoch_loss = torch.zeros((), dtype=torch.float64, device=model.device)
    for _ in range(training.num_epochs):
        epoch_loss.zero_()
        for batch in _batches(len(labels), training.batch_size, order_generator):
            batch = batch.to(model.device)
            loss = loss_function(model(inputs[batch]), labels[batch])
            step(loss)
            epoch_loss += loss.detach() * len(batch)
    return epoch_loss.item() / len(labels)


def score(
    model: FlatModel, inputs: Tensor, labels: Tensor, loss_function: Loss = F.cross_entropy
) -> tuple[float, float]:
    """Mean loss over the examples, and accuracy in 0..1. inputs: (num_examples, ...), labels: (num_examples,)."""
    model.module.eval()
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    correct = torch.zeros((), dtype=torch.int64, device=model.device)
    with torch.no_grad():
        for start in range(0, len(labels), SCORING_BATCH_SIZE):
            batch_labels = labels[start : start + SCORING_BATCH_SIZE]
            outputs = model(inputs[start : start + SCORING_BATCH_SIZE])
            loss += loss_function(outputs, batch_labels) * len(batch_labels)
            correct += (outputs.argmax(dim=1) == batch_labels).sum()
    return loss.item() / len(labels), correct.item() / len(labels)


def _step_of(model: FlatModel, config: OptimizerConfig) -> Callable[[Tensor], None]:
    """A function that takes one step of a fresh optimizer, given the loss."""
    if config.name == "sgd" and config.momentum == 0.0:
        return lambda loss: model.descend(loss, config.learning_rate)
    parameters = nn.Parameter(model.parameters)
    optimizer = build_optimizer(config, [parameters])

    def step(loss: Tensor) -> None:
        parameters.grad = model.gradient(loss)
        optimizer.step()
        model.refresh()

    return step


def _batches(num_examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch: every index once, in random order, in batches of which only the last may be smaller."""
    yield from torch.randperm(num_examples, generator=generator).split(batch_size)
