"""The report of finished runs: what it says, and in which order, whichever form it is then written in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from datasets.registry import DATA_SETS, USERS_OWN
from perfedavg.own_files import shown_dataset
from perfedavg.recording.runs import FinishedRun, find_runs
from perfedavg.settings import Population
from perfedavg.terminal.console import reason_of, say
from reporting import tables
from reporting.claims import CLAIMS, claims_table, explain_claims, gather_evidence
from reporting.comparison import Reference, choose_reference, comparison_table, explain_comparison, main_table
from reporting.figures import ACCURACY, Measure, counted
from reporting.pictures.clients import draw_clients
from reporting.pictures.lines import draw_curves, draw_epochs
from reporting.pictures.methods import draw_methods
from reporting.pictures.theme import DARK, LIGHT, Draw, render
from reporting.published import published_tables
from reporting.rows import Row, common_settings, flat_settings, group_rows, leave_out_repeats, whose
from reporting.tables import Table

_VALIDATION_NOTE = (
    "Rows with validation are scored on training clients that were held out, not on the unseen ones: they are there to "
    "choose settings by, and are no result."
)
_CHANGES = (
    "The difference between the results after fine-tuning and those after FedAvg, taken within each seed, where the "
    "clients are the same; then the mean over seeds and their sample deviation."
)
_SETTINGS = (
    "What tells rows from most others, where their names leave it out; clients a round and E, the local epochs of a "
    "round, come first."
)
_SHARED = {
    "cohort_size": "clients a round",
    "fedavg num_local_epochs": "local epochs",
    "fedavg num_rounds": "rounds of phase 1",
    "fine_tune num_rounds": "rounds of fine-tuning",
    "fine_tune method": "method of fine-tuning",
    "fine_tune num_local_epochs": "local epochs of fine-tuning",
    "fine_tune num_local_steps": "local steps of fine-tuning",
    "num_personalization_epochs": "epochs of personalization",
    "num_clients": "clients, training and unseen",
    "partition": "partition",
    "architecture": "model",
    "batch_size": "batch size",
}
"""The settings that are told of most rows, and what they are called."""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Plot:
    """A picture, drawn when it is asked for.

    name: of its file, without suffix.
    description: in words, also for those who cannot see it.
    """

    name: str
    description: str
    draw: Draw

    @cached_property
    def light(self) -> bytes:
        """PNG for a light page."""
        return render(self.draw, LIGHT)

    @cached_property
    def dark(self) -> bytes:
        """PNG for a dark page."""
        return render(self.draw, DARK)


Block = Heading | str | Table | Plot
"""A text is a paragraph."""


@dataclass(frozen=True)
class Section:
    """All that is said of one data set."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Report:
    """Tables and plots of runs.

    summary: what it covers, and how its figures are to be read.
    csv: its figures in full precision.
    """

    title: str
    summary: str
    sections: list[Section]
    csv: str


def read_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """The finished runs in and below the folders, and a line for each thing that is left out, with the reason.

    The first list may be empty; then the second is not.
    """
    folders: dict[Path, Path] = {}
    runs: list[FinishedRun] = []
    reasons: list[str] = []
    for path in paths:
        try:
            for folder in find_runs(path):
                folders.setdefault(folder.resolve(), folder)  # each once, however often it is named
        except ValueError as error:
            reasons.append(str(error))
    for folder in folders.values():
        try:
            runs.append(FinishedRun.read(folder))
        except ValueError as error:
            reasons.append(str(error))
    runs, repeats = leave_out_repeats(runs)
    reasons += repeats
    reasons += [f"{problem}; its run is missing from what is made of it" for run in runs for problem in run.problems]
    return runs, reasons


def build_report(
    runs: Sequence[FinishedRun],
    target: float | None = None,
    against: Path | None = None,
    order: Sequence[str] = (),
) -> Report:
    """target: the accuracy to which rounds are counted, above 0 and at most 1; by default two that fit the data.

    order: as `group_rows` takes it.
    against: the run, or the folder of the runs, that other rows are compared with; by default FedAvg with fine-tuning.
    Raises ValueError where it is none of the runs.
    """
    by_dataset: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_dataset.setdefault(run.dataset, []).append(run)
    rows = {dataset: group_rows(by_dataset[dataset], order) for dataset in sorted(by_dataset)}
    all_rows = [row for some in rows.values() for row in some]
    if against is not None and choose_reference(all_rows, against) is None:
        raise ValueError(f"--against {against} is none of the runs of the report; name one of them, or their folder")
    names = distinct_names(list(rows))
    trained = any(row.population is Population.TRAINED for row in all_rows)
    others = " (those that trained, of runs without any)" if trained else ""
    return Report(
        title=f"Personalized FedAvg on {', '.join(names.values())}",
        summary=f"{counted(len(runs), 'run')} in {counted(len(all_rows), 'row')}; runs that differ only in the seed are"
        f" one row. A figure is the uniform mean over clients, unseen ones where it says nothing else{others}, then "
        "over seeds; with several seeds it has their sample deviation, behind ± or in brackets. Initial is the global "
        "model on a client's test part, personalized the same model after adapting it on that client's own training "
        "part. Clients hurt are those that fare worse after that.",
        sections=[
            Section(names[dataset], list(_blocks(dataset, names[dataset], some, target, against)))
            for dataset, some in rows.items()
        ],
        csv=tables.to_csv(
            [line for some in rows.values() for line in tables.csv_lines(some, tables.levels_of(some, target))]
        ),
    )


def distinct_names(datasets: Sequence[str]) -> dict[str, str]:
    """What a report calls each data set: files of one name in two folders are told apart by a number."""
    names: dict[str, str] = {}
    for dataset in datasets:
        name = shown_dataset(dataset)
        same = sum(shown_dataset(other) == name for other in names)
        names[dataset] = f"{name} ({same + 1})" if same else name
    return names


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
        return f"The plot {block.name} could not be drawn: {reason_of(error)}"
    return block


def _blocks(
    dataset: str, name: str, rows: Sequence[Row], target: float | None, against: Path | None
) -> Iterator[Block]:
    measures = [Measure("loss", DATA_SETS.get(dataset, USERS_OWN).loss_name)]
    if any(row.has_accuracy for row in rows):
        measures.append(ACCURACY)
    others = [Measure(name, name, is_better) for row in rows for name, is_better in row.metrics.items()]
    others = list(dict.fromkeys(others))
    measure, name = measures[-1], name.replace(":", ".")
    reference = choose_reference(rows, against) or choose_reference(rows)
    yield from _notes(dataset, rows, measure)
    yield Heading("Results")
    yield main_table(rows, reference, measure)
    yield f"By {measure.name}, of {whose(rows)}. {explain_comparison(rows, reference)}"
    yield from _methods(f"{name}-methods", rows, reference, measure)
    found = gather_evidence(dataset, rows, reference, measure)
    if found:
        yield Heading("Claims")
        judged = {one.claim for one in found}
        yield from (f"{number}. {claim}" for number, claim in enumerate(CLAIMS, 1) if number in judged)
        yield from (claims_table(found, measure), explain_claims(found))
    yield from _curves(f"{name}-curves", rows, measure)
    if measure.is_accuracy:
        yield from _levels(rows, target)
    yield from _clients(f"{name}-clients", rows, measure)
    yield from _personalization(f"{name}-personalization", rows, measure)
    for heading, table, caveats in published_tables(dataset, rows):
        yield from (Heading(heading), table)
        yield from caveats
    yield from (Heading("After each phase"), tables.results_table(rows, [*measures, *others]))
    changes = tables.changes_table(rows, [*measures, *others])
    if changes.rows:
        yield from (Heading("What fine-tuning changes"), _CHANGES, changes)
    if len(rows) > 1 or any(len(row.populations) > 1 for row in rows):
        yield Heading("Methods side by side")
        for one in [measure, *others]:
            yield from ([f"By {one.name}:"] if others else [])
            yield comparison_table(rows, reference, one)
    if any(row.nickname for row in rows):
        yield from (Heading("Settings of the rows"), _SETTINGS, tables.nicknames_table(rows))
    yield from (Heading("Runs"), tables.runs_table(rows))


def _notes(dataset: str, rows: Sequence[Row], measure: Measure) -> list[str]:
    about = DATA_SETS.get(dataset, USERS_OWN).note
    notes = [f"{about[0].upper()}{about[1:]}."] if about else []
    if any(row.settings["validation"] for row in rows):
        notes.append(_VALIDATION_NOTE)
    if not measure.is_accuracy:
        notes.append("A regression: it has no accuracies, and so no rounds to one.")
    common = common_settings([flat_settings(row.settings) for row in rows])
    values = {words: common.get(name) for name, words in _SHARED.items()}
    facts = [
        f"{words}: {value['name'] if isinstance(value, dict) else value}"
        for words, value in values.items()
        if value is not None
    ]
    return [*notes, f"Where a row's name says nothing else: {'; '.join(facts)}."]


def _levels(rows: Sequence[Row], target: float | None) -> Iterator[Block]:
    best = tables.best_table(rows, ACCURACY)
    if not best.rows:
        return
    yield from (Heading("Best and last round"), best)
    yield (
        "Of the points of the curve; both are means over the same clients, those that the curve is drawn over. The "
        "best round is chosen by the scores that it is shown with, as in many papers, and so looks better than it is."
    )
    levels = tables.levels_of(rows, target)
    yield Heading(f"Rounds and seconds to an accuracy of {' and '.join(map(tables.level_text, levels))}")
    if target is None:
        shares = " and ".join(f"{share * 100:.0f} %" for share in tables.LEVELS)
        aside = ", joint training aside" if any(row.settings["joint"] for row in rows) else ""
        yield f"These are {shares} of the best row's personalized accuracy{aside}; --target names another one."
    yield tables.levels_table(rows, levels)
    yield _resolution(rows)


def _resolution(rows: Sequence[Row]) -> str:
    every, clients = (
        " or ".join(map(str, sorted({row.settings[name] for row in rows}))) for name in ("eval_every", "eval_clients")
    )
    return (
        "Rounds are those of both phases, in the order in which they ran, up to the first point of the curve at which "
        f"the mean accuracy is there. The curve has a point every {every} rounds and one at the end of a phase, taken "
        f"over up to {clients} {whose(rows)}: a number of rounds is no more exact than that. Seconds are those of the "
        "run itself in which it trained, without scoring, and of the machine that it ran on with whatever else ran "
        "there. A mean is given where all seeds got there."
    )


def _methods(name: str, rows: Sequence[Row], reference: Reference | None, measure: Measure) -> Iterator[Block]:
    draw = draw_methods(rows, reference, measure)
    if draw is not None:
        description = (
            f"The {measure.name} of each row after its last phase, before and after personalization, with its 95 % "
            "interval. How much clients differ from each other is in these intervals, and not in those of differences, "
            "for which each client is compared with itself."
        )
        yield Plot(name, description, draw)


def _curves(name: str, rows: Sequence[Row], measure: Measure) -> Iterator[Block]:
    draw = draw_curves(rows, measure)
    if draw is not None:
        description = (
            f"The {measure.name} on {whose(rows)} against the round, before and after personalization. A dotted line "
            "is where fine-tuning begins, a band the sample deviation over seeds."
        )
        yield Plot(name, description, draw)


def _clients(name: str, rows: Sequence[Row], measure: Measure) -> Iterator[Block]:
    for population in Population:
        draw = draw_clients(rows, measure, population)
        if draw is not None:
            who = population.value
            yield Heading(f"{who.capitalize()} clients")
            yield f"Percentiles of the {measure.name} over the {who} clients of all seeds together."
            yield tables.clients_table(rows, measure, population)
            description = (
                f"The {measure.name} of each of the {who} clients of all seeds, in order of what it is before "
                "personalization (line), and what it is after it (dots; crosses where it is worse)."
            )
            yield Plot(name if population is rows[0].population else f"{name}-{who}", description, draw)


def _personalization(name: str, rows: Sequence[Row], measure: Measure) -> Iterator[Block]:
    draw = draw_epochs(rows, measure)
    if draw is not None:
        yield Heading(f"{measure.name[0].upper()}{measure.name[1:]} against personalization")
        if measure.is_accuracy:
            yield tables.epochs_table(rows)
        else:
            yield tables.steps_table(rows, measure)
            yield f"Behind ± stands the 95 % confidence interval of the mean over {whose(rows)}."
        description = f"The {measure.name} on {whose(rows)} while they adapt. A band is the sample deviation over seeds"
        end = "." if measure.is_accuracy else ", or with one seed the 95 % confidence interval over clients."
        yield Plot(name, f"{description}{end}", draw)
