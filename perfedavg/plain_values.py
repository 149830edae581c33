"""Values from files that anybody may have edited: each is checked against the type of the field that it is for.

The types are those of a dataclass's fields, so a new field is checked without another line here. Whatever a file holds,
what comes out is a value of the right type or a ValueError of one line that names the field. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

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
    Any: "any value",
}


def parse_json(text: str | bytes) -> Any:
    """What the text says. Raises ValueError, also where it is nested more deeply than can be read."""
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


def from_plain(kind: type[Value], value: Any, name: str = "") -> Value:
    """An instance of a dataclass, or another value of a type, from what `json.loads` gave; the inverse of `asdict`.

    Fields that have a default may be absent. Known are bool, int, float, str, None, unions, tuples, lists, dicts (whose
    keys may be whole numbers, as text) and dataclasses of these; an `Any` is left as it is.
    name: of the value, as an error calls it; empty for the content of a whole file.
    Raises ValueError where the value is of another type, or where the dataclass itself refuses it.
    """
    return typing.cast("Value", _convert(kind, value, name, is_whole=True))


def check_known_fields(kind: type[Any], values: Any, name: str = "") -> None:
    """Raises ValueError where a field of the dataclass has a value of another type.

    Other fields may be there, and fields may be absent, as in a file of another version.
    """
    _convert(kind, values, name, is_whole=False)


def shown(value: Any) -> str:
    """A value as an error shows it: short, on one line, in ASCII."""
    if isinstance(value, (dict, list, tuple)):
        return _DESCRIPTIONS[type(value)]
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _convert(kind: Any, value: Any, name: str, is_whole: bool) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _convert_fields(kind, value, name, is_whole)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(parts, value, name, is_whole)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        if origin is tuple and parts[-1] is not Ellipsis:
            if len(value) != len(parts):
                raise ValueError(f"{_called(name)} has {len(value)} entries, must have {len(parts)}")
            element_kinds = list(parts)
        else:
            element_kinds = [parts[0]] * len(value)
        elements = [
            _convert(element_kind, element, f"{name}[{place}]", is_whole)
            for place, (element_kind, element) in enumerate(zip(element_kinds, value, strict=True))
        ]
        return origin(elements)
    if origin is dict and isinstance(value, dict):
        key_kind, entry_kind = parts
        return {
            _convert_key(key_kind, key, name): _convert(entry_kind, entry, f"{name}[{shown(key)}]", is_whole)
            for key, entry in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise _refusal(kind, value, name) from error
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise _refusal(kind, value, name)


def _convert_fields(kind: Any, value: Any, name: str, is_whole: bool) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{_called(name)} is {shown(value)}, must be an object")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    prefix = f"{name}." if name else ""
    converted = {key: _convert(hints[key], value[key], f"{prefix}{key}", is_whole) for key in fields if key in value}
    if not is_whole:
        return {**value, **converted}
    for key, field in fields.items():
        if key not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"it lacks {prefix}{key}")
    for key in value:
        if key not in fields:
            raise ValueError(f"{prefix}{shown(key)[1:-1]} is unknown")
    return kind(**converted)


def _convert_union(kinds: tuple[Any, ...], value: Any, name: str, is_whole: bool) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1 and (dataclasses.is_dataclass(others[0]) or typing.get_origin(others[0])):
        return _convert(others[0], value, name, is_whole)  # whose refusal says what is wrong inside
    for kind in others:
        try:
            return _convert(kind, value, name, is_whole)
        except ValueError:
            continue
    raise _refusal(kinds, value, name)


def _convert_key(kind: Any, key: str, name: str) -> Any:
    if kind is not int:
        return key
    try:
        return int(key)
    except ValueError as error:
        raise ValueError(f"{_called(name)} has a key {shown(key)}, must have whole numbers") from error


def _refusal(kind: Any, value: Any, name: str) -> ValueError:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    described = " or ".join(_DESCRIPTIONS.get(typing.get_origin(one) or one, str(one)) for one in kinds)
    return ValueError(f"{_called(name)} is {shown(value)}, must be {described}")


def _called(name: str) -> str:
    return name or "its content"


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
