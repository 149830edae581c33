"""Where settings are searched: `local_lr=0.005..0.2:log`, `head_epochs=1..20`, `per_fedavg_variant=fo,hf`.

A number may be a multiple of the value that the experiment has: `local_lr=0.1x..10x:log`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perfedavg.fields import MISSING, Flag, build, flags_by_name, unknown, values_of
from perfedavg.settings import ExperimentConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_RANGE = re.compile(r"(?P<low>[^.:,]\S*?)\.\.(?P<high>[^:,]+)(?P<log>:log)?")
_DIGITS = 3
"""Significant ones of a number that is tried, so that a choice can be read and typed."""
SET_BY_SEARCH: tuple[str, ...] = ("seed", "validation", "eval_every", "trained_clients_scored", "personalization_curve")
SET_BY_SEARCH += ("run_dir", "resume", "checkpoint_every")
"""Flags of single_process.py that a search gives its trials, or that have no meaning for one."""


@dataclass(frozen=True)
class Dimension:
    """A setting that is searched.

    flag: its name, without dashes.
    default: the value that the experiment has; None where that leaves it to another setting.
    low, high: inclusive bounds of a number.  is_log: whether it is searched by its logarithm.
    choices: texts to choose from, in place of bounds.
    """

    flag: Flag
    default: Any
    low: float = 0
    high: float = 0
    is_log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        assert self.flag.name is not None, "what is searched has a flag"
        return self.flag.name

    @property
    def text(self) -> str:
        """As `--search` takes it, behind the name."""
        if self.choices:
            return ",".join(self.choices)
        return f"{_plain(self.low)}..{_plain(self.high)}{':log' if self.is_log else ''}"

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.flag.kind is int:
            return IntDistribution(int(self.low), int(self.high), log=self.is_log)
        return FloatDistribution(self.low, self.high, log=self.is_log)

    def value_text(self, value: Any) -> str:
        """What the flag is given for a value of the distribution."""
        if self.choices or self.flag.kind is int:
            return str(value)
        rounded = float(f"{value:.{_DIGITS}g}")
        return _plain(min(max(rounded, self.low), self.high))

    @property
    def default_value(self) -> Any:
        """The experiment's value, as one of the distribution; None where it is none of them."""
        if self.choices:
            return next((text for text in self.choices if self.flag.parse(text) == self.default), None)
        is_inside = isinstance(self.default, (int, float)) and self.low <= self.default <= self.high
        return self.default if is_inside else None


def default_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """By flag, as a trial without anything searched would be told: values, or nothing where they are left open."""
    return {name: _plain(value) for name, value in values.items() if value is not None}


def with_effect(texts: Mapping[str, str], experiment: ExperimentConfig) -> dict[str, str]:
    """Without those that are ineffective beside the others, as a momentum beside an optimizer that has none.

    texts: of searched settings, by flag.  experiment: which they are for.
    """
    flags = flags_by_name(ExperimentConfig)
    values = {name: flags[name].parse(text) for name, text in texts.items()}
    told = build(ExperimentConfig, values_of(experiment) | values)
    return {name: text for name, text in texts.items() if flags[name].ineffective_because(told) is None}


def read_space(searches: Sequence[str], experiment: ExperimentConfig, fixed: Sequence[str] = ()) -> list[Dimension]:
    """What is searched: that of the `NAME=RANGE` given or, without any, each setting with a range of interest.

    fixed: flags that may not be searched.
    Raises ValueError, in a line with the fix, where there is nothing to search or a range is none of its setting.
    """
    values = values_of(experiment)
    flags = flags_by_name(ExperimentConfig)
    texts: dict[str, str] = {}
    for search in searches:
        name, equals, text = search.partition("=")
        name = name.removeprefix("--")
        if not (equals and text):
            raise ValueError(f"--search {search} must be NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C")
        if name in texts:
            raise ValueError(f"--search {search}: {name} is searched twice; leave one of them out")
        texts[name] = text
    if not searches:
        present = {name: flag for name, flag in flags.items() if name in values and name not in fixed}
        of_interest = {name: _range_of_interest(flag, experiment) for name, flag in present.items()}
        texts = {name: text for name, text in of_interest.items() if text}
    dimensions = []
    for name, text in texts.items():
        if name in SET_BY_SEARCH:
            raise ValueError(f"--search {name}={text}: the search itself sets {name}; leave it out")
        if name in fixed:
            raise ValueError(f"--search {name}={text}: the row itself says {name}, and would go on to; leave it out")
        if name not in flags:
            raise ValueError(f"--search {name}={text}: {name} {unknown(name, values)}")
        cause = flags[name].ineffective_because(experiment)
        if cause is not None and (flags[name].value_in(experiment) is MISSING or cause[0].name not in texts):
            chosen = f"{cause[0].label} {cause[0].value_in(experiment)}"
            raise ValueError(f"--search {name}={text}: {name} has no effect with {chosen}; leave it out")
        try:
            dimensions.append(_dimension(flags[name], experiment, text))
        except ValueError as error:
            raise ValueError(f"--search {name}={text}: {error}") from error
    return dimensions


def _range_of_interest(flag: Flag, experiment: ExperimentConfig) -> str:
    return flag.search or (flag.setting_in(experiment).search if flag.by_choice else "")


def _dimension(flag: Flag, experiment: ExperimentConfig, text: str) -> Dimension:
    default, setting = flag.value_in(experiment), flag.setting_in(experiment)
    found = _RANGE.fullmatch(text)
    if found is None:
        choices = tuple(dict.fromkeys(text.split(",")))
        for choice in choices:
            problem = setting.problem(flag.parse(choice))
            if problem is not None:
                raise ValueError(f"{choice} {problem}")
        if len(choices) < 2:
            raise ValueError(f"there is only one value; give {flag.label} {text} instead, or a range LOW..HIGH")
        return Dimension(flag, default, choices=choices)
    if flag.kind not in (int, float):
        raise ValueError("its values are no numbers; name them with commas between")
    low, high = (_number(flag, found[side], default) for side in ("low", "high"))
    for bound in (low, high):
        problem = setting.problem(bound)
        if problem is not None:
            raise ValueError(f"{_plain(bound)} {problem}")
    if low >= high:
        raise ValueError(f"{_plain(low)} is not below {_plain(high)}; the lower bound comes first")
    if found["log"] and low <= 0:
        raise ValueError(f"{_plain(low)} has no logarithm; begin above 0, or leave :log out")
    return Dimension(flag, default, low, high, found["log"] is not None)


def _number(flag: Flag, text: str, default: Any) -> float:
    """A bound, which with an x behind it is a multiple of the present value."""
    try:
        if not text.endswith("x"):
            return flag.kind(text)  # type: ignore[no-any-return]
        factor = float(text[:-1])
    except ValueError:
        raise ValueError(f"{text} is no {'whole number' if flag.kind is int else 'number'}") from None
    if default is None or default is MISSING:
        raise ValueError(f"{flag.name} has no value to multiply; give the bounds themselves")
    number = float(f"{factor * default:.{_DIGITS}g}")
    return round(number) if flag.kind is int else number


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value)
