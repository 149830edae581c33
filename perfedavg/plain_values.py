"""Values from files that anybody may have edited, checked against the types of the fields that they are for.

A dataclass's own annotations are the schema, so a new field is checked without another line here. A value of another
type is a ValueError of one line with the field, the value and what it must be. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from perfedavg.fields import Kinds, kinds_of
from perfedavg.own_kinds import OpenKinds, stand_in

Value = TypeVar("Value")

_SHOWN_CHARACTERS = 60
_DESCRIPTIONS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
    tuple: "an array",
    list: "an array",
    dict: "an object",
}


def parse_json(text: str | bytes) -> Any:
    """What the text says. Raises ValueError, also where it is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_toml(text: str) -> dict[str, Any]:
    """What the text says. Raises ValueError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content: dict[str, Any] = tomllib.loads(text)
        return content
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def from_plain(kind: type[Value], value: Any, name: str = "", ignore_unknown: bool = False) -> Value:
    """A dataclass, or a value of another type, from what `json.loads` gave; the inverse of `dataclasses.asdict`.

    Known are bool, int, float, str, None, Any, unions, tuples, lists, dicts (whose keys may be whole numbers, as text)
    and dataclasses of these. Fields with a default may be absent. The rules of an `Annotated[type, rule, ...]` are
    functions (value, name) -> value that check further, or change, what has this type.
    name: of the value in errors; empty for the content of a whole file.
    ignore_unknown: pass over fields that the dataclass does not have, as in a file of a later version.
    Raises ValueError where a value is of another type, or where a dataclass itself refuses it.
    """
    return typing.cast("Value", _convert(kind, value, name, ignore_unknown))


def shown(value: Any) -> str:
    """A value as an error shows it: short, on one line, in ASCII."""
    if isinstance(value, (dict, list, tuple)):
        return _DESCRIPTIONS[type(value)]
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def differences(present: Mapping[str, Any], recorded: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name is X, was Y` for every value that differs, also inside of dictionaries."""
    found = []
    for name in dict.fromkeys([*present, *recorded]):
        ours, theirs = present.get(name), recorded.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += differences(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            found.append(f"{prefix}{name} is {ours}, was {theirs}")
    return found


def _convert(kind: Any, value: Any, name: str, ignore_unknown: bool) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        value = _convert(parts[0], value, name, ignore_unknown)
        for rule in parts[1:]:
            value = rule(value, name)
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _convert_fields(kind, value, name, ignore_unknown)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(parts, value, name, ignore_unknown)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        kinds = [parts[0]] * len(value) if origin is list or parts[-1] is Ellipsis else parts
        if len(value) != len(kinds):
            raise ValueError(f"{name or 'its content'} has {len(value)} entries, must have {len(kinds)}")
        entries = enumerate(zip(kinds, value, strict=True))
        return origin([_convert(one, entry, f"{name}[{place}]", ignore_unknown) for place, (one, entry) in entries])
    if origin is dict and isinstance(value, dict):
        return {
            _convert_key(parts[0], key, name): _convert(parts[1], entry, f"{name}[{shown(key)}]", ignore_unknown)
            for key, entry in value.items()
        }
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            return float(value)
    elif type(value) is kind:
        return value
    raise _refusal([kind], value, name)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _convert_fields(kind: Any, values: dict[str, Any], name: str, ignore_unknown: bool) -> Any:
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    prefix = f"{name}." if name else ""
    for key in values:
        if key not in fields and not ignore_unknown:
            raise ValueError(f"{prefix}{shown(key)[1:-1]} is unknown")
    for key, field in fields.items():
        if key not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"it lacks {prefix}{key}")
    converted = {}
    for key in (key for key in fields if key in values):
        kinds = kinds_of(fields[key])
        if kinds is None:
            converted[key] = _convert(hints[key], values[key], f"{prefix}{key}", ignore_unknown)
        else:
            converted[key] = _convert_choice(kinds, values[key], f"{prefix}{key}", ignore_unknown)
    return kind(**converted)


def _convert_choice(kinds: Kinds, value: Any, name: str, ignore_unknown: bool) -> Any:
    """ignore_unknown: let a stand-in be what this version does not have; no module of a user's is imported."""
    chosen = value.get("name") if isinstance(value, dict) else None
    settings = {key: value[key] for key in value if key != "name"} if isinstance(chosen, str) else {}
    if isinstance(chosen, str) and ignore_unknown and isinstance(kinds, OpenKinds) and chosen not in kinds.built_in:
        return stand_in(kinds.base, chosen, settings)
    kind = kinds.find(chosen) if isinstance(chosen, str) else None
    if kind is None:
        raise ValueError(f"{name} is {shown(value)}, must be an object whose name is one of {', '.join(kinds)}")
    return _convert_fields(kind, settings, name, ignore_unknown)


def _convert_union(kinds: tuple[Any, ...], value: Any, name: str, ignore_unknown: bool) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1 and (dataclasses.is_dataclass(others[0]) or typing.get_origin(others[0])):
        return _convert(others[0], value, name, ignore_unknown)  # whose refusal says what is wrong inside
    for kind in others:
        with contextlib.suppress(ValueError):
            return _convert(kind, value, name, ignore_unknown)
    raise _refusal(kinds, value, name)


def _convert_key(kind: Any, key: str, name: str) -> Any:
    try:
        return kind(key)
    except ValueError as error:
        raise ValueError(f"{name or 'its content'} has a key {shown(key)}, must have whole numbers") from error


def _refusal(kinds: typing.Iterable[Any], value: Any, name: str) -> ValueError:
    """Names what the value must be; a dataclass is an object to whoever edits the file."""
    described = [_DESCRIPTIONS.get(typing.get_origin(kind) or kind, _DESCRIPTIONS[dict]) for kind in kinds]
    return ValueError(f"{name or 'its content'} is {shown(value)}, must be {' or '.join(described)}")
