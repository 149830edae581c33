"""How long a worker may take, learned from what was finished before. Knows nothing of networks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LEAST_SECONDS = 600.0
"""No worker is given up sooner. Far above the hiccups of a machine: swapping, other people's jobs, a disk far away."""
PATIENCE = 10.0
"""Times the slowest that was seen of the same kind of work."""


@dataclass
class Pace:
    """How slowly one kind of work was done at worst: a phase's training, scoring, sending a sum.

    Clients differ in size by orders of magnitude, so what a larger one may take follows from its examples too.

    seconds_per_example: of each worker, by its number: a mean in which the last piece counts half, the one before it a
        quarter, and so on.
    """

    slowest_seconds: float | None = None
    slowest_seconds_per_example: float = 0.0
    seconds_per_example: dict[int, float] = field(default_factory=dict)

    def learn(self, seconds: float, num_examples: int = 1) -> None:
        """A piece of the work was finished, so many seconds after it was handed out."""
        self.slowest_seconds = max(self.slowest_seconds or 0.0, seconds)
        self.slowest_seconds_per_example = max(self.slowest_seconds_per_example, seconds / num_examples)

    def learn_of(self, worker: int, seconds: float, num_examples: int) -> None:
        """A worker was at a piece of the work for so many seconds."""
        latest = seconds / num_examples
        self.seconds_per_example[worker] = (self.seconds_per_example.get(worker, latest) + latest) / 2

    def limit_seconds(self, num_examples: int = 1) -> float:
        """After which nothing is to be expected any more. Infinite where nothing was finished yet."""
        if self.slowest_seconds is None:
            return math.inf
        slowest = max(self.slowest_seconds, self.slowest_seconds_per_example * num_examples)
        return max(LEAST_SECONDS, PATIENCE * slowest)
