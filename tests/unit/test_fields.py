"""A setting is one line: a dataclass field that says its bounds is checked against them."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass

import pytest

from perfedavg.fields import MOST, check, setting


@dataclass(frozen=True)
class Example:
    rank: int = setting(MISSING, "number of the worker", at_least=1, at_most=1024)
    mu: float = setting(0.1, "weight of the proximal term", at_least=0)
    decay: float = setting(0.9, "decay", at_least=0, below=1)
    rate: float = setting(0.1, "learning rate", flag="lr", above=0, at_most=1e30)
    steps: int | None = setting(None, "local steps", at_least=1)
    schedule: str = setting("constant", "rate over the rounds", choices=("constant", "linear"))
    joint: bool = setting(False, "one client")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rank": 0}, "--rank 0 must be a whole number from 1 to 1024"),
        ({"rank": 1025}, "--rank 1025 must be a whole number from 1 to 1024"),
        ({"steps": MOST + 1}, f"--steps {MOST + 1} must be a whole number from 1 to {MOST}"),
        ({"mu": -0.5}, "--mu -0.5 must be a number 0 or more"),
        ({"mu": float("inf")}, "--mu inf must be a number 0 or more"),
        ({"decay": 1.0}, "--decay 1.0 must be a number 0 or more and below 1"),
        ({"rate": 0.0}, "--lr 0.0 must be a number above 0 and at most 1e+30"),
        ({"rate": float("nan")}, "--lr nan must be a number above 0 and at most 1e+30"),
        ({"schedule": "cosine"}, "--schedule cosine is unknown; use one of constant, linear"),
    ],
)
def test_a_value_out_of_bounds_is_one_line_with_flag_value_and_fix(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        check(Example(**{"rank": 1, **changes}))
    with pytest.raises(ValueError, match=f"^{re.escape(line.replace('--', '--fine_tune_', 1))}$"):
        check(Example(**{"rank": 1, **changes}), lambda name: f"fine_tune_{name}")


def test_values_at_the_bounds_are_good() -> None:
    check(Example(rank=1, mu=0.0, decay=0.0, rate=1e30, steps=MOST, joint=True))
    check(Example(rank=1024))
