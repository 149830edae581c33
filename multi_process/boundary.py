"""The boundary: what a peer sends is checked here before anything uses it.

In two steps. The types of a message's fields, with the rules of this module, say what each field must be, whoever sends
it and whenever; `plain_values.from_plain` applies them. `ExpectedTraining` and `ExpectedScoring` then compare an answer
with what the server knows of the work by itself. What passes both is what an honest worker could have sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from perfedavg.aggregation.base import refusal_of
from perfedavg.aggregation.exact_mean import ExactMean
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import ClientReport
from perfedavg.methods.base import Method
from perfedavg.settings import Phase

MAX_TEXT_CHARS = 500
MAX_LINES = 16
"""In what a worker tells of itself."""
MAX_SLOTS = 8192
"""Clients side by side, and cores, of one worker."""
MAX_EXAMPLES = 2**40
MAX_SECONDS = 1e9

Rule = Callable[[Any, str], Any]
"""(value of the right type, its name) -> the value to use. Raises ValueError with the name and the value."""


def clean_text(text: object, max_chars: int = MAX_TEXT_CHARS) -> str:
    """A peer's text, fit for a terminal, a log and a result: one line of at most so many characters, all printable.

    White space becomes single blanks, so that no line can be forged. Whatever else cannot be printed (escape sequences
    of terminals, marks that turn the direction of writing) is shown by its code, such as `\\x1b`.
    """
    content = text if isinstance(text, str) else str(text)
    words = " ".join(content[: 2 * max_chars].split())
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    return shown if len(shown) <= max_chars and len(content) <= 2 * max_chars else f"{shown[: max_chars - 3]}..."


def _rule(holds: Callable[[Any], bool], expected: str, show: Callable[[Any], object] = str) -> Rule:
    def check(value: Any, name: str) -> Any:
        if not holds(value):
            raise ValueError(f"{name} is {clean_text(show(value), 80)}, must be {expected}")
        return value

    return check


def between(lowest: float, highest: float) -> Rule:
    return _rule(lambda value: lowest <= value <= highest, f"in {lowest}..{highest}")


def one_of(*known: str) -> Rule:
    return _rule(lambda value: value in known, f"one of {', '.join(known)}")


def length(least: int, most: int = 2**40) -> Rule:
    """Bounds, inclusive, of the entries of a collection or the characters of a text."""
    return _rule(
        lambda value: least <= len(value) <= most, f"in {least}..{most}", lambda value: f"of length {len(value)}"
    )


def vector(*dtypes: torch.dtype) -> Rule:
    return _rule(
        lambda value: value.dim() == 1 and value.dtype in dtypes,
        f"a vector of {' or '.join(map(str, dtypes))}",
        lambda value: f"a tensor of {value.dtype}, shape {tuple(value.shape)}",
    )


def _clean_entries(value: dict[str, str], name: str) -> dict[str, str]:
    return {clean_text(key): clean_text(entry) for key, entry in value.items()}


ClientId = Annotated[int, between(0, 2**63 - 1)]
Group = Annotated[list[ClientId], length(1)]
"""Clients that are trained or scored at once; known by the first of them."""
NumSlots = Annotated[int, between(1, MAX_SLOTS)]
PhaseNumber = Annotated[int, between(min(Phase), max(Phase))]
Count = Annotated[int, between(0, MAX_EXAMPLES)]
Parameters = Annotated[Tensor, vector(torch.float32, torch.float64)]
Ticket = Annotated[str, length(0, 64)]
Line = Annotated[str, lambda value, name: clean_text(value)]
"""A text that is to be shown."""
Lines = Annotated[list[Line], length(0, MAX_LINES)]
NamedLines = Annotated[dict[str, str], length(0, MAX_LINES), _clean_entries]


@dataclass(frozen=True)
class ExpectedTraining:
    """What the server knows of a round's training by itself.

    capacity: see `tasks.CohortTask`.
    num_train_examples: of a client, by its id.
    """

    method: Method
    capacity: int
    num_parameters: int
    num_train_examples: Callable[[int], int]

    def check(self, part: ExactMean, reports: Sequence[ClientReport], keeping: Collection[int]) -> None:
        """Raises ValueError where no clients' training can have given this part of the round's sum.

        keeping: the clients that were said to keep something.
        """
        if part.capacity != self.capacity or len(part.total) != self.num_parameters:
            raise ValueError(
                f"its sum has capacity {part.capacity} and {len(part.total)} parameters, the round {self.capacity} "
                f"and {self.num_parameters}"
            )
        for report in reports:
            _check_examples(report.client_id, report.num_examples, self.num_train_examples)
            between(0, MAX_SECONDS)(report.seconds, "seconds")
            if report.refused is not None and not _is_refusal(report.refused, report.client_id):
                raise ValueError(f"client {report.client_id} was refused for no reason of this protocol")
        accepted = [report for report in reports if report.refused is None]
        if not set(keeping) <= {report.client_id for report in accepted}:
            raise ValueError(f"clients {sorted(keeping)} have no reason to keep anything")
        weight = sum(self.method.weight(report.num_examples) for report in accepted)
        if part.weight != weight:
            raise ValueError(f"its sum has weight {part.weight}, its clients {weight}")
        lowest, highest = (int(entry) for entry in part.total.aminmax())
        if max(-lowest, highest) > part.largest_total:
            raise ValueError(f"an entry of its sum is beyond what weight {weight} allows")


@dataclass(frozen=True)
class ExpectedScoring:
    """What the server knows of a scoring by itself.

    metrics: what clients are scored by.
    num_curve_epochs: see `tasks.ScoringTask`.
    is_regression: whether there are no accuracies.
    """

    metrics: Sequence[str]
    num_curve_epochs: int
    is_regression: bool
    num_train_examples: Callable[[int], int]

    def check(self, scores: Sequence[ClientScore]) -> None:
        """Raises ValueError where no client can have scored so. Other values than accuracies may be infinite or NaN:
        training may diverge.
        """
        num_measured = self.num_curve_epochs + 1 if self.num_curve_epochs else 0
        for score in scores:
            _check_examples(score.client_id, score.num_train_examples, self.num_train_examples)
            between(1, MAX_EXAMPLES)(score.num_test_examples, "num_test_examples")
            if len(score.by_epoch) != num_measured:
                raise ValueError(
                    f"client {score.client_id} was scored after {len(score.by_epoch)} numbers of epochs, not "
                    f"{num_measured}"
                )
            for values in (score.initial, score.personalized, *score.by_epoch):
                if list(values) != list(self.metrics):
                    raise ValueError(
                        f"client {score.client_id} was scored by {clean_text(', '.join(values), 80)}, not by "
                        f"{', '.join(self.metrics)}"
                    )
                accuracy = values["accuracy"]
                if not (math.isnan(accuracy) if self.is_regression else 0 <= accuracy <= 1):
                    raise ValueError(f"client {score.client_id} has an accuracy of {accuracy}")


def check_start(phase: int, parameters: Tensor, phases: Collection[int], num_parameters: int) -> None:
    """Worker: raises ValueError where the server begins what is not of the experiment that it sent."""
    if phase not in phases or len(parameters) != num_parameters:
        raise ValueError(
            f"the server begins phase {phase} with {len(parameters)} parameters; its experiment has the phases "
            f"{', '.join(map(str, map(int, phases)))} and {num_parameters} parameters"
        )


def _is_refusal(reason: str, client_id: int) -> bool:
    return reason.startswith(refusal_of(client_id)) and reason == clean_text(reason)


def _check_examples(client_id: int, num_examples: int, num_train_examples: Callable[[int], int]) -> None:
    known = num_train_examples(client_id)
    if num_examples != known:
        raise ValueError(f"client {client_id} was reported with {num_examples} training examples; it has {known}")
