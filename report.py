"""Entry point: the tables and plots of finished runs, as Markdown, CSV and one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import paths
from perfedavg.terminal.console import say, show
from perfedavg.terminal.entry_point import run_entry_point


def main() -> None:
    args = build_parser().parse_args()

    from reporting.contents import build_report, read_runs, with_plots_drawn
    from reporting.files import to_markdown, write_report

    args.runs = [paths.shown(path) for path in args.runs]  # so a report does not tell where it was made
    runs, reasons = read_runs(args.runs)
    if not runs and len(reasons) == 1:
        raise ValueError(reasons[0])
    for reason in reasons:
        say(f"left out: {reason}")
    if not runs:
        raise ValueError("no run is left to report")
    report = build_report(runs, args.target)
    output = args.output or _default_output(args.runs, runs[0].path)
    show(to_markdown(report, with_plots=False))
    write_report(with_plots_drawn(report), output)
    say(f"report.html, report.md and table.csv are in {output}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Show the results of finished runs: tables over seeds, curves, the distribution over unseen "
        "clients, and published figures beside them. Prints Markdown; writes report.md, table.csv and report.html, "
        "which is one page with everything in it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        type=paths.path,
        nargs="+",
        metavar="RUN",
        help="folder of a run, or a folder below which there are runs, such as runs or results/mnist",
    )
    parser.add_argument(
        "--output",
        type=paths.folder,
        metavar="FOLDER",
        help="where to write the report, over an earlier one (default: RUN/report for a single run, else report here)",
    )
    parser.add_argument(
        "--target",
        type=_accuracy,
        default=0.8,
        metavar="X",
        help="accuracy to which rounds are counted, above 0 and at most 1 (default: 0.8)",
    )
    return parser


def _default_output(named: Sequence[Path], first_run: Path) -> Path:
    return first_run / "report" if list(named) == [first_run] else Path("report")


def _accuracy(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an accuracy above 0 and at most 1, such as 0.8")
    return value


if __name__ == "__main__":
    run_entry_point(main)
