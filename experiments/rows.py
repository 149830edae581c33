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


def select_rows(table: str, names: Sequence[str] = ("all",)) -> dict[str, Flags]:
    """By name, all flags but --seed that make a row what it is; in the order of the table.

    names: of rows or of groups of them, such as `main`. Raises ValueError where there is no such row.
    """
    content = _tables()[table]
    groups = content["rows"]
    rows = {name: row for group in groups.values() for name, row in group.items()}
    groups = {**groups, "all": rows}
    chosen: set[str] = set()
    for name in names:
        if name not in rows and name not in groups:
            raise ValueError(f"--rows {name} is none of {table}'s; use {', '.join(groups)}, or of {', '.join(rows)}")
        chosen.update(groups.get(name, [name]))
    settings = _chosen(table)
    return {name: _flags(table, row, settings.get(name, {})) for name, row in rows.items() if name in chosen}


def _flags(table: str, row: Mapping[str, Any], chosen: Mapping[str, Any]) -> Flags:
    content = _tables()[table]
    of_table = content["tables"][table]
    values = {"dataset": of_table["dataset"], **content["common"], **of_table}
    for name in row.get("sets", []):
        values |= content["sets"].get(name, {}) | of_table.get("sets", {}).get(name, {})
    values |= {**chosen, **row}
    values.pop("sets", None)
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
