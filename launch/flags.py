"""The command line of an entry point, and what it names with --config or --resume, as an object of its settings."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from datasets.registry import DATA_SETS, DataSet, find
from launch import paths
from launch.settings import ENTRY_POINTS, Data, Network, Worker
from perfedavg.fields import (
    MISSING,
    NONE,
    Flag,
    OpenKinds,
    build,
    by_any_name,
    flags_by_name,
    flags_of,
    renamed,
    values_of,
)
from perfedavg.methods import METHODS, Method
from perfedavg.plain_values import parse_toml
from perfedavg.recording.runs import CONFIG_FILE, RecordedRun, read_unfinished_run
from perfedavg.settings import ExperimentConfig
from perfedavg.terminal.console import command_line

Settings = TypeVar("Settings")

ROOT = Path(__file__).resolve().parent.parent
FIRST: tuple[str, ...] = ("dataset", "method", "client_num_per_round", "rounds", "local_epochs", "fine_tune_method")
FIRST += ("seed", "workers", "hosts", "world_size", "rank", "data_root", "run_dir")
"""Flags that a newcomer looks for."""
_SWITCH = "fine_tune"
"""An older flag; see `_without_switch`."""
_OF_ONE_RUN = ("run_dir", "resume", "initial_model")


class _Parser(argparse.ArgumentParser):
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


def parse(kind: type[Settings], argv: Sequence[str] | None = None, others: list[str] | None = None) -> Settings:
    """The settings that a command line gives, `sys.argv` by default.

    What it does not say, a --config file says, then the environment, the data set's own defaults and the fields'. With
    --resume, the experiment is the one that the run has recorded.
    others: takes the words that are none of its flags, in their order; without it they are refused.
    Raises ValueError, in a line with the flag, the value and the fix. Ends the process after --help.
    """
    _import_named(kind, argv)
    flags = flags_by_name(kind)
    parser = build_parser(kind)
    namespace, unknown_words = parser.parse_known_args(argv)
    if unknown_words and others is None:
        parser.refuse(unknown_words[0], flags)
    if others is not None:
        others += unknown_words
    texts = _without_switch(vars(namespace))
    file = texts.pop("config", None)
    values = {} if file is None else _read_file(file, flags)
    given = {name: flags[name].parse(text) for name, text in renamed(texts, flags).items()}
    values |= given
    for name, flag in flags.items():
        text = os.environ.get(flag.setting.environment)
        if text and name not in values:
            values[name] = _parse_variable(flag, text)
    if values.get("resume") is not None:
        return _resume(kind, values)
    if "client_num_in_total" in flags:
        _complete(flags, values)
        _refuse_idle(flags, values, given)
    return build(kind, values)


def _parse_variable(flag: Flag, text: str) -> Any:
    try:
        return flag.parse(text)
    except ValueError as error:
        raise ValueError(f"{error} (which {flag.setting.environment} says, in the environment)") from error


def _without_switch(texts: Mapping[str, Any]) -> dict[str, Any]:
    """`--fine_tune false`, as older commands and files have it, is `--fine_tune_method none`; true changes nothing."""
    texts = dict(texts)
    switch = texts.pop(_SWITCH, "true")
    if str(switch).lower() not in ("true", "1", "yes", "false", "0", "no", NONE):
        raise ValueError(f"--{_SWITCH} {switch} is unknown; use --fine_tune_method, with {NONE} for no fine-tuning")
    return texts if str(switch).lower() in ("true", "1", "yes") else texts | {"fine_tune_method": NONE}


def _import_named(kind: type, argv: Sequence[str] | None) -> None:
    """Import the user's own methods that a command line names, itself or in a file, for they bring flags.

    Raises ValueError, in a line, where one that it names itself cannot be had. What is wrong with a file is said when
    it is read.
    """
    flags = by_any_name(flags_by_name(kind))
    open_choices = {name: flag for name, flag in flags.items() if isinstance(flag.setting.kinds, OpenKinds)}
    if not open_choices:
        return
    parser = _Parser(argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    for name in (*open_choices, "config", "resume"):
        parser.add_argument(f"--{name}")
    texts = vars(parser.parse_known_args(argv)[0])
    with contextlib.suppress(ValueError, OSError):
        if "config" in texts:
            _import_named_in_file(paths.file(texts.pop("config")), open_choices)
    with contextlib.suppress(ValueError, OSError):
        if "resume" in texts:
            RecordedRun.read(paths.path(texts.pop("resume"))).experiment()
    for name, text in texts.items():
        if name in open_choices:
            open_choices[name].parse(text)
    _refuse_taken_names()


def _import_named_in_file(path: Path, open_choices: Mapping[str, Flag]) -> None:
    if path.name == CONFIG_FILE:
        RecordedRun.read(path.parent).experiment()
        return
    for name, value in parse_toml(path.read_text(encoding="utf-8")).items():
        if name in open_choices:
            open_choices[name].parse(str(value))


def _refuse_taken_names() -> None:
    """Raise ValueError where a setting of a user's own method has the name of another flag.

    The methods of the user's own are then forgotten, until they are named again.
    """
    try:
        for kind in ENTRY_POINTS.values():
            flags = list(flags_of(kind).values())
            taken = {
                "help",
                "config",
                _SWITCH,
                *by_any_name({flag.name: flag for flag in flags if flag.name and not flag.by_choice}),
            }
            for flag in flags:
                if flag.name in taken and flag.by_choice:
                    own = " and ".join(flag.by_choice)
                    raise ValueError(
                        f"{own} cannot give its setting {flag.path[-1]} the flag --{flag.name}, which is another one's;"
                        " rename it"
                    )
    except ValueError as error:
        METHODS.forget_own()
        raise ValueError(f"--method {error}") from error


def _complete(flags: Mapping[str, Flag], values: dict[str, Any]) -> None:
    """Add what follows from the data set."""
    dataset = values.setdefault("dataset", flags["dataset"].default)
    data_set = find(dataset)
    if values.get("rounds") != 0 and not _goes_on(values.get("method", "")):
        values.setdefault("fine_tune_method", NONE)
    for name, flag in flags.items():
        if not flag.by_choice:
            values.setdefault(name, _default(flag, data_set))
    if "model" in flags:
        values["model"] = _architecture(dataset, values["model"])


def _refuse_idle(flags: Mapping[str, Flag], values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError where a setting is given of a method that is not chosen.

    given: what the command line says. Settings that a file has for a method that the command line replaces are dropped.
    """
    names = {flag.path: name for name, flag in flags.items()}

    def is_idle(name: str) -> bool:
        return values[names[flags[name].path[:-1]]] not in flags[name].by_choice

    for name in [name for name in values if flags[name].by_choice and is_idle(name)]:
        choice, owners = names[flags[name].path[:-1]], flags[name].by_choice
        if name not in given and choice in given:
            del values[name]
            continue
        own = [other for other, flag in flags.items() if flag.path[-1] == flags[name].path[-1] and flag.by_choice]
        fitting = [f"--{other}" for other in own if not is_idle(other)] or [f"--{choice} {next(iter(owners))}"]
        raise ValueError(
            f"--{name} {values[name]} is a setting of {' and '.join(owners)}, and --{choice} is {values[choice]}; "
            f"leave it out, or use {fitting[0]}"
        )


def _goes_on(method: str) -> bool:
    """Whether fine-tuning has a meaning after a method; of a name that is unknown, the check of the flags will tell."""
    kind = METHODS.get(method, Method)
    assert issubclass(kind, Method), "what is no method is not let in"
    return kind.goes_on


def _default(flag: Flag, data_set: DataSet) -> Any:
    defaults = {"architecture": next(iter(data_set.models)), **data_set.defaults}
    return defaults.get(".".join(flag.path).removeprefix("experiment."), flag.default)


def _architecture(dataset: str, model: str) -> str:
    models = find(dataset).models
    if ":" in model:
        return model
    if model not in models:
        raise ValueError(
            f"--model {model} does not fit {dataset}; use {', '.join(models)}, or package.module:factory for your own"
        )
    return models[model]


def _short_name(dataset: str, architecture: str) -> str:
    """What --model calls a recorded model, which for another data set means that one's."""
    models = find(dataset).models
    return next((short for short, model in models.items() if model == architecture), architecture)


def _read_file(text: str, flags: Mapping[str, Flag]) -> dict[str, Any]:
    """The settings in a TOML file, or in the config.json of another run."""
    try:
        path = paths.file(text)
        if path.name == CONFIG_FILE:
            run = RecordedRun.read(path.parent)
            values = values_of(run.experiment())
            values["model"] = _short_name(values["dataset"], values["model"])
            if run.initial_model is not None:
                values["initial_model"] = run.initial_model
            return {name: value for name, value in values.items() if name in flags}
        known = {name for kind in ENTRY_POINTS.values() for name in by_any_name(flags_by_name(kind))}
        content = _without_switch(parse_toml(path.read_text(encoding="utf-8")))
        for name in content:
            if name not in known:
                raise ValueError(f"{name} is unknown; use the names of flags without dashes, such as rounds = 100")
        own = {name: value for name, value in content.items() if name in by_any_name(flags)}
        return {name: flags[name].parse(str(value)) for name, value in renamed(own, flags).items()}
    except (ValueError, OSError) as error:
        raise ValueError(f"--config {text}: {error}; mend it, or name another file") from error


def _resume(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """The settings of a run that goes on. Raises ValueError where those that are given are not the run's."""
    folder = values["resume"]
    if "run_dir" in values:
        raise ValueError(
            f"--run_dir {values['run_dir']} does not go with --resume, which goes on in the folder {folder}; leave one "
            "of them out"
        )
    run = read_unfinished_run(folder)
    try:
        recorded = run.experiment()
    except ValueError as error:
        raise ValueError(f"--resume {folder}: {error}; restore it, or start a new run") from error
    present = values_of(recorded)
    given = {name: value for name, value in values.items() if name in flags_by_name(ExperimentConfig)}
    if "model" in given and given.get("dataset", recorded.dataset) == recorded.dataset:
        given["model"] = _architecture(recorded.dataset, given["model"])
    asked = values_of(build(ExperimentConfig, {**present, **given}).settled_as(recorded))
    if "initial_model" in values and recorded.initial_model is None:
        asked["initial_model"] = values["initial_model"]
    for name in sorted(asked, key=lambda name: name not in given):  # what is given may bring other differences
        if asked[name] != present.get(name):
            raise ValueError(
                f"--{name} {asked[name]} differs from the run's {present.get(name)}; leave it out, or start a new run"
            )
    values.setdefault("initial_model", run.initial_model)
    settings: Any = build(kind, {**values, **present})
    resumed: Settings = replace(settings, experiment=recorded)
    return resumed


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


def _program(kind: Any) -> str | None:
    """How a person starts an entry point; None for the name of its file."""
    return getattr(kind, "program", None) or getattr(kind, "script", None)


def build_parser(kind: type) -> _Parser:
    """Its values are texts, only of flags that are given."""
    description = " ".join((kind.__doc__ or "").split())
    usage = "%(prog)s [--FLAG VALUE ...]" if kind in ENTRY_POINTS.values() else None
    parser = _Parser(
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
        parser.add_argument(f"--{_SWITCH}", nargs="?", const="true", help=argparse.SUPPRESS)
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


def default_words(flag: Flag) -> str:
    """The default of a flag, in brackets; of one that follows the data set or the method, the most frequent as
    `others`.
    """
    defaults = {name: _default(flag, data_set) for name, data_set in DATA_SETS.items()}
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
