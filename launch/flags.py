"""The command line of an entry point, and what it names with --config or --resume, as an object of its settings."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from datasets.registry import find, meaningless
from launch import paths
from launch.parser import SWITCH, Parser, build_parser, default_of
from launch.settings import ENTRY_POINTS
from perfedavg.fields import MISSING, NONE, Flag, build, by_any_name, flags_by_name, flags_of, renamed, values_of
from perfedavg.methods import METHODS, Method
from perfedavg.own_kinds import OpenKinds
from perfedavg.plain_values import parse_toml
from perfedavg.recording.runs import CONFIG_FILE, RecordedRun, read_unfinished_run
from perfedavg.settings import ExperimentConfig

Settings = TypeVar("Settings")


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
    told = dict(values)
    for name, flag in flags.items():
        text = os.environ.get(flag.setting.environment)
        if text and name not in values:
            values[name] = _parse_variable(flag, text)
    if values.get("resume") is not None:
        return _resume(kind, values, given)
    if "client_num_in_total" in flags:
        _complete(flags, values)
        _refuse_meaningless(flags, values)
    settings = build(kind, values)
    _refuse_ineffective(settings, told, given)
    return settings


def _parse_variable(flag: Flag, text: str) -> Any:
    try:
        return flag.parse(text)
    except ValueError as error:
        raise ValueError(f"{error} (which {flag.setting.environment} says, in the environment)") from error


def _without_switch(texts: Mapping[str, Any]) -> dict[str, Any]:
    """`--fine_tune false`, as older commands and files have it, is `--fine_tune_method none`; true changes nothing."""
    texts = dict(texts)
    switch = texts.pop(SWITCH, "true")
    if str(switch).lower() not in ("true", "1", "yes", "false", "0", "no", NONE):
        raise ValueError(f"--{SWITCH} {switch} is unknown; use --fine_tune_method, with {NONE} for no fine-tuning")
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
    parser = Parser(argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
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
                SWITCH,
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
            values.setdefault(name, default_of(flag, data_set))
    if "model" in flags:
        values["model"] = _architecture(dataset, values["model"])


def _refuse_ineffective(settings: Any, told: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError where a setting is told that has no effect, such as one of a method that is not chosen.

    told: what the command line or a file says.  given: what the command line says, by which a file's may come to have
    no effect.
    """
    flags = flags_by_name(type(settings))
    for name, value in told.items():
        cause = flags[name].ineffective_because(settings)
        if cause is None or (name not in given and cause[0].name in given):
            continue
        (other, fitting), owners = cause, flags[name].by_choice
        present = other.value_in(settings)
        reason = f"has no effect with {other.label} {present}"
        uses = [f"{other.label} {text}" for text in fitting if text is not None]
        if flags[name].value_in(settings) is MISSING and owners:
            reason = f"is a setting of {' and '.join(owners)}, and {other.label} is {present}"
            own = [flag for flag in flags.values() if flag.path[-1] == flags[name].path[-1] and flag.by_choice]
            uses = [flag.label for flag in own if flag.ineffective_because(settings) is None] or uses
        raise ValueError(f"--{name} {value} {reason}; leave it out{f', or use {uses[0]}' if uses else ''}")


def _refuse_meaningless(flags: Mapping[str, Flag], values: Mapping[str, Any]) -> None:
    """Raise ValueError where the data set says itself who is unseen, and a share of unseen clients is told.

    With validation clients it has a meaning: theirs is as large a share of the training clients.
    """
    name, share, data_set = "unseen_fraction", values["unseen_fraction"], find(values["dataset"])
    if name in data_set.meaningless and not values.get("validation") and share != default_of(flags[name], data_set):
        raise meaningless(values["dataset"], name, share)


def _goes_on(method: str) -> bool:
    """Whether fine-tuning has a meaning after a method; of a name that is unknown, the check of the flags will tell."""
    kind = METHODS.get(method, Method)
    assert issubclass(kind, Method), "what is no method is not let in"
    return kind.goes_on


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


def _resume(kind: type[Settings], values: dict[str, Any], on_command_line: Mapping[str, Any]) -> Settings:
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
    asked_for = build(ExperimentConfig, {**present, **given}).settled_as(recorded)
    _refuse_ineffective(asked_for, given, on_command_line)
    asked = values_of(asked_for)
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
