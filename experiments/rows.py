"""The tables' rows, from the TOML files beside this module; images.toml says how these are written."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perfedavg.plain_values import parse_toml

Flags = Mapping[str, str]
"""Of single_process.py, by their names without the dashes."""

CHOSEN = Path(__file__).parent / "chosen"
"""Has a file for each table whose settings `tune.py` has chosen."""


def table_names() -> list[str]:
    return list(_tables())


def select_rows(table: str, names: Sequence[str] = ("all",), with_chosen: bool = True) -> dict[str, Flags]:
    """By name, all flags but --seed that make a row what it is; in the order of the table.

    names: of rows or of groups of them, such as `main`.  with_chosen: or as a row was before a search chose for it.
    Raises ValueError where there is no such row.
    """
    content = _tables()[table]
    rows = _rows(table)
    groups = {**content["rows"], "all": rows}
    chosen: set[str] = set()
    for name in names:
        if name not in rows and name not in groups:
            raise ValueError(f"--rows {name} is none of {table}'s; use {', '.join(groups)}, or of {', '.join(rows)}")
        chosen.update(groups.get(name, [name]))
    settings = _chosen(table) if with_chosen else {}
    return {name: _flags(table, row, settings.get(name, {})) for name, row in rows.items() if name in chosen}


def fixed_settings(table: str, name: str) -> list[str]:
    """The flags that a row itself gives, and that no choice of a search replaces."""
    return [flag for flag in _rows(table)[name] if flag != "sets"]


def _rows(table: str) -> dict[str, Mapping[str, Any]]:
    """As they are written, by name."""
    return {name: row for group in _tables()[table]["rows"].values() for name, row in group.items()}


def _flags(table: str, row: Mapping[str, Any], chosen: Mapping[str, Any]) -> Flags:
    content = _tables()[table]
    of_table = content["tables"][table]
    values = {"dataset": of_table["dataset"], **content["common"], **of_table}
    for name in row.get("sets", []):
        values |= content["sets"].get(name, {}) | of_table.get("sets", {}).get(name, {})
    values |= {**chosen, **row}
    values.pop("sets", None)
    for steps in values.keys() & {"local_steps", "fine_tune_local_steps"}:
        values.pop(steps.replace("steps", "epochs"), None)  # of a table, which a row's steps replace
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}


def _chosen(table: str) -> dict[str, Any]:
    """The settings that `tune.py` chose for a table's rows."""
    file = CHOSEN / f"{table}.toml"
    return parse_toml(file.read_text(encoding="utf-8"))["rows"] if file.exists() else {}


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    """The content of the file that has a table, by the table's name."""
    files = sorted(Path(__file__).parent.glob("*.toml"))
    contents = [parse_toml(file.read_text(encoding="utf-8")) for file in files]
    return {table: content for content in contents for table in content["tables"]}
