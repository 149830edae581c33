"""The boundary: what a peer sends is checked here before anything uses it.

In two steps. RULES says what each field of each message must be, whoever sends it and whenever; `fields_of` applies it.
`ExpectedTraining` and `ExpectedScoring` then compare an answer with what the server knows of the work by itself. What
passes both is what an honest worker could have sent.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perfedavg.aggregation.base import refusal_of
from perfedavg.aggregation.exact_mean import MAX_CAPACITY, ExactMean
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import ClientReport
from perfedavg.settings import Phase

MAX_TEXT_CHARS = 500
MAX_LINES = 16
"""In what a worker tells of itself."""
MAX_LANES = 8192
"""Clients side by side, and cores, of one worker."""

Rule = Callable[[Any, str], Any]
"""(value, its name) -> the value as it is used from then on. Raises ValueError with the name and the value."""


def clean_text(text: object, max_chars: int = MAX_TEXT_CHARS) -> str:
    """A peer's text, fit for a terminal, a log and a result: one line of at most so many characters, all printable.

    White space becomes single blanks, so that no line can be forged. Whatever else cannot be printed (escape sequences
    of terminals, marks that turn the direction of writing) is shown by its code, such as `\\x1b`.
    """
    content = text if isinstance(text, str) else str(text)
    words = " ".join(content[: 2 * max_chars].split())
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    return shown if len(shown) <= max_chars and len(content) <= 2 * max_chars else f"{shown[: max_chars - 3]}..."


def _rule(expected: str, holds: Callable[[Any], bool]) -> Rule:
    def check(value: Any, name: str) -> Any:
        if not holds(value):
            raise ValueError(f"{name} is {_shown(value)}, not {expected}")
        return value

    return check


def _is_number(value: Any) -> bool:
    """One that a float can hold; true and false are none."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1023)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}, shape {tuple(value.shape)}"
    return clean_text(reprlib.repr(value), 80)


def whole(lowest: int, highest: int) -> Rule:
    return _rule(
        f"a whole number in {lowest}..{highest}", lambda value: type(value) is int and lowest <= value <= highest
    )


def number(lowest: float, highest: float) -> Rule:
    """A finite one."""
    return _rule(f"a number in {lowest:g}..{highest:g}", lambda value: _is_number(value) and lowest <= value <= highest)


def text(max_chars: int) -> Rule:
    """To be compared. One that is to be shown is a `_line`."""
    return _rule(
        f"a text of up to {max_chars} characters", lambda value: isinstance(value, str) and len(value) <= max_chars
    )


def one_of(*known: Any) -> Rule:
    return _rule(f"one of {', '.join(map(str, known))}", lambda value: value in known and type(value) is type(known[0]))


def vector(*dtypes: torch.dtype) -> Rule:
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return _rule(
        f"a vector of {names}", lambda value: isinstance(value, Tensor) and value.dim() == 1 and value.dtype in dtypes
    )


def optional(rule: Rule) -> Rule:
    return lambda value, name: None if value is None else rule(value, name)


def list_of(rule: Rule) -> Rule:
    """With one entry at least."""
    is_list = _rule("a list with an entry", lambda value: isinstance(value, list) and len(value) > 0)
    return lambda value, name: [rule(entry, f"{name}[{place}]") for place, entry in enumerate(is_list(value, name))]


def curve(loss: Rule, accuracy: Rule) -> Rule:
    """Pairs, as `scores.ClientScore.by_epoch` has them, or none."""
    is_curve = _rule(
        "a list of pairs",
        lambda value: isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value),
    )
    return lambda value, name: tuple((loss(pair[0], name), accuracy(pair[1], name)) for pair in is_curve(value, name))


def record(kind: Callable[..., Any], **rules: Rule) -> Rule:
    """An object with exactly these fields, which becomes one of a kind."""
    return lambda value, name: kind(**_checked(value, rules, f"{name}."))


def _line(value: Any, name: str) -> str:
    """A text that is to be shown."""
    return clean_text(_rule("a text", lambda value: isinstance(value, str))(value, name))


def _loss(value: Any, name: str) -> float:
    """Any number: a training that diverges ends with infinity or NaN."""
    return float(_rule("a number", _is_number)(value, name))


def _accuracy(value: Any, name: str) -> float:
    """NaN in a regression."""
    is_accuracy = _rule(
        "an accuracy in 0..1", lambda value: _is_number(value) and (math.isnan(value) or 0 <= value <= 1)
    )
    return float(is_accuracy(value, name))


def _lines(value: Any, name: str) -> list[str]:
    """A few of them, or none."""
    is_list = _rule(
        f"a list of up to {MAX_LINES} texts", lambda value: isinstance(value, list) and len(value) <= MAX_LINES
    )
    return [_line(entry, f"{name}[{place}]") for place, entry in enumerate(is_list(value, name))]


def _named_lines(value: Any, name: str) -> dict[str, str]:
    """A few of them, by names that are to be shown too."""
    is_object = _rule(
        f"an object of up to {MAX_LINES} texts", lambda value: isinstance(value, dict) and len(value) <= MAX_LINES
    )
    return {_line(key, name): _line(entry, name) for key, entry in is_object(value, name).items()}


def _mapping(value: Any, name: str) -> Any:
    """Whose entries are checked where they are read."""
    return _rule("an object", lambda value: isinstance(value, dict))(value, name)


_CLIENT = whole(0, 2**63 - 1)
_COUNT = whole(1, 2**40)
_LANES = whole(1, MAX_LANES)
_PHASE = whole(min(Phase), max(Phase))
_PARAMETERS = vector(torch.float32, torch.float64)
_TICKET = text(64)

_REPORT = record(
    ClientReport,
    client_id=_CLIENT,
    num_examples=_COUNT,
    loss=_loss,
    seconds=number(0, 1e9),
    refused=optional(_line),
)
_SCORE = record(
    ClientScore,
    client_id=_CLIENT,
    num_train_examples=_COUNT,
    num_test_examples=_COUNT,
    initial_loss=_loss,
    initial_accuracy=_accuracy,
    personalized_loss=_loss,
    personalized_accuracy=_accuracy,
    by_epoch=curve(_loss, _accuracy),
)

RULES: dict[str, dict[str, Rule]] = {
    # worker to server
    "Join": {
        "ticket": _TICKET,
        "machine": text(1000),
        "num_cores": _LANES,
        "threads": optional(_LANES),
        "device_kind": one_of("cpu", "cuda"),
        "device_memory_bytes": whole(0, 2**60),
        "kernels": _named_lines,
    },
    "Ready": {"fingerprint": text(10_000), "device": _line, "warnings": _lines},
    "GroupTrained": {"first": _CLIENT},
    "GroupScored": {"scores": list_of(_SCORE)},
    "PartialSum": {
        "weight": whole(0, MAX_CAPACITY),
        "capacity": whole(1, MAX_CAPACITY),
        "reports": list_of(_REPORT),
        "total": vector(torch.int64),
    },
    "Failed": {"reason": _line, "client_id": optional(_CLIENT)},
    # server to worker
    "Configure": {"ticket": _TICKET, "experiment": _mapping, "num_slots": _LANES},
    "StartTraining": {
        "phase": _PHASE,
        "round_number": whole(1, 2**40),
        "capacity": whole(1, MAX_CAPACITY),
        "parameters": _PARAMETERS,
    },
    "StartScoring": {
        "phase": _PHASE,
        "round_number": whole(0, 2**40),
        "num_curve_epochs": whole(0, 2**40),
        "parameters": _PARAMETERS,
    },
    "AssignGroups": {"groups": list_of(list_of(_CLIENT))},
    "RequestPartialSum": {},
    "Finish": {},
}
"""By the message's kind, what each of its fields must be."""


def fields_of(kind: str, values: object) -> dict[str, Any]:
    """The fields of a message, each as its rule asks. Raises ValueError where they are not."""
    return _checked(values, RULES[kind], "")


@dataclass(frozen=True)
class ExpectedTraining:
    """What the server knows of a round's training by itself.

    capacity: see `tasks.CohortTask`.  weight_of: a client's weight, by its number of examples.
    num_train_examples: of a client, by its id.
    """

    weight_of: Callable[[int], int]
    capacity: int
    num_parameters: int
    num_train_examples: Callable[[int], int]

    def check(self, part: ExactMean, reports: Sequence[ClientReport]) -> None:
        """Raises ValueError where no clients' training can have given this part of the round's sum."""
        if part.capacity != self.capacity or len(part.total) != self.num_parameters:
            raise ValueError(
                f"its sum has capacity {part.capacity} and {len(part.total)} parameters, the round {self.capacity} "
                f"and {self.num_parameters}"
            )
        for report in reports:
            _check_examples(report.client_id, report.num_examples, self.num_train_examples)
            if report.refused is not None and not report.refused.startswith(refusal_of(report.client_id)):
                raise ValueError(f"client {report.client_id} was refused for no reason of this protocol")
        accepted = [report.num_examples for report in reports if report.refused is None]
        weight = sum(map(self.weight_of, accepted))
        if part.weight != weight:
            raise ValueError(f"its sum has weight {part.weight}, its clients {weight}")
        lowest, highest = (int(entry) for entry in part.total.aminmax())
        if max(-lowest, highest) > part.largest_total:
            raise ValueError(f"an entry of its sum is beyond what weight {weight} allows")


@dataclass(frozen=True)
class ExpectedScoring:
    """What the server knows of a scoring by itself.

    num_curve_epochs: see `tasks.ScoringTask`.  is_regression: whether there are no accuracies.
    """

    num_curve_epochs: int
    is_regression: bool
    num_train_examples: Callable[[int], int]

    def check(self, scores: Sequence[ClientScore]) -> None:
        """Raises ValueError where no client can have scored so."""
        num_measured = self.num_curve_epochs + 1 if self.num_curve_epochs else 0
        for score in scores:
            _check_examples(score.client_id, score.num_train_examples, self.num_train_examples)
            if len(score.by_epoch) != num_measured:
                raise ValueError(
                    f"client {score.client_id} was scored after {len(score.by_epoch)} numbers of epochs, not "
                    f"{num_measured}"
                )
            accuracies = (
                score.initial_accuracy,
                score.personalized_accuracy,
                *(accuracy for _, accuracy in score.by_epoch),
            )
            if any(math.isnan(accuracy) != self.is_regression for accuracy in accuracies):
                raise ValueError(f"client {score.client_id} has {'an' if self.is_regression else 'no'} accuracy")


def check_start(phase: int, parameters: Tensor, phases: Collection[int], num_parameters: int) -> None:
    """Worker: raises ValueError where the server begins what is not of the experiment that it sent."""
    if phase not in phases or len(parameters) != num_parameters:
        raise ValueError(
            f"the server begins phase {phase} with {len(parameters)} parameters; its experiment has the phases "
            f"{', '.join(map(str, map(int, phases)))} and {num_parameters} parameters"
        )


def _check_examples(client_id: int, num_examples: int, num_train_examples: Callable[[int], int]) -> None:
    known = num_train_examples(client_id)
    if num_examples != known:
        raise ValueError(f"client {client_id} was reported with {num_examples} training examples; it has {known}")


def _checked(values: object, rules: Mapping[str, Rule], prefix: str) -> dict[str, Any]:
    if not isinstance(values, dict) or set(values) != set(rules):
        raise ValueError(f"{prefix or 'it '}has other fields than {', '.join(rules) or 'none'}")
    return {name: rule(values[name], f"{prefix}{name}") for name, rule in rules.items()}
