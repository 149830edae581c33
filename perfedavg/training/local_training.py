"""What clients are told to do on their training parts, and which examples so enter which step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perfedavg.contracts import FederatedDataset
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, labels) -> the mean loss over the batch, a scalar."""


@dataclass(frozen=True)
class LocalTraining:
    """What a client is told to do with its training part.

    num_steps: steps to take, 0 or more, whatever the number of examples; in place of epochs.
    """

    optimizer: OptimizerConfig
    num_epochs: int
    batch_size: int
    num_steps: int | None = None

    def count_steps(self, num_examples: int) -> int:
        """The steps of a client with so many examples."""
        if self.num_steps is not None:
            return self.num_steps
        return self.num_epochs * -(-num_examples // self.batch_size)


def local_training_of(config: ExperimentConfig, phase: Phase) -> LocalTraining:
    """What the training clients of a phase are told to do."""
    settings = config.phases[phase]
    return LocalTraining(
        settings.client_optimizer, settings.num_local_epochs, config.batch_size, settings.num_local_steps
    )


def loss_of(dataset: FederatedDataset) -> Loss:
    """The loss that a data set brings as `loss_function`; otherwise cross entropy."""
    loss_function: Loss = getattr(dataset, "loss_function", F.cross_entropy)
    return loss_function


@dataclass(frozen=True)
class Steps:
    """Which examples enter which local step of clients that stand in order of their number of steps, the most first.

    Iterating gives, for each step, of the clients that still train, which are the first ones: the places of their
    examples, (clients, rows), the sizes of their batches as a tensor, and the same as a list.

    examples: (num_steps, clients, rows) places in the examples of all, one client's behind another's. Behind a batch
        stands its first example again, and for a client that has ended its own first one.
    counts: (num_steps, clients) sizes of the batches; 0 for a client that has ended.
    is_last_epoch: (num_steps, clients).
    first_of_last_epochs: the first step that is in some client's last epoch.
    sizes: by step, the counts that are above 0.
    num_batches: batches of an epoch, by client.
    """

    examples: Tensor
    counts: Tensor
    is_last_epoch: Tensor
    first_of_last_epochs: int
    sizes: list[list[int]]
    num_batches: list[int]

    @classmethod
    def draw(
        cls,
        num_examples: Sequence[int],
        order_seeds: Sequence[int],
        training: LocalTraining,
        device: torch.device | str = "cpu",
    ) -> Steps:
        """Every epoch takes each example once, in an order drawn from the client's seed.

        Only the last batch of an epoch may be smaller. Raises ValueError where the largest client is not the first.
        """
        if list(num_examples) != sorted(num_examples, reverse=True):
            raise ValueError("clients must be given with the largest first")
        batch_size = min(training.batch_size, num_examples[0])
        num_steps, num_clients = training.count_steps(num_examples[0]), len(num_examples)
        examples = torch.zeros(num_steps, num_clients, batch_size, dtype=torch.int64)
        counts = torch.zeros(num_steps, num_clients, dtype=torch.int64)
        is_last_epoch = torch.zeros(num_steps, num_clients, dtype=torch.bool)
        first_of_last_epochs, num_batches, offset = num_steps, [], 0
        for client, (own_examples, order_seed) in enumerate(zip(num_examples, order_seeds, strict=True)):
            own_steps = training.count_steps(own_examples)
            generator = torch.Generator().manual_seed(order_seed)
            examples[:own_steps, client] = offset + _padded_batches(own_examples, batch_size, own_steps, generator)
            examples[own_steps:, client] = offset
            offset += own_examples
            epoch_counts = [min(batch_size, own_examples - done) for done in range(0, own_examples, batch_size)]
            num_batches.append(len(epoch_counts))
            num_epochs = -(-own_steps // len(epoch_counts))
            counts[:own_steps, client] = torch.tensor(epoch_counts * num_epochs)[:own_steps]
            last_epoch = max(0, num_epochs - 1) * len(epoch_counts)
            is_last_epoch[last_epoch:own_steps, client] = True
            first_of_last_epochs = min(first_of_last_epochs, last_epoch)
        sizes = [[count for count in step if count > 0] for step in counts.tolist()]
        examples, counts, is_last_epoch = (part.to(device) for part in (examples, counts, is_last_epoch))
        return cls(examples, counts, is_last_epoch, first_of_last_epochs, sizes, num_batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        for examples, counts, sizes in zip(self.examples.unbind(), self.counts.unbind(), self.sizes, strict=True):
            if examples.shape != (len(sizes), max(sizes)):  # otherwise there is nothing to cut, which takes time too
                examples, counts = examples[: len(sizes), : max(sizes)], counts[: len(sizes)]
            yield examples, counts, sizes

    @property
    def num_last_examples(self) -> Tensor:
        """Examples in each client's last epoch, (clients,)."""
        return (self.counts * self.is_last_epoch).sum(0)

    def epochs_ended(self, step: int) -> dict[int, int]:
        """By client, the numbers of the epochs (from 1) of which a step (from 0) is the last; whole ones only."""
        return {
            client: (step + 1) // self.num_batches[client]
            for client in range(len(self.sizes[step]))
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
