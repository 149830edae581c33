"""A mean that does not depend on the order of its parts.

Floating-point addition is not associative, so the sum of the clients' updates would depend on which process added
which of them first. Here each weighted vector is rounded once to a fixed-point grid of 64-bit integers; integer
addition is associative and commutative, hence `a.merge(b) == b.merge(a)` bit for bit, however the cohort was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ENTRY_BITS = 10
MAX_ENTRY = float(2**MAX_ENTRY_BITS)
"""Largest absolute entry of a vector that can be added. A trained update is orders of magnitude below it."""

MAX_CAPACITY = 2**28
"""Largest weight of a cohort; beyond it, products would round."""

PIECE = 2**17
"""Entries that a CPU adds at once."""


@dataclass
class ExactMean:
    """The weighted mean of vectors over clients, as a running sum of weight * vector.

    total: (num_parameters,) int64, the sum in units of 2 ** -fraction_bits.
    weight: sum of the weights added so far.
    capacity: most weight to be added by all processes together. It fixes the grid, on which then nothing can overflow.
    """

    total: Tensor
    weight: int
    capacity: int

    @classmethod
    def zeros(cls, num_parameters: int, capacity: int, device: torch.device | str = "cpu") -> ExactMean:
        """An empty sum. Raises ValueError where capacity is outside 1 .. MAX_CAPACITY."""
        if not 1 <= capacity <= MAX_CAPACITY:
            raise ValueError(f"a round's total weight of {capacity} is outside 1 .. 2^28; draw fewer clients a round")
        return cls(torch.zeros(num_parameters, dtype=torch.int64, device=device), 0, capacity)

    @property
    def fraction_bits(self) -> int:
        """Bits behind the binary point: as many as keep capacity * MAX_ENTRY within 62 bits."""
        return 62 - MAX_ENTRY_BITS - self.capacity.bit_length()

    @property
    def largest_total(self) -> int:
        """Absolute value that no entry of the total can exceed, given the weight that was added."""
        return self.weight << (MAX_ENTRY_BITS + self.fraction_bits)

    def add(self, vector: Tensor, weight: int) -> None:
        """Add weight * vector, in place.

        vector: (num_parameters,), floating point, no entry beyond MAX_ENTRY.  weight: 1 or more.
        Leaves the sum as it was and raises ValueError where the capacity would be exceeded.
        """
        if weight < 1 or self.weight + weight > self.capacity:
            raise ValueError(f"a weight of {weight} on top of {self.weight} exceeds {self.capacity}")
        # A float32 mantissa has 24 bits and the weight at most 28, so the float64 product is exact before rounding.
        # Piece by piece, what is in between stays in a CPU's cache: a third of the time for a vector of 13 MB.
        scale = weight * 2.0**self.fraction_bits
        size = PIECE if vector.device.type == "cpu" else max(1, len(vector))
        for part, total in zip(vector.split(size), self.total.split(size), strict=True):
            total += part.to(torch.float64).mul_(scale).round_().to(torch.int64)
        self.weight += weight

    def merge(self, other: ExactMean) -> None:
        """Add another part of the cohort's sum, in place. Raises ValueError where the two do not belong together."""
        if other.capacity != self.capacity or other.total.shape != self.total.shape:
            raise ValueError(
                f"sums of capacity {self.capacity} and {other.capacity}, sizes {self.total.numel()} and "
                f"{other.total.numel()}, do not belong to the same round"
            )
        if self.weight + other.weight > self.capacity:
            raise ValueError(f"merged weight {self.weight + other.weight} exceeds {self.capacity}")
        self.total += other.total.to(self.total.device)
        self.weight += other.weight

    def finish(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weighted mean, (num_parameters,). Raises ValueError where nothing was added."""
        if self.weight == 0:
            raise ValueError("the mean of no updates is undefined")
        return self.total.to(torch.float64).mul_(2.0**-self.fraction_bits).div_(self.weight).to(dtype)
