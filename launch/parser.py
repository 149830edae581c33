"""A command line as argparse has it: cut into flags and their texts; and --help, in words that other pages share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from datasets.registry import DATA_SETS, DataSet
from launch.settings import ENTRY_POINTS
from perfedavg.fields import MISSING, Flag, by_any_name, flags_by_name

FIRST: tuple[str, ...] = ("dataset", "method", "client_num_per_round", "rounds", "local_epochs", "fine_tune_method")
FIRST += ("seed", "workers", "hosts", "world_size", "rank", "data_root", "run_dir")
"""Flags that a newcomer looks for."""
SWITCH = "fine_tune"
"""An older flag; see `flags._without_switch`."""


class Parser(argparse.ArgumentParser):
    """Cuts a command line into flags and their texts, and prints --help."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help shows the flags")

    def refuse(self, word: str, flags: Mapping[str, Flag]) -> NoReturn:
        """For a word that is no flag, nor the value of one. flags: those that there are."""
        from difflib import get_close_matches

        if not word.startswith("-"):
            self.error(f"{word!r} is neither a flag nor the value of one")
        given = word.partition("=")[0]
        name = given.lstrip("-")
        known = by_any_name(flags)
        owners = [_program(kind) or "" for kind in ENTRY_POINTS.values() if name in by_any_name(flags_by_name(kind))]
        if owners:
            self.error(f"{given} is a flag of {', '.join(owners)}, not of {self.prog}")
        near = [f"--{known[one].name}" for one in get_close_matches(name, known, 1)]
        self.error(f"{given} is unknown; use {near[0]}" if near else f"{given} is unknown")


def _program(kind: Any) -> str | None:
    """How a person starts an entry point; None for the name of its file."""
    return getattr(kind, "program", None) or getattr(kind, "script", None)


def build_parser(kind: type) -> Parser:
    """Its values are texts, only of flags that are given."""
    description = " ".join((kind.__doc__ or "").split())
    usage = "%(prog)s [--FLAG VALUE ...]" if kind in ENTRY_POINTS.values() else None
    parser = Parser(
        _program(kind), usage, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    groups: dict[str, Any] = {}
    flags = flags_by_name(kind)
    if kind in ENTRY_POINTS.values():
        groups["what to look at first"] = parser.add_argument_group("what to look at first")
        files = parser.add_argument_group("from a file")
        files.add_argument(
            "--config",
            metavar="FILE",
            help="TOML file with flags as keys, such as rounds = 100, or the config.json of another run; flags of the "
            "command line win",
        )
    for name, flag in flags.items():
        title = "what to look at first" if name in FIRST and kind in ENTRY_POINTS.values() else _heading(flag)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options: dict[str, Any] = {
            "metavar": _metavar(flag),
            "help": f"{help_words(flag)} {default_words(flag)}".replace("%", "%%"),
        }
        if flag.setting.many:
            options |= {"nargs": "+", "action": "extend"}
        elif flag.setting.positional and flag.default is not MISSING:
            options["nargs"] = "?"
        elif flag.implied is not None:
            options |= {"nargs": "?", "const": flag.implied}
        groups[title].add_argument(name if flag.setting.positional else f"--{name}", **options)
        for alias in flag.aliases:
            groups[title].add_argument(f"--{alias}", **options | {"help": argparse.SUPPRESS})
    if "fine_tune_method" in flags:
        parser.add_argument(f"--{SWITCH}", nargs="?", const="true", help=argparse.SUPPRESS)
    return parser


def _heading(flag: Flag) -> str:
    """That of its settings; those of single methods stand together."""
    return f"{flag.title}, settings of single methods" if flag.by_choice else flag.title or "options"


def help_words(flag: Flag) -> str:
    """What a flag is; of one that single methods have, with their names."""
    return f"{', '.join(flag.by_choice)}: {flag.help}" if flag.by_choice else flag.help


def _metavar(flag: Flag) -> str:
    if flag.setting.metavar is not None:
        return flag.setting.metavar
    if flag.choices is not None:
        return f"{{{','.join(flag.choices)}}}"
    return {int: "N", float: "X", bool: "true|false"}.get(flag.kind, "TEXT")


def default_of(flag: Flag, data_set: DataSet) -> Any:
    defaults = {"architecture": next(iter(data_set.models)), **data_set.defaults}
    return defaults.get(".".join(flag.path).removeprefix("experiment."), flag.default)


def default_words(flag: Flag) -> str:
    """The default of a flag, in brackets; of one that follows the data set or the method, the most frequent as
    `others`.
    """
    defaults = {name: default_of(flag, data_set) for name, data_set in DATA_SETS.items()}
    if flag.by_choice:
        defaults = {name: default for name, (default, _) in flag.by_choice.items()}
    names_by_word: dict[str, list[str]] = {}
    for name, value in defaults.items():
        names_by_word.setdefault(_default_word(flag, value), []).append(name)
    *rare, (common, _) = sorted(names_by_word.items(), key=lambda entry: len(entry[1]))
    listed = "".join(f"{word} for {', '.join(names)}; " for word, names in rare)
    others = ", ".join(names_by_word[common]) if flag.by_choice else "the others"
    words = f"{listed}{common} for {others}" if rare else common
    environment = flag.setting.environment
    words = f"{environment}, or {words}" if environment else words
    return f"(default: {words})" if words else "(must be given)"


def _default_word(flag: Flag, value: Any) -> str:
    if value is MISSING:
        return ""
    if value and isinstance(value, tuple):
        return " ".join(str(entry) for entry in value)
    if value is None or value == () or isinstance(value, Path):
        return flag.setting.unset or flag.setting.absent or "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
