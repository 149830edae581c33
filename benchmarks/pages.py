"""Pages of docs/ that take in what a benchmark has measured, between two lines of comments that name it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def split_page(page: Path, benchmark: str) -> tuple[str, str]:
    """The page up to where the benchmark's figures begin, and from where they end.

    benchmark: the name of its file.  Ends the process, with a line, where the page has no such place.
    """
    begin = f"<!-- Written by benchmarks/{benchmark} --write. -->\n"
    end = f"<!-- End of what benchmarks/{benchmark} wrote. -->\n"
    before, is_begun, rest = page.read_text().partition(begin)
    _, is_ended, after = rest.partition(end)
    if not is_begun or not is_ended:
        sys.exit(f"--write {page}: it needs the lines\n{begin}{end}between which the figures go")
    return before + begin, end + after


def write_into(page: Path, benchmark: str, lines: Sequence[str]) -> None:
    """Put the lines in place of what the page has there."""
    before, after = split_page(page, benchmark)
    page.write_text("\n".join([before + lines[0], *lines[1:], after]))


def commit() -> str:
    """What is measured."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
