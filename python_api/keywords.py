"""Keyword arguments as flags: what may be an object of this process in place of a name becomes a name for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from launch.settings import QuickStart, SingleProcess
from perfedavg import own_module
from perfedavg.fields import flags_by_name, flags_of
from perfedavg.methods import METHODS, Method

OBJECTS = ("dataset", "model", "method", "fine_tune_method", "metrics")
"""Settings of which the value may be an object: a data set or what makes one, a model's factory, methods, metrics."""


def to_words(keywords: Mapping[str, Any], with_workers: bool) -> list[str]:
    """The command line that says the same. What is None is left out.

    with_workers: whether other processes take part, which must be able to import what is named.
    Raises ValueError, in one line, where an object is of this process alone.
    """
    kind = QuickStart if with_workers else SingleProcess
    words: list[str] = []
    for name, value in keywords.items():
        if value is None:
            continue
        if isinstance(value, Method):
            words += _settings_of(kind, name, value)
        texts = [_text(name, one, with_workers) for one in (value if isinstance(value, (list, tuple)) else [value])]
        words.append(f"--{name}={','.join(texts)}")
    return words


def import_path() -> str:
    """A PYTHONPATH with which other processes find the modules that this one finds, but for installed ones."""
    folders = [entry for entry in sys.path if entry and Path(entry).is_dir() and not own_module.is_installed(entry)]
    return ":".join(folder for folder in folders if Path(folder).resolve() != own_module.PROJECT)


def _text(name: str, value: Any, with_workers: bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float, Path)):
        return str(value)
    if name not in OBJECTS:
        raise ValueError(f"{name} is a {type(value).__name__}; give a text or a number, as the flag --{name} takes it")
    return _name_of(name, value, with_workers)


def _name_of(setting: str, value: Any, with_workers: bool) -> str:
    """The name by which the value is found, in this process at least."""
    is_method = setting in ("method", "fine_tune_method")
    known = value if isinstance(value, type) or not is_method else type(value)
    if is_method and known in METHODS.values() and known.name in METHODS.built_in:
        return str(known.name)
    is_instance = not hasattr(known, "__qualname__")
    if is_instance and setting == "model":
        raise ValueError(
            f"model is a {type(value).__name__}; give a function (input_shape, num_classes) that makes one"
        )
    kind = getattr(known, "value_of", type(known)) if is_instance else known  # of a metric, its function
    module_name = _module_of(kind)
    own_name = kind.__qualname__.replace("<locals>.", "").replace("<lambda>", "anonymous").replace(".", "_")
    name = f"{module_name}:{own_name}"
    module = sys.modules.get("__main__" if kind.__module__ == "__main__" else module_name)
    is_importable = module_name != "__main__" and getattr(module, kind.__qualname__, None) is known
    if with_workers and not is_importable:
        raise ValueError(
            f"{setting}={name} is of this process alone, and workers cannot import it; write it at the top of a module "
            "(of a data set, a function or a class that makes it), or use workers=0"
        )
    if is_method:
        METHODS.add(name, known)
    is_data = is_instance and setting == "dataset"
    own_module.give(name, (lambda data_root, num_clients, seed: value) if is_data else known)
    return name


def _module_of(kind: Any) -> str:
    """Of a script, the name by which other processes can import it."""
    if kind.__module__ != "__main__":
        return str(kind.__module__)
    file = getattr(sys.modules["__main__"], "__file__", None)
    return "__main__" if file is None else Path(file).stem


def _settings_of(kind: type, name: str, method: Method) -> Iterator[str]:
    """The flags that give a method its settings. name: its own flag's, such as `fine_tune_method`."""
    place = flags_by_name(kind)[name].path
    if is_dataclass(method) and type(method) not in METHODS.values():
        _name_of(name, method, with_workers=False)
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    for flag in flags_of(kind).values():
        if flag.name and flag.by_choice and flag.path[:-1] == place and values.get(flag.path[-1]) is not None:
            yield f"--{flag.name}={_plain(values[flag.path[-1]])}"


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_plain, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
