"""A setting is one dataclass field with default, help and bounds, of which its flag, check and documentation are made.

    @dataclass(frozen=True)
    class FedProx(Method):
        mu: float = setting(0.01, "weight of the proximal term", at_least=0)

Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 2**31 - 1
"""Upper bound of whole numbers without one of their own: torch takes no larger batch, and no run has more rounds."""
_KEY = "setting"


@dataclass(frozen=True)
class Setting:
    """What a field says about its setting.

    help: what it does, with its unit.
    flag: the name of its flag, without dashes; None for the field's own name.
    at_least, at_most: inclusive bounds. A whole number has both; MOST is the upper one unless another is given.
    above, below: exclusive bounds.
    choices: the values that it can have.
    metavar: what stands for the value in --help.
    parse: text to value, raises ValueError; None for what the field's type says.
    """

    help: str
    flag: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Sequence[str] | None = None
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to be read behind the flag and the value; None where nothing is."""
        if self.choices is not None:
            return None if value in self.choices else f"is unknown; use one of {', '.join(self.choices)}"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or self._is_allowed(value):
            return None
        return f"must be {self.allowed(type(value))}"

    def _is_allowed(self, value: float) -> bool:
        highest = self._highest(type(value))
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (highest is None or value <= highest)
        )

    def _highest(self, kind: type) -> float | None:
        return MOST if kind is int and self.at_most is None and self.below is None else self.at_most

    def allowed(self, kind: type) -> str:
        """The values that a number can have, in words."""
        highest = self._highest(kind)
        if kind is int:
            return f"a whole number from {self.at_least} to {highest}"
        limits = [f"{self.at_least:g} or more"] if self.at_least is not None else []
        limits += [f"above {self.above:g}"] if self.above is not None else []
        limits += [f"below {self.below:g}"] if self.below is not None else []
        limits += [f"at most {highest:g}"] if highest is not None else []
        return f"a number {' and '.join(limits)}".rstrip()


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field that is a setting; default: `dataclasses.MISSING` for none, else see `Setting`."""
    described = Setting(help, flag, at_least, at_most, above, below, choices, metavar, parse)
    return dataclasses.field(default=default, metadata={_KEY: described})


def check(settings: Any, flag_of: Callable[[str], str] = str) -> None:
    """Raise ValueError, naming the flag, its value and what is allowed, where a field of a dataclass is out of bounds.

    flag_of: gives the name of the flag, without dashes, for the name that a field gives to it; adds a prefix, say.
    A field that is None is left open, and within bounds.
    """
    for field in dataclasses.fields(settings):
        described = field.metadata.get(_KEY)
        value = getattr(settings, field.name)
        if described is None or value is None:
            continue
        problem = described.problem(value)
        if problem is not None:
            raise ValueError(f"--{flag_of(described.flag or field.name)} {value} {problem}")
