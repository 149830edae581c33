"""A setting is one line: a dataclass field, of which its flag, its check, its place in JSON and its help follow."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar

import pytest

from perfedavg.fields import (
    MOST,
    NO_FLAG,
    Part,
    Setting,
    build,
    check,
    choice,
    flags_by_name,
    flags_of,
    label,
    part,
    setting,
    values_of,
)
from perfedavg.plain_values import from_plain
from perfedavg.settings import ExperimentConfig


@dataclass(frozen=True)
class Plain:
    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class Proximal:
    name: ClassVar[str] = "proximal"
    mu: float = setting(0.1, "weight of the proximal term", at_least=0)


METHODS = {"plain": Plain, "proximal": Proximal}


@dataclass(frozen=True)
class Optimizer:
    rate: float = setting(0.1, "learning rate of {of}", flag="lr", above=0, at_most=1e30)
    decay: float = setting(0.9, "decay", at_least=0, below=1)
    betas: tuple[float, float] = setting((0.9, 0.999), "", flag=NO_FLAG)


@dataclass(frozen=True)
class Phase:
    steps: int | None = setting(None, "local steps", at_least=1, unset="auto")
    schedule: str = setting("constant", "rate over the rounds", choices=("constant", "linear"))
    client: Optimizer = part(Optimizer, prefix="client_", flags={"decay": None}, of="the clients")
    server: Optimizer = part(Optimizer, prefix="server_", defaults={"rate": 1.0}, of="the server")
    method: Any = choice(METHODS, "plain", "what a client does")


@dataclass(frozen=True)
class Whole:
    heading = "all"
    rank: int = setting(MISSING, "number of the worker", at_least=1, at_most=1024)
    joint: bool = setting(False, "one client")
    first: Phase = part(Phase, title="phase 1", flags={"schedule": None})
    second: Phase | None = part(
        Phase, title="phase 2", is_optional=True, prefix="two_", defaults={"server.rate": 0.5, "steps": 3}
    )

    def __post_init__(self) -> None:
        check(self)


def test_the_names_of_flags_follow_from_the_parts() -> None:
    """One field makes the flag of each phase, client and server."""
    assert list(flags_by_name(Whole)) == [
        *("rank", "joint"),
        *("steps", "client_lr", "server_lr", "server_decay", "method", "mu"),
        *("two_steps", "two_schedule", "two_client_lr", "two_server_lr", "two_server_decay"),
        *("two_method", "two_mu"),
    ]
    flags = flags_by_name(Whole)
    assert [flags[name].default for name in ("server_lr", "two_server_lr", "two_client_lr", "two_steps")] == [
        1,
        0.5,
        0.1,
        3,
    ]
    assert [flags[name].title for name in ("rank", "two_steps", "two_mu")] == ["all", "phase 2", "phase 2"]
    assert flags["two_server_lr"].help == "learning rate of the server"
    assert (label(Whole, "first.client.rate"), label(Whole, "first.client.decay")) == (
        "--client_lr",
        "first.client.decay",
    )


def test_what_a_flag_does_not_say_is_a_default() -> None:
    whole = build(Whole, {"rank": 3, "two_server_lr": 0.7, "two_method": "proximal", "two_mu": 0.2})
    assert whole == Whole(3, second=Phase(3, server=Optimizer(0.7), method=Proximal(0.2)))
    assert build(Whole, values_of(whole)) == whole
    assert dataclasses.asdict(whole)["second"]["server"] == {"rate": 0.7, "decay": 0.9, "betas": (0.9, 0.999)}
    with pytest.raises(ValueError, match=r"^--rank must be given$"):
        build(Whole, {})


def test_a_part_can_be_left_out() -> None:
    whole = build(Whole, {"rank": 1, "two_method": "none"})
    assert whole.second is None
    assert [name for name in values_of(whole) if name.startswith("two_")] == ["two_method"]
    assert build(Whole, values_of(whole)) == whole


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"rank": 0}, "--rank 0 must be a whole number from 1 to 1024"),
        ({"rank": 1025}, "--rank 1025 must be a whole number from 1 to 1024"),
        ({"steps": MOST + 1}, f"--steps {MOST + 1} must be a whole number from 1 to {MOST}"),
        ({"two_method": "proximal", "two_mu": -0.5}, "--two_mu -0.5 must be a number 0 or more"),
        ({"method": "proximal", "mu": float("inf")}, "--mu inf must be a number 0 or more"),
        ({"server_decay": 1.0}, "--server_decay 1.0 must be a number 0 or more and below 1"),
        ({"client_lr": 0.0}, "--client_lr 0.0 must be a number above 0 and at most 1e+30"),
        ({"two_client_lr": float("nan")}, "--two_client_lr nan must be a number above 0 and at most 1e+30"),
        ({"two_schedule": "cosine"}, "--two_schedule cosine is unknown; use one of constant, linear"),
    ],
)
def test_a_value_out_of_bounds_is_one_line_with_flag_value_and_fix(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        build(Whole, {"rank": 1, **values})


def test_values_at_the_bounds_are_good() -> None:
    build(Whole, {"rank": 1024, "steps": MOST, "server_decay": 0.0, "client_lr": 1e30, "two_steps": None})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("rank", "7", 7), ("joint", "Yes", True), ("client_lr", "1e-3", 0.001), ("steps", "auto", None), ("mu", "2", 2.0)],
)
def test_a_text_becomes_a_value_of_the_fields_type(name: str, text: str, value: object) -> None:
    assert flags_by_name(Whole)[name].parse(text) == value


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("rank", "x", "--rank x must be a whole number from 1 to 1024"),
        ("rank", "1.5", "--rank 1.5 must be a whole number from 1 to 1024"),
        ("joint", "maybe", "--joint maybe must be true or false"),
        ("two_server_decay", "", "--two_server_decay '' must be a number 0 or more and below 1"),
    ],
)
def test_a_text_of_another_type_is_one_line(name: str, text: str, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        flags_by_name(Whole)[name].parse(text)


def test_a_new_setting_is_one_line() -> None:
    """The field alone brings the flag in both phases, its help, its check and its entry in JSON."""
    clip = setting(5.0, "length to which an update of {of} is clipped", above=0)
    new = dataclasses.make_dataclass("New", [("clip", float, clip)], bases=(Optimizer,), frozen=True)

    @dataclass(frozen=True)
    class Both:
        one: Any = field(default=None, metadata={"setting": Part(new, of="the clients")})
        two: Any = field(default=None, metadata={"setting": Part(new, prefix="fine_tune_")})

        def __post_init__(self) -> None:
            check(self)

    flags = flags_by_name(Both)
    assert flags["clip"].help == "length to which an update of the clients is clipped"
    both = build(Both, {"clip": flags["clip"].parse("2.5")})
    assert (both.one.clip, both.two.clip) == (2.5, 5.0)
    with pytest.raises(ValueError, match=r"^--fine_tune_clip 0\.0 must be a number above 0$"):
        build(Both, {"fine_tune_clip": 0.0})
    written = json.loads(json.dumps(dataclasses.asdict(both)))
    assert written["one"]["clip"] == 2.5
    assert from_plain(new, written["one"]) == both.one


def test_every_setting_of_an_experiment_says_what_it_is() -> None:
    names = [flag.name for flag in flags_of(ExperimentConfig).values() if flag.name]
    assert len(names) == len(set(names)), "a flag that stands for two settings changes one of them"
    for flag in flags_by_name(ExperimentConfig).values():
        assert flag.help
        assert flag.title
        numbers: Setting = flag.setting
        if flag.kind in (int, float):
            assert (numbers.at_least, numbers.above) != (None, None), flag.name
