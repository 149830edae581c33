"""What a method chooses to aggregate with. The default is the exact mean of all updates that can be added."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from perfedavg.aggregation.exact_mean import MAX_ENTRY, ExactMean


class RefusedUpdateError(ValueError):
    """A client's update cannot be added: it has a wrong shape, or an entry that is not finite or too large."""


class Aggregation:
    """How the updates of a round become one step of the global model.

    What is added must not depend on its order, nor on who adds it; so `before_add` must follow from the update alone,
    and `after_mean` from the mean and its seeds.
    """

    def begin(self, num_parameters: int, capacity: int, device: torch.device | str = "cpu") -> ExactMean:
        """An empty sum, to which the updates of some of a round's clients are added. capacity: see `ExactMean`."""
        return ExactMean.zeros(num_parameters, capacity, device)

    def before_add(self, update: Tensor, num_parameters: int, client_id: int) -> Tensor:
        """What is added of a client's update. Raises RefusedUpdateError where nothing is.

        Here, the update itself, where the exact mean can take it.
        """
        if update.shape != (num_parameters,):
            raise RefusedUpdateError(
                f"{refusal_of(client_id)}it has shape {tuple(update.shape)}, the model {(num_parameters,)}"
            )
        largest = update.abs().max().item()
        if not largest <= MAX_ENTRY:  # also true of NaN
            raise RefusedUpdateError(
                f"{refusal_of(client_id)}its largest entry is {largest:g} (the limit is {MAX_ENTRY:g}): "
                "training diverged; lower the client's learning rate"
            )
        return update

    def after_mean(self, mean: Tensor, num_updates: int, seeds: np.random.SeedSequence) -> Tensor:
        """What the server steps along. num_updates: that are in the mean.  seeds: of the round. Here, the mean."""
        return mean


def check_buffers(changes: Tensor, client_id: int) -> None:
    """Raises RefusedUpdateError where the change of a model's buffers, (num_buffer_entries,), cannot be added.

    Running statistics are as large as what flows through the model, and their squares, whatever the learning rate.
    """
    largest = changes.abs().max().item()
    if math.isfinite(largest) and largest > MAX_ENTRY:
        raise RefusedUpdateError(
            f"{refusal_of(client_id)}a buffer of its model, such as a running statistic, moved by {largest:g} (the "
            f"limit is {MAX_ENTRY:g}): scale the inputs, or use GroupNorm in place of BatchNorm"
        )


def refusal_of(client_id: int) -> str:
    """How every reason begins for which a client's update is not added."""
    return f"client {client_id}: its update is refused, because "
