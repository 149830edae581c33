"""The report of finished runs: what it says, and in which order, whichever form it is then written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfedavg.recording.runs import FinishedRun, find_runs
from perfedavg.terminal.console import reason_of, say
from reporting import plots, published, tables
from reporting.rows import Row, common_settings, group_rows, leave_out_repeats
from reporting.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reporting.plots import Theme

_SYNTHETIC = "synthetic_writers"
_SYNTHETIC_NOTE = (
    "Synthetic: these clients are rendered from fonts, nobody wrote them. No result on them is a result on FEMNIST, "
    "and no published figure stands beside them."
)
_VALIDATION_NOTE = (
    "Rows with validation are scored on training clients that were held out, not on the unseen ones: they are there to "
    "choose settings by, and are no result."
)
_CHANGES = (
    "The difference between the results after fine-tuning and those after FedAvg, taken within each seed, where the "
    "clients are the same; then the mean over seeds and their sample deviation."
)
_LOSS_NAMES = {"sine": "MSE"}
"""Of data sets whose loss has a name of its own."""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Plot:
    """A picture, drawn when it is asked for.

    name: of its file, without suffix.  description: in words, also for those who cannot see it.
    """

    name: str
    description: str
    draw: Callable[[Theme], Figure]

    @cached_property
    def light(self) -> bytes:
        """PNG for a light page."""
        return plots.render(self.draw, plots.LIGHT)

    @cached_property
    def dark(self) -> bytes:
        """PNG for a dark page."""
        return plots.render(self.draw, plots.DARK)


Block = Heading | Paragraph | Table | Plot


@dataclass(frozen=True)
class Section:
    """All that is said of one data set."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Report:
    """summary: what it covers, and how its figures are to be read.  csv: its figures in full precision."""

    title: str
    summary: str
    sections: list[Section]
    csv: str


def read_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """The finished runs in and below the folders, and a line for each thing that is left out, with the reason.

    The first list may be empty; then the second is not.
    """
    runs: list[FinishedRun] = []
    reasons: list[str] = []
    for folder in _run_folders(paths, reasons):
        try:
            runs.append(FinishedRun.read(folder))
        except ValueError as error:
            reasons.append(str(error))
    runs, repeats = leave_out_repeats(runs)
    reasons += repeats
    reasons += [f"{problem}; its run is missing from what is made of it" for run in runs for problem in run.problems]
    return runs, reasons


def _run_folders(paths: Sequence[Path], reasons: list[str]) -> list[Path]:
    """The runs' folders, each once, however often it is named. Adds to `reasons` why a path has none."""
    folders: dict[Path, Path] = {}
    for path in paths:
        try:
            for folder in find_runs(path):
                folders.setdefault(folder.resolve(), folder)
        except ValueError as error:
            reasons.append(str(error))
    return list(folders.values())


def build_report(runs: Sequence[FinishedRun], target: float) -> Report:
    """target: the accuracy to which rounds are counted, above 0 and at most 1."""
    by_dataset: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_dataset.setdefault(run.dataset, []).append(run)
    rows = {dataset: group_rows(by_dataset[dataset]) for dataset in sorted(by_dataset)}
    all_rows = [row for some in rows.values() for row in some]
    return Report(
        title=f"Personalized FedAvg on {', '.join(rows)}",
        summary=f"{_count(len(runs), 'run')} in {_count(len(all_rows), 'row')}; runs that differ only in the seed are "
        "one row. A figure is the uniform mean over unseen clients, then over seeds; with several seeds it has their "
        "sample deviation, behind ± or in brackets. Initial is the global model on a client's test part, personalized "
        "the same model after adapting it on that client's own training part. Clients hurt are those that fare worse "
        "after that.",
        sections=[_section(dataset, some, target) for dataset, some in rows.items()],
        csv=tables.to_csv(all_rows, target),
    )


def with_plots_drawn(report: Report) -> Report:
    """The same report, with a sentence in place of each plot that cannot be drawn, whatever the reason; it is said too.

    A report is its tables: it does not end for want of a picture.
    """
    return replace(report, sections=[replace(part, blocks=list(map(_drawn, part.blocks))) for part in report.sections])


def _drawn(block: Block) -> Block:
    if not isinstance(block, Plot):
        return block
    try:
        block.light, block.dark  # noqa: B018, each is drawn when it is first asked for
    except Exception as error:
        say(f"no plot {block.name}: {reason_of(error)}")
        return Paragraph(f"The plot {block.name} could not be drawn: {reason_of(error)}")
    return block


def _section(dataset: str, rows: Sequence[Row], target: float) -> Section:
    has_accuracy = any(row.has_accuracy for row in rows)
    loss_name = _LOSS_NAMES.get(dataset, "loss")
    measure, name = ("accuracy", "accuracy") if has_accuracy else ("loss", loss_name)
    blocks: list[Block] = [Paragraph(note) for note in _notes(dataset, rows)]
    blocks += [Heading("Results"), tables.results_table(rows, loss_name)]
    if any(row.nickname for row in rows):
        blocks += [Paragraph("Rows that are called by their folders:"), tables.nicknames_table(rows)]
    changes = tables.changes_table(rows, loss_name)
    if changes.rows:
        blocks += [Heading("What fine-tuning changes"), Paragraph(_CHANGES), changes]
    if has_accuracy:
        blocks += [Heading(f"Rounds to an accuracy of {target:g}"), tables.rounds_table(rows, target)]
        blocks.append(Paragraph(_resolution(rows)))
    blocks += _curves(dataset, rows, measure, name)
    blocks += _clients(dataset, rows, measure, name)
    blocks += _personalization(dataset, rows, measure, name)
    blocks += _published(dataset, rows)
    blocks += [Heading("Runs"), tables.runs_table(rows)]
    return Section(f"{dataset} (synthetic)" if dataset == _SYNTHETIC else dataset, blocks)


def _notes(dataset: str, rows: Sequence[Row]) -> list[str]:
    notes = [_SYNTHETIC_NOTE] if dataset == _SYNTHETIC else []
    if any(row.settings.get("validation") for row in rows):
        notes.append(_VALIDATION_NOTE)
    if not any(row.has_accuracy for row in rows):
        notes.append("A regression: it has no accuracies, and so no rounds to one.")
    return [*notes, _what_rows_share(rows)]


def _what_rows_share(rows: Sequence[Row]) -> str:
    """The protocol, as far as one is more frequent than any other."""
    common = common_settings(rows)
    names = {
        "fedavg num_rounds": "rounds of FedAvg",
        "fine_tune num_rounds": "rounds of fine-tuning",
        "fine_tune method": "its method",
        "fine_tune num_local_epochs": "its local epochs",
        "fine_tune num_local_steps": "its local steps",
        "num_personalization_epochs": "epochs of personalization",
        "num_clients": "clients, training and unseen",
        "partition": "partition",
        "architecture": "model",
        "batch_size": "batch size",
    }
    facts = [f"{words}: {common[name]}" for name, words in names.items() if common.get(name) is not None]
    return f"Where a row's name says nothing else: {'; '.join(facts)}."


def _resolution(rows: Sequence[Row]) -> str:
    every = _listed({row.settings["eval_every"] for row in rows})
    clients = _listed({row.settings["eval_clients"] for row in rows})
    return (
        "Rounds are those of both phases, in the order in which they ran, up to the first point of the curve at which "
        f"the mean accuracy is there. The curve has a point every {every} rounds and one at the end of a phase, taken "
        f"over up to {clients} unseen clients: a number of rounds is no more exact than that. A mean is given where "
        "all seeds got there."
    )


def _curves(dataset: str, rows: Sequence[Row], measure: str, name: str) -> list[Plot]:
    description = (
        f"The {name} on unseen clients against the round, before and after personalization. A dotted line is where "
        "fine-tuning begins, a band the sample deviation over seeds."
    )
    return _plot(dataset, "curves", description, plots.draw_curves(rows, measure, name))


def _clients(dataset: str, rows: Sequence[Row], measure: str, name: str) -> list[Block]:
    description = f"How the {name} is distributed over unseen clients, before and after personalization; all seeds."
    plot = _plot(dataset, "clients", description, plots.draw_clients(rows, measure, name))
    if not plot:
        return []
    explanation = Paragraph(f"Percentiles of the {name} over the unseen clients of all seeds together.")
    return [Heading("Unseen clients"), explanation, tables.clients_table(rows, measure, name), *plot]


def _personalization(dataset: str, rows: Sequence[Row], measure: str, name: str) -> list[Block]:
    description = f"The {name} on unseen clients while they adapt. A band is the sample deviation over seeds"
    description += ", or with one seed the 95 % confidence interval over clients." if measure == "loss" else "."
    plot = _plot(dataset, "personalization", description, plots.draw_epochs(rows, measure, name))
    if not plot:
        return []
    heading = Heading(f"{name[0].upper()}{name[1:]} against personalization")
    if measure == "accuracy":
        return [heading, tables.epochs_table(rows), *plot]
    interval = Paragraph("Behind ± stands the 95 % confidence interval of the mean over unseen clients.")
    return [heading, tables.steps_table(rows, name), interval, *plot]


def _published(dataset: str, rows: Sequence[Row]) -> list[Block]:
    """Published figures beside ours, on the data sets that they can stand beside, with what has to be known of them."""
    blocks: list[Block] = []
    table = tables.published_table(rows)
    if dataset in published.PUBLISHED_DATASETS and table.rows:
        blocks += [Heading("Figures published for this experiment, after fine-tuning"), table]
        blocks += [Paragraph(caveat) for caveat in published.PUBLISHED_CAVEATS]
    table = tables.jiang_table(rows)
    if dataset in published.JIANG_DATASETS and table.rows:
        caveats = [*published.JIANG_CAVEATS, *([published.JIANG_CAVEAT_EMNIST] if dataset == "emnist" else [])]
        blocks += [Heading("The paper's figures for EMNIST-62 by writer"), table]
        blocks += [Paragraph(caveat) for caveat in caveats]
    return blocks


def _plot(dataset: str, name: str, description: str, draw: Callable[[Theme], Figure] | None) -> list[Plot]:
    """The plot, or nothing where there is nothing to draw."""
    return [] if draw is None else [Plot(f"{dataset.replace(':', '.')}-{name}", description, draw)]


def _listed(values: set[Any]) -> str:
    return " or ".join(map(str, sorted(values)))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
