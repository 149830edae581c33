"""The rows of the papers' tables, from the TOML files beside this module; images.toml says how these are written."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perfedavg.plain_values import parse_toml

Flags = Mapping[str, str]
"""Of single_process.py, by their names without the dashes."""


def dataset_names() -> list[str]:
    """The data sets that have a table."""
    return list(_tables())


def select_rows(dataset: str, names: Sequence[str] = ("all",)) -> dict[str, Flags]:
    """By name, all flags but --seed that make a row what it is; in the order of the data set's table.

    names: of rows or of groups of them, such as `main`. Raises ValueError where there is no such row.
    """
    groups = _tables()[dataset]["rows"]
    rows = {name: row for group in groups.values() for name, row in group.items()}
    groups = {**groups, "all": rows}
    chosen: set[str] = set()
    for name in names:
        if name not in rows and name not in groups:
            raise ValueError(f"--rows {name} is none of {dataset}'s; use {', '.join(groups)}, or of {', '.join(rows)}")
        chosen.update(groups.get(name, [name]))
    return {name: _flags(dataset, row) for name, row in rows.items() if name in chosen}


def _flags(dataset: str, row: Mapping[str, Any]) -> Flags:
    table = _tables()[dataset]
    values = {"dataset": dataset, **table["common"], **table["datasets"][dataset]}
    for name in row.get("sets", []):
        values |= table["sets"][name]
    values |= {name: value for name, value in row.items() if name != "sets"}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    """The content of the file that has a data set's rows, by data set."""
    files = sorted(Path(__file__).parent.glob("*.toml"))
    contents = [parse_toml(file.read_text(encoding="utf-8")) for file in files]
    return {dataset: content for content in contents for dataset in content["datasets"]}
