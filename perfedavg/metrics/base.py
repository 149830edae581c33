"""What a metric is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsFloat

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A figure of a model's outputs on the whole test part of a client.

    value_of: is given the outputs, (num_examples, ...) of the model's own type, and the labels, (num_examples,) int64
        classes, (num_examples, places) int64 classes of an example's places, or (num_examples, ...) targets of a
        regression, both on the CPU; at least one example. Returns a number; NaN where the metric has no meaning, which
        makes the mean over clients none.
    higher_is_better: decides which clients count as those that fare worst.
    """

    value_of: Callable[[Tensor, Tensor], SupportsFloat]
    higher_is_better: bool = True
