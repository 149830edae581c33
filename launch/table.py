"""`python -m launch.table`: docs/flags.md, the table of all flags, as the fields of the settings make it."""

from __future__ import annotations

from collections.abc import Iterator

from launch.parser import default_words, help_words
from launch.paths import ROOT
from launch.settings import ENTRY_POINTS, ServerOrWorker
from perfedavg.fields import Flag, flags_by_name

PAGE = ROOT / "docs" / "flags.md"
_SHOWN_BOUND = 1_000_000
"""Bounds beyond it are there to keep machines from harm, and are left to the error."""


def to_markdown() -> str:
    """A table a heading, a row a flag; entry points of which a flag has another meaning have a row each."""
    rows: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for role, kind in ENTRY_POINTS.items():
        if kind is ServerOrWorker:
            continue  # its flags are the server's and a worker's
        for name, flag in flags_by_name(kind).items():
            row = (f"`--{name}`", default_words(flag).removeprefix("(default: ").strip("()"), _meaning(flag))
            rows.setdefault(flag.title, {}).setdefault(row, []).append(role)
    return "".join([_INTRODUCTION, *_tables(rows), *_older_names()])


def _tables(rows: dict[str, dict[tuple[str, ...], list[str]]]) -> Iterator[str]:
    for title, entries in rows.items():
        yield f"\n## {title[0].upper()}{title[1:]}\n\n| flag | default | what it is | of |\n|---|---|---|---|\n"
        for row, roles in entries.items():
            cells = [cell.replace("|", "\\|") for cell in (*row, ", ".join(roles))]
            yield f"| {' | '.join(cells)} |\n"


def _older_names() -> Iterator[str]:
    yield "\n## Older names\n\nThey still work, on the command line and in files.\n\n| older name | flag |\n|---|---|\n"
    flags = {name: flag for kind in ENTRY_POINTS.values() for name, flag in flags_by_name(kind).items()}
    for name, flag in flags.items():
        yield from (f"| `--{alias}` | `--{name}` |\n" for alias in flag.aliases)


def _meaning(flag: Flag) -> str:
    setting = flag.setting
    help = help_words(flag)
    if flag.choices is not None and "{choices}" not in setting.help:
        return f"{help}: {', '.join(f'`{choice}`' for choice in flag.choices)}"
    has_bounds = flag.kind is float or (setting.at_most or 0) in range(1, _SHOWN_BOUND)
    return f"{help} ({setting.allowed(flag.kind)})" if has_bounds else help


_INTRODUCTION = """# Flags

Made by launch/table.py from the fields of the settings; a test holds it to them. Entry points:
`server` is server.py, `worker` client_worker.py, `single` single_process.py, `quick_start` quick_start.sh, `cluster`
cluster.py, `describe` python -m datasets.describe. server_or_worker.py has the flags of `server`, and a worker's
`--device` and `--threads`. `--config FILE` reads flags from a TOML file (`rounds = 100`), or the experiment of another
run from its config.json; what the command line says wins. A file may hold flags of several entry points, each of which
takes its own.
"""

if __name__ == "__main__":
    PAGE.write_text(to_markdown(), encoding="utf-8")
