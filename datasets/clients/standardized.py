"""Numbers brought to mean 0 and deviation 1, by what the training clients' training parts hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from datasets.clients.views import View
from perfedavg.contracts import ClientData, FederatedDataset

MOST_SAMPLED = 1000
"""Training clients that mean and deviation are taken from; where there are more, as many at even distances."""


class StandardizedView(View):
    """A data set of which each feature, and each target, has the training clients' mean taken off and is divided by
    their deviation. What is the same for all becomes 0.

    Unseen clients and test parts are brought to the same scale and have no part in it.
    """

    def __init__(self, dataset: FederatedDataset) -> None:
        super().__init__(dataset)
        self.train_client_ids, self.unseen_client_ids = dataset.train_client_ids, dataset.unseen_client_ids
        ids = self.train_client_ids
        step = -(-len(ids) // MOST_SAMPLED)
        parts = [dataset.client_data(client_id) for client_id in ids[::step]]
        self._inputs = _Scale.of([part.train_inputs for part in parts])
        has_targets = parts[0].train_labels.is_floating_point()
        self._labels = _Scale.of([part.train_labels for part in parts]) if has_targets else None

    @property
    def note(self) -> str:
        """What has to be said with every result."""
        inner: str = getattr(self._dataset, "note", "")
        own = "labels are standardized: a loss of 1 is that of always answering their mean"
        return inner if self._labels is None else "; ".join([own, *([inner] if inner else [])])

    def client_data(self, client_id: int) -> ClientData:
        data = self._dataset.client_data(client_id)
        inputs, labels = self._inputs, self._labels or (lambda values: values)
        return ClientData(
            inputs(data.train_inputs), labels(data.train_labels), inputs(data.test_inputs), labels(data.test_labels)
        )


def _sum_of(parts: Sequence[Tensor], value_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Over all examples, in 64 bits."""
    return torch.stack([value_of(part.to(torch.float64)).sum(dim=0) for part in parts]).sum(dim=0)


class _Scale:
    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        self._mean, self._deviation = mean, deviation

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> _Scale:
        """Part by part, so that no more of them is there in 64 bits at a time."""
        num_examples = sum(map(len, parts))
        mean = _sum_of(parts, lambda part: part) / num_examples
        deviation = (_sum_of(parts, lambda part: (part - mean).square()) / num_examples).sqrt()
        return cls(mean, torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    def __call__(self, values: Tensor) -> Tensor:
        return ((values.to(torch.float64) - self._mean) / self._deviation).to(torch.float32)
