"""What a benchmark prints has the digits that were measured, and calls equal what the next turn may turn round."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import figures
import pages
import round as round_benchmark


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.379, "1.4"), (0.497, "0.50"), (11.208, "11"), (1207.0, "1,200"), (0.0996, "0.10"), (99.6, "100"), (0.0, "0")],
)
def test_two_significant_digits(value: float, text: str) -> None:
    assert figures.figure(value) == text


@pytest.mark.parametrize(("ratio", "text"), [(1.05, "equal"), (0.9, "equal"), (1.27, "1.3 times"), (0.5, "0.50 times")])
def test_a_ratio_within_the_noise_is_no_difference(ratio: float, text: str) -> None:
    assert figures.times(ratio) == text


def test_a_row_against_others_claims_no_more_than_was_measured() -> None:
    row = {"round_s": 1.454, "ours_is_faster": 1.05, "peak_mb": 515.2, "bytes_a_round": 0}
    text = round_benchmark.table("4 clients", {"BlazeFL": {**row, "first_round_after_s": 1.123, "first_round_s": 2.83}})
    assert text.splitlines()[-1] == "| BlazeFL | 1.5 | equal | 520 | 0 | 1.1 | 2.8 |"


@pytest.mark.parametrize(("name", "benchmark"), [("guarantees.md", "faults.py"), ("performance.md", "networks.py")])
def test_a_page_takes_in_what_was_measured_and_nothing_else_changes(name: str, benchmark: str, tmp_path: Path) -> None:
    page = tmp_path / name
    page.write_text((ROOT / "docs" / name).read_text())
    before, after = pages.split_page(page, benchmark)
    for lines in (["| a | b |", "|---|---|"], ["another"]):
        pages.write_into(page, benchmark, lines)
        assert page.read_text() == "\n".join([before + lines[0], *lines[1:], after])
    with pytest.raises(SystemExit, match="needs the lines"):
        pages.split_page(page, "scale.py")
