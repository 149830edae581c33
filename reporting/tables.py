"""The tables of a report: what stands in which column, and how a figure is written."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfedavg.recording.runs import KINDS, FinishedRun, PhaseResult, Scores
from perfedavg.settings import Phase
from reporting.published import JIANG_TABLE_1, JIANG_TARGET, PUBLISHED
from reporting.rows import Row, SeedMean, rounds_to_target, seed_mean

NO_NUMBER = "-"
"""Where a figure does not exist, or is not finite."""

_SHOWN_EPOCHS = (0, 1, 2, 3, 5, 10, 15, 20)
_SHOWN_STEPS = (0, 1, 5, 10, 32)
"""Of personalization: those after which the sine task's authors report."""
_CONFIDENCE_95 = 1.96
"""Standard errors on either side of a mean."""
_PERCENTILES = (10, 50, 90)


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `num_text_columns` columns hold words, the others figures."""

    headers: list[str]
    rows: list[list[str]]
    num_text_columns: int


def results_table(rows: Sequence[Row], loss_name: str) -> Table:
    """The README's table: loss, accuracy and share of hurt clients after each phase, means over seeds.

    It has no column for accuracies where no row has any.
    """
    headers = ["row", "seeds", "after"]
    measures = _measures(rows, loss_name)
    headers += [*(f"{kind} {name}" for kind in KINDS for name, _, _ in measures), "clients hurt"]
    cells = []
    for row in rows:
        for phase in row.phases:
            results = row.results(phase)
            figures = [
                write(seed_mean([read(getattr(result, kind)) for result in results]))
                for kind in KINDS
                for _, read, write in measures
            ]
            hurt = _percent(seed_mean([result.fraction_hurt for result in results]), digits=1)
            cells.append([row.label, str(len(row.runs)), row.after(phase), *figures, hurt])
    return Table(headers, cells, 3)


def changes_table(rows: Sequence[Row], loss_name: str) -> Table:
    """What fine-tuning changes: the difference that it makes within a seed, mean and sample deviation over seeds.

    Seeds differ more from each other, in the clients that they draw, than the phases of one of them do.
    """
    measures = _measures(rows, loss_name)
    cells = []
    for row in rows:
        if not {Phase.FEDAVG, Phase.FINE_TUNE} <= set(row.phases):
            continue
        seeds = list(zip(row.results(Phase.FEDAVG), row.results(Phase.FINE_TUNE), strict=True))
        figures = []
        for kind in KINDS:
            for _, read, write in measures:
                values = [[read(getattr(result, kind)) for result in seed] for seed in seeds]
                figures.append(_signed(write(seed_mean([_change(*pair) for pair in values]))))
        cells.append([row.label, str(len(row.runs)), *figures])
    return Table(["row", "seeds", *(f"{kind} {name}" for kind in KINDS for name, _, _ in measures)], cells, 2)


def nicknames_table(rows: Sequence[Row]) -> Table:
    """What the rows are that are called by their folders."""
    return Table(["row", "what it is"], [[row.label, row.description] for row in rows if row.nickname], 2)


def rounds_table(rows: Sequence[Row], target: float) -> Table:
    """The paper's table: accuracies after each phase, and the rounds to a target accuracy."""
    phases = [phase for phase in Phase if any(phase in row.phases for row in rows)]
    headers = ["clients a round", "E", "otherwise", "seeds"]
    headers += [f"{kind} accuracy after {phase.label}" for phase in phases for kind in KINDS]
    headers += [f"rounds to {target:g}, {kind}" for kind in KINDS]
    cells = []
    for row in rows:
        cohort_size, epochs = row.cohort_and_epochs
        otherwise = row.nickname or row.differences
        name = [str(cohort_size), str(epochs), otherwise] if row.has_cohort_and_epochs else ["", "", row.label]
        accuracies = [_accuracy(row, phase, kind) for phase in phases for kind in KINDS]
        rounds = [_rounds(row, kind, target) for kind in KINDS]
        cells.append([*name, str(len(row.runs)), *accuracies, *rounds])
    return Table(headers, cells, 3)


def clients_table(rows: Sequence[Row], measure: str, measure_name: str) -> Table:
    """Percentiles over the unseen clients of all seeds of a row, and the share of those whose score got worse.

    measure: `accuracy` or `loss`. Rows of which clients.csv cannot be read are not in it.
    """
    headers = ["row", "after", "clients"]
    headers += [f"{kind} {measure_name} p{percentile}" for kind in KINDS for percentile in _PERCENTILES]
    headers.append("clients hurt")
    cells = []
    for row in rows:
        for phase in row.phases:
            initial, personalized = (pooled_client_scores(row, phase, kind, measure) for kind in KINDS)
            if initial.size == 0:
                continue
            write = _format_percent if measure == "accuracy" else _format_plain
            percentiles = [
                write(float(value)) for scores in (initial, personalized) for value in _percentiles_of(scores)
            ]
            worse = personalized < initial if measure == "accuracy" else personalized > initial
            hurt = f"{100 * np.mean(worse):.1f} %"
            cells.append([row.label, row.after(phase), str(initial.size), *percentiles, hurt])
    return Table(headers, cells, 2)


def pooled_client_scores(row: Row, phase: Phase, kind: str, measure: str) -> NDArray[np.float64]:
    """The scores of the unseen clients of all seeds one after the other; NaN where a score is no number."""
    columns = [run.client_scores(phase, kind, measure) for run in row.runs]
    return np.concatenate([np.empty(0), *(column for column in columns if column is not None)])


def epochs_table(rows: Sequence[Row]) -> Table:
    """Accuracy after some numbers of personalization epochs, means over those seeds that measured them."""
    measured = [
        (row, phase, [result.by_epoch for result in row.results(phase) if result.by_epoch])
        for row in rows
        for phase in row.phases
    ]
    known = {entry.epochs for _, _, curves in measured for curve in curves for entry in curve}
    shown = [epochs for epochs in sorted(known) if epochs in _SHOWN_EPOCHS or epochs == max(known)]
    cells = []
    for row, phase, curves in measured:
        if curves:
            by_epoch = [{entry.epochs: entry.accuracy for entry in curve} for curve in curves]
            figures = [_percent(seed_mean([curve.get(epochs) for curve in by_epoch])) for epochs in shown]
            cells.append([row.label, str(len(curves)), row.after(phase), *figures])
    return Table(["row", "seeds", "after", *(_counted(epochs, "epoch") for epochs in shown)], cells, 3)


def steps_table(rows: Sequence[Row], loss_name: str) -> Table:
    """Loss after some numbers of personalization steps with its 95 % confidence interval over clients, a line a seed.

    Where clients differ in the steps of an epoch, or these are not known, it is after as many epochs.
    """
    counts = {steps_per_epoch(run) for row in rows for run in row.runs}
    unit = "epoch" if None in counts else "step"
    lines = []
    for row in rows:
        for phase in row.phases:
            for run in row.runs:
                result = run.phases[phase]
                factor = 1 if unit == "epoch" else steps_per_epoch(run) or 1
                figures = {entry.epochs * factor: entry for entry in result.by_epoch}
                if figures:
                    lines.append((row, run, phase, result.clients, figures))
    known = {steps for *_, figures in lines for steps in figures}
    shown = [steps for steps in _SHOWN_STEPS if steps in known]
    cells = [
        [
            row.label,
            str(run.seed),
            row.after(phase),
            *(
                _with_confidence(figures[steps].loss, figures[steps].loss_std, clients) if steps in figures else ""
                for steps in shown
            ),
        ]
        for row, run, phase, clients, figures in lines
    ]
    return Table(["row", "seed", "after", *(f"{loss_name} after {_counted(steps, unit)}" for steps in shown)], cells, 3)


def steps_per_epoch(run: FinishedRun) -> int | None:
    """Personalization steps in an epoch; None where unseen clients differ in it, or their sizes are not known."""
    if run.clients is None:
        return None
    counts = set(np.ceil(run.clients["num_train_examples"] / run.settings["batch_size"]).astype(int).tolist())
    return counts.pop() if len(counts) == 1 else None


def confidence_95(deviation: float, num_clients: int) -> float:
    """Half the width of the 95 % confidence interval of a mean over clients, from their population deviation."""
    return _CONFIDENCE_95 * deviation / math.sqrt(num_clients)


def published_table(rows: Sequence[Row]) -> Table:
    """The published figures beside those of rows that are one of the eight experiments and were fine-tuned."""
    headers = ["row", "seeds", "clients", "rounds + fine-tuning"]
    headers += [f"{kind} loss, accuracy: {whose}" for kind in KINDS for whose in ("published", "ours")]
    cells = []
    for row in rows:
        if Phase.FINE_TUNE not in row.phases or not row.can_be_compared:
            continue
        figures = PUBLISHED.get(row.cohort_and_epochs)
        if figures is not None:
            ours = row.results(Phase.FINE_TUNE)
            cells.append(
                [
                    row.label,
                    str(len(row.runs)),
                    str(_num_clients(row)),
                    f"{row.settings['fedavg']['num_rounds']} + {row.settings['fine_tune']['num_rounds']}",
                    _loss_and_accuracy(figures.initial_loss, figures.initial_accuracy),
                    _mean_loss_and_accuracy(ours, "initial"),
                    _loss_and_accuracy(figures.personalized_loss, figures.personalized_accuracy),
                    _mean_loss_and_accuracy(ours, "personalized"),
                ]
            )
    return Table(headers, cells, 1)


def jiang_table(rows: Sequence[Row]) -> Table:
    """Table 1 of the paper beside those rows that are one of its eight experiments, as they stand after FedAvg."""
    headers = ["row", "seeds", "clients", "rounds"]
    headers += [f"{kind} accuracy: {whose}" for kind in KINDS for whose in ("paper", "ours")]
    headers += [f"rounds to {JIANG_TARGET:g}, {kind}: {whose}" for kind in KINDS for whose in ("paper", "ours")]
    cells = []
    for row in rows:
        figures = JIANG_TABLE_1.get(row.cohort_and_epochs)
        has_papers_cut = row.settings.get("local_split") != "tail"
        if figures is not None and row.can_be_compared and has_papers_cut:
            cells.append(
                [
                    row.label,
                    str(len(row.runs)),
                    str(_num_clients(row)),
                    str(row.settings["fedavg"]["num_rounds"]),
                    _with_deviation(SeedMean(figures.initial_accuracy, figures.initial_deviation)),
                    _accuracy(row, Phase.FEDAVG, "initial"),
                    _with_deviation(SeedMean(figures.personalized_accuracy, figures.personalized_deviation)),
                    _accuracy(row, Phase.FEDAVG, "personalized"),
                    f"{figures.initial_rounds:g}",
                    _rounds(row, "initial", JIANG_TARGET),
                    f"{figures.personalized_rounds:g}",
                    _rounds(row, "personalized", JIANG_TARGET),
                ]
            )
    return Table(headers, cells, 1)


def runs_table(rows: Sequence[Row]) -> Table:
    """Where the figures come from: each run's folder, digest, cost and code."""
    cells = [
        [
            row.label,
            str(run.seed),
            str(run.path),
            run.result.model_sha256[:16],
            str(run.environment.get("torch", NO_NUMBER)),
            str(run.environment.get("commit") or NO_NUMBER)[:12],
            f"{run.result.seconds:.0f}",
        ]
        for row in rows
        for run in row.runs
    ]
    return Table(["row", "seed", "folder", "model sha256", "torch", "commit", "seconds"], cells, 6)


def to_csv(rows: Sequence[Row], target: float) -> str:
    """A line for each row, seed and phase, in full precision; empty where there is no number."""
    lines = [_csv_line(row, run, phase, target) for row in rows for run in row.runs for phase in row.phases]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_line(row: Row, run: FinishedRun, phase: Phase, target: float) -> dict[str, Any]:
    """By the names of the columns."""
    result, fedavg = run.phases[phase], run.settings["fedavg"]
    scores = {f"{kind}_{name}": value for kind in KINDS for name, value in vars(getattr(result, kind)).items()}
    rounds = {f"rounds_to_target_{kind}": rounds_to_target(run.curve or (), kind, target) for kind in KINDS}
    return {
        "dataset": run.dataset,
        "row": row.label,
        "cohort_size": run.settings["cohort_size"],
        "num_local_epochs": fedavg["num_local_epochs"],
        "num_local_steps": fedavg.get("num_local_steps"),
        "seed": run.seed,
        "phase": phase.field,
        "phase_rounds": run.settings[phase.field]["num_rounds"],
        "unseen_clients": result.clients,
        **scores,
        "fraction_hurt": result.fraction_hurt,
        "target_accuracy": target,
        **rounds,
        "run_seconds": run.result.seconds,
        "model_sha256": run.result.model_sha256,
        "run": run.path,
    }


def _measures(
    rows: Sequence[Row], loss_name: str
) -> list[tuple[str, Callable[[Scores], float | None], Callable[[SeedMean | None], str]]]:
    """What is told of scores: name, value, and how it is written. No accuracy where no row has any."""
    loss = (loss_name, lambda scores: scores.loss, _plain)
    accuracy = ("accuracy", lambda scores: scores.accuracy, _percent)
    return [loss, accuracy] if any(row.has_accuracy for row in rows) else [loss]


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _signed(figure: str) -> str:
    return figure if figure.startswith("-") else f"+{figure}"


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _num_clients(row: Row) -> int:
    result = row.runs[0].result
    return result.train_clients + result.unseen_clients


def _accuracy(row: Row, phase: Phase, kind: str) -> str:
    if phase not in row.phases:
        return ""
    return _with_deviation(seed_mean([getattr(result, kind).accuracy for result in row.results(phase)]))


def _rounds(row: Row, kind: str, target: float) -> str:
    curves = [run.curve for run in row.runs if run.curve]
    if len(curves) < len(row.runs):
        return "no curve"
    rounds = [rounds_to_target(curve, kind, target) for curve in curves]
    reached = [number for number in rounds if number is not None]
    if not reached:
        return "not reached"
    if len(reached) < len(rounds):
        return f"reached by {len(reached)} of {len(rounds)} seeds"
    if len(reached) == 1:
        return str(reached[0])
    return f"{statistics.fmean(reached):.1f} ({statistics.stdev(reached):.1f})"


def _percentiles_of(scores: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in np.percentile(scores, _PERCENTILES)]


def _with_confidence(mean: float | None, deviation: float | None, num_clients: int) -> str:
    if mean is None or deviation is None:
        return NO_NUMBER
    return f"{mean:.4f} ± {confidence_95(deviation, num_clients):.4f}"


def _mean_loss_and_accuracy(results: Sequence[PhaseResult], kind: str) -> str:
    loss = seed_mean([getattr(result, kind).loss for result in results])
    accuracy = seed_mean([getattr(result, kind).accuracy for result in results])
    return f"{_plain(loss)}, {_percent(accuracy)}"


def _loss_and_accuracy(loss: float, accuracy: float) -> str:
    return f"{_format_plain(loss)}, {_format_percent(accuracy)}"


def _with_deviation(value: SeedMean | None) -> str:
    """As the paper writes an accuracy: the deviation in brackets."""
    if value is None:
        return NO_NUMBER
    return f"{value.mean:.4f}" + ("" if value.deviation is None else f" ({value.deviation:.4f})")


def _plain(value: SeedMean | None) -> str:
    if value is None:
        return NO_NUMBER
    return _format_plain(value.mean) + ("" if value.deviation is None else f" ± {value.deviation:.4f}")


def _percent(value: SeedMean | None, digits: int = 2) -> str:
    if value is None:
        return NO_NUMBER
    deviation = "" if value.deviation is None else f" ± {100 * value.deviation:.{digits}f}"
    return f"{100 * value.mean:.{digits}f}{deviation} %"


def _format_plain(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else NO_NUMBER


def _format_percent(value: float) -> str:
    return f"{100 * value:.2f} %" if math.isfinite(value) else NO_NUMBER
