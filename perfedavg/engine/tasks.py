"""What the experiment asks an executor for, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from perfedavg.aggregation.exact_mean import ExactMean
from perfedavg.contracts import RoundStates
from perfedavg.engine.client_states import StatesInMemory
from perfedavg.settings import Phase


@dataclass(frozen=True)
class CohortTask:
    """A round's training, or a part of it.

    round_number: counted from 1.
    client_ids: who trains.
    capacity: weight of the *whole* cohort, which fixes the grid of the exact mean, also for a part of it.
    states: what the clients kept from earlier rounds, and where what they keep from this one goes.
    """

    phase: Phase
    round_number: int
    client_ids: tuple[int, ...]
    capacity: int
    states: RoundStates = field(default_factory=StatesInMemory)


@dataclass(frozen=True)
class ScoringTask:
    """Clients to score, starting from the global model as it is after a round of a phase.

    num_curve_epochs: also score after each of the first N epochs of adapting, and before them; 0 turns it off.
    states: what the clients kept from the rounds in which they trained.
    """

    phase: Phase
    round_number: int
    client_ids: tuple[int, ...]
    num_curve_epochs: int = 0
    states: RoundStates = field(default_factory=StatesInMemory)


@dataclass(frozen=True)
class ClientReport:
    """Outcome of one client's training.

    num_examples: size of its training part.
    loss: for methods that send how far a client got, the mean over the examples of its last local epoch, each before
        its step; for those that send gradients, the mean over its query part.
    seconds: time in which it kept a training slot busy.
    refused: why its update is not in the sum, or None where it is.
    """

    client_id: int
    num_examples: int
    loss: float
    seconds: float
    refused: str | None = None


@dataclass
class CohortUpdate:
    """The sum of the updates of some clients, and their reports, in any order.

    slot_seconds: wall time, summed over the training slots that could have worked on the cohort.
    keeping: clients for which a new state was put: those that keep anything and whose update was not refused.
    lost_workers: why each worker that was lost in the round is gone, by its rank.
    """

    sum: ExactMean
    reports: list[ClientReport]
    slot_seconds: float = 0.0
    keeping: set[int] = field(default_factory=set)
    lost_workers: dict[int, str] = field(default_factory=dict)

    @property
    def idle_share(self) -> float:
        """Share of the slots' time in which they had no client, 0 .. 1."""
        busy_seconds = math.fsum(report.seconds for report in self.reports)
        return max(0.0, 1.0 - busy_seconds / self.slot_seconds)


def cut_into_groups(
    client_ids: Sequence[int], num_examples: Callable[[int], int], group_size: int
) -> list[tuple[int, ...]]:
    """The clients that are trained or scored at once, the largest first: the units in which work is handed out.

    They follow from the clients alone, not from who works on them, because the rounding of what is computed together
    depends on what it is computed with.
    """
    ordered = sorted(client_ids, key=lambda client_id: (-num_examples(client_id), client_id))
    return [tuple(ordered[first : first + group_size]) for first in range(0, len(ordered), group_size)]
