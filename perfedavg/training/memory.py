"""How much memory a client of a group takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perfedavg.training.client_models import Batch
from perfedavg.training.local_training import LocalTraining, Loss
from perfedavg.training.optimizers import Optimizer
from perfedavg.training.stacked_model import StackedModel


def group_memory_bytes(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    training: LocalTraining,
    loss_function: Loss = F.cross_entropy,
) -> int:
    """A generous estimate of what one client adds to the memory of a group that is trained.

    It is the sum of every tensor that a step writes, as if none were freed before its end (counted on torch's meta
    device, which has sizes but no memory), the batch, what the client sends, its examples twice, and their order.
    inputs, labels: the training part of the largest client. Leave a margin for what kernels and the allocator need, and
    for scoring. Raises ValueError where the model cannot be stacked.
    """
    stacked = StackedModel(model, 1, "meta", loss_function=loss_function)
    size = min(len(labels), training.batch_size)
    batch_inputs, batch_labels = (
        torch.empty((1, size, *part.shape[1:]), dtype=part.dtype, device="meta") for part in (inputs, labels)
    )
    counts = torch.empty(1, dtype=torch.int64, device="meta")
    with _Written() as written:
        optimizer = Optimizer(training.optimizer, stacked.parameters)
        stacked.take_step(Batch(batch_inputs, batch_labels, [size], counts, [size]), optimizer)
    order_bytes = 2 * 8 * size * (1 + training.count_steps(len(labels)))
    examples_bytes = 2 * (inputs.nbytes + labels.nbytes) + batch_inputs.nbytes + batch_labels.nbytes
    return int(written.num_bytes + stacked.parameters.nbytes + examples_bytes + order_bytes)


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
