"""The commands that start an entry point, again or another one, with given settings."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.paths import ROOT
from launch.settings import Data, Network, Worker
from perfedavg.fields import Flag, flags_by_name, values_of
from perfedavg.settings import ExperimentConfig
from perfedavg.terminal.console import command_line

_OF_ONE_RUN = ("run_dir", "resume", "initial_model")


def to_argv(settings: Any, kind: type, **more: Any) -> list[str]:
    """The command line that gives another entry point the same settings, and `more`, as far as it knows them.

    The experiment of a run that goes on is left to its folder.
    """
    values = {**values_of(settings), **more}
    if values.get("resume") is not None:
        values = {name: value for name, value in values.items() if name not in flags_by_name(ExperimentConfig)}
    return _words(flags_by_name(kind).values(), values)


def restart_command(settings: Any) -> str:
    """What starts an entry point again, for a shell in any folder; an experiment, or --resume, goes behind it."""
    kind = type(settings)
    flags = [
        flag for flag in flags_by_name(kind).values() if flag.path[0] != "experiment" and flag.name not in _OF_ONE_RUN
    ]
    return command_line([sys.executable, ROOT / kind.script, *_words(flags, _differing(settings))])


def differing_words(settings: Any, leave_out: Sequence[str] = ()) -> list[str]:
    """The words that give an entry point what is not the default. leave_out: names of flags."""
    flags = [flag for name, flag in flags_by_name(type(settings)).items() if name not in leave_out]
    return _words(flags, _differing(settings))


def worker_command(settings: Any) -> str:
    """What starts a worker of the server with these settings on its machine; --rank goes behind it."""
    flags = [*flags_by_name(Data).values(), *flags_by_name(Network).values()]
    return command_line([sys.executable, ROOT / Worker.script, *_words(flags, _differing(settings))])


def flag_words(texts: Mapping[str, str]) -> list[str]:
    """The words that give flags these values. texts: by flag, without dashes."""
    return [word for name, text in texts.items() for word in (f"--{name}", text)]


def _differing(settings: Any) -> dict[str, Any]:
    """What is not the default of its field; the environment may be another one then."""
    flags = flags_by_name(type(settings))
    return {name: value for name, value in values_of(settings).items() if value != flags[name].default}


def _words(flags: Iterable[Flag], values: Mapping[str, Any]) -> list[str]:
    words = []
    for flag in flags:
        value = values.get(flag.name or "")
        if value is not None:
            texts = [str(entry) for entry in value] if isinstance(value, tuple) else [str(value)]
            words += texts if flag.setting.positional else [f"--{flag.name}", *texts]
    return words
