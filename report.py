"""Entry point: the tables and plots of finished runs, as Markdown, CSV and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch import paths
from launch.flags import parse
from launch.settings import Checked
from perfedavg.fields import setting
from perfedavg.terminal.console import say, show
from perfedavg.terminal.entry_point import run_entry_point

if TYPE_CHECKING:
    from perfedavg.recording.runs import FinishedRun


@dataclass(frozen=True, kw_only=True)
class Report(Checked):
    """Show the results of finished runs: tables over seeds, curves, the distribution over unseen clients, and published
    figures beside them. Prints Markdown; writes report.md, table.csv and report.html, one page with everything in it.
    """

    runs: tuple[Path, ...] = setting(
        MISSING,
        "folder of a run, or a folder below which there are runs, such as runs or results/mnist",
        parse=paths.path,
        metavar="RUN",
        positional=True,
        many=True,
    )
    output: Path | None = setting(
        None,
        "where to write the report, over an earlier one",
        parse=paths.folder,
        metavar="FOLDER",
        absent="RUN/report for a single run, else report here",
    )
    against: Path | None = setting(
        None,
        "the run, or the folder of the runs of several seeds, that the others are compared with, client by client",
        parse=paths.path,
        metavar="RUN",
        absent="FedAvg with fine-tuning",
    )
    target: float | None = setting(
        None,
        "accuracy to which rounds and seconds are counted",
        above=0,
        at_most=1,
        absent="90 % and 95 % of the best row's",
    )


def order_of(runs: Sequence[FinishedRun]) -> list[str]:
    """The names of rows in the order of their tables, where runs lie in <table>/<row>/seed<k>."""
    from experiments.rows import select_rows, table_names

    tables = {run.path.absolute().parent.parent.name for run in runs}
    return [row for table in table_names() if table in tables for row in select_rows(table)]


def main() -> None:
    args = parse(Report)

    from reporting.contents import build_report, read_runs, with_plots_drawn
    from reporting.files import to_markdown, write_report

    named = [paths.shown(path) for path in args.runs]  # so a report does not tell where it was made
    runs, reasons = read_runs(named)
    if not runs and len(reasons) == 1:
        raise ValueError(reasons[0])
    for reason in reasons:
        say(f"left out: {reason}")
    if not runs:
        raise ValueError("no run is left to report")
    report = build_report(runs, args.target, args.against, order_of(runs))
    output = args.output or (runs[0].path / "report" if named == [runs[0].path] else Path("report"))
    show(to_markdown(report, with_plots=False))
    write_report(with_plots_drawn(report), output)
    say(f"report.html, report.md and table.csv are in {output}")


if __name__ == "__main__":
    run_entry_point(main)
