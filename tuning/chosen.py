"""The settings that searches chose for the rows of a table: a TOML file a table, which `experiments.rows` reads."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perfedavg.plain_values import parse_toml
from perfedavg.recording.files import replace_file

_INTRODUCTION = "# Made by tune.py: the settings that it chose for rows, as flags, and how each search came to them.\n"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def write_chosen(folder: Path, table: str, row: str, settings: Mapping[str, str], study: Mapping[str, Any]) -> Path:
    """Put what was chosen for a row, and the summary of its study, into the table's file; other rows stay.

    Processes may do so at the same time. Raises ValueError where the file is damaged, OSError where it cannot be
    written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{table}.toml"
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        rows, studies = read_chosen(path)
        rows[row], studies[row] = {name: _plain(text) for name, text in settings.items()}, dict(study)
        text = _INTRODUCTION + "".join(
            f"\n[{kind}.{_key(name)}]\n{_lines(content[name])}"
            for name in sorted(rows)
            for kind, content in (("rows", rows), ("studies", studies))
            if name in content
        )
        replace_file(path, text.encode())
    finally:
        os.close(descriptor)
    return path


def read_chosen(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The chosen settings and the studies' summaries, by row; nothing where there is no file. Raises ValueError."""
    if not path.exists():
        return {}, {}
    try:
        content = parse_toml(path.read_text(encoding="utf-8"))
        rows, studies = content.get("rows", {}), content.get("studies", {})
        return dict(rows), dict(studies)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); mend it, or move it away") from error


def _plain(text: str) -> int | float | str:
    """A number where the text is one, as the tables write them."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{_key(name)} = {_value(value)}\n" for name, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(name)} = {_value(entry)}' for name, entry in value.items())} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)  # numbers, true and false, and texts are written alike


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else json.dumps(name, ensure_ascii=False)
