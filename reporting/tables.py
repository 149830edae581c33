"""The tables of a report: what stands in which column."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ParamSpec

import numpy as np

from perfedavg.engine.scores import confidence_95
from perfedavg.recording.runs import KINDS, CurvePoint, FinishedRun, Scores
from perfedavg.settings import Phase, Population
from reporting.figures import (
    ACCURACY,
    NO_NUMBER,
    Measure,
    SeedMean,
    counted,
    first_at,
    in_brackets,
    percent,
    plain,
    seed_mean,
    steps_per_epoch,
)
from reporting.rows import Row

SHOWN_STEPS = (0, 1, 5, 10, 32)
"""Steps of personalization after which the sine task's authors report."""
_SHOWN_EPOCHS = (0, 1, 2, 3, 5, 10, 15, 20)
_PERCENTILES = (10, 50, 90)
LEVELS = (0.9, 0.95)
"""Of the best row's personalized accuracy: to where rounds are counted."""

Arguments = ParamSpec("Arguments")
Lines = Iterator[dict[str, str]]
"""Of a table: cells by header, the same headers in each."""


@dataclass(frozen=True)
class Table:
    """Cells as text.

    words: headers of the columns that hold words; the others hold figures.
    """

    headers: list[str]
    rows: list[list[str]]
    words: frozenset[str]


def makes_table(*words: str) -> Callable[[Callable[Arguments, Lines]], Callable[Arguments, Table]]:
    """Makes a table of the lines that a function yields. words: as `Table` has them."""

    def decorate(lines_of: Callable[Arguments, Lines]) -> Callable[Arguments, Table]:
        @functools.wraps(lines_of)
        def build(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
            lines = list(lines_of(*args, **kwargs))
            headers = list(lines[0]) if lines else []
            return Table(headers, [list(line.values()) for line in lines], frozenset(words))

        return build

    return decorate


@makes_table("row", "clients", "after")
def results_table(rows: Sequence[Row], measures: Sequence[Measure]) -> Lines:
    """Scores and share of hurt clients after each phase, means over seeds.

    A column says of whom, where clients that trained were scored too.
    """
    has_trained = any(len(row.populations) > 1 for row in rows)
    for row in rows:
        for population in row.populations:
            for phase, results in row.results_of(population).items():
                line = {"row": row.label} | ({"clients": population.value} if has_trained else {})
                line |= {"after": row.after(phase), "seeds": str(len(results))}
                line |= {
                    f"{kind} {measure.name}": measure.mean(results, kind) for kind in KINDS for measure in measures
                }
                line["clients hurt"] = percent(seed_mean([result.fraction_hurt for result in results]), digits=1)
                yield line


@makes_table("row")
def changes_table(rows: Sequence[Row], measures: Sequence[Measure]) -> Lines:
    """What fine-tuning changes: the difference that it makes within a seed, mean and sample deviation over seeds.

    Seeds differ more from each other, in the clients that they draw, than the phases of one of them do.
    """
    for row in rows:
        if len(row.results) < 2:
            continue
        line = {"row": row.label, "seeds": str(len(row.runs))}
        for kind in KINDS:
            for measure in measures:
                before, after = (measure.values(results, kind) for results in row.results.values())
                changes = [None if a is None or b is None else b - a for a, b in zip(before, after, strict=True)]
                line[f"{kind} {measure.name}"] = measure.difference(seed_mean(changes))
        yield line


@makes_table("row", "settings")
def nicknames_table(rows: Sequence[Row]) -> Lines:
    """Clients a round, epochs and what else tells rows from most others, of those whose name leaves it out."""
    for row in rows:
        if row.nickname:
            yield {"row": row.label, "settings": row.description}


@makes_table("row")
def best_table(rows: Sequence[Row], measure: Measure) -> Lines:
    """The best point of the curve and its last one, which are of the same clients; means over seeds.

    Rows without a curve are not in it.
    """
    for row in rows:
        if not all(run.curve for run in row.runs):
            continue
        line = {"row": row.label, "seeds": str(len(row.runs))}
        for kind in KINDS:
            best = [point for run in row.runs if (point := run.best_point(kind, measure.field)) is not None]
            last = [run.curve[-1] for run in row.runs if run.curve]
            line[f"{kind}: best"] = measure.mean(best, kind)
            line[f"{kind}: its round"] = plain(seed_mean([point.round_number for point in best]), 0)
            line[f"{kind}: last"] = measure.mean(last, kind)
        yield line


@makes_table("row")
def levels_table(rows: Sequence[Row], levels: Sequence[float]) -> Lines:
    """Rounds, and seconds of training, to each of some accuracies; means over seeds."""
    for row in rows:
        line = {"row": row.label, "seeds": str(len(row.runs))}
        for kind in KINDS:
            for level in levels:
                points = points_at(row, kind, level)
                line[f"{kind} {level_text(level)}: rounds"] = (
                    points if isinstance(points, str) else plain(seed_mean([point.round_number for point in points]), 0)
                )
                seconds = [] if isinstance(points, str) else [point.training_seconds for point in points]
                line[f"{kind} {level_text(level)}: seconds"] = plain(seed_mean(seconds), 0)
        yield line


def level_text(level: float) -> str:
    return percent(SeedMean(level), digits=1)


def levels_of(rows: Sequence[Row], target: float | None) -> list[float]:
    """The accuracies to which rounds are counted: the target, or shares of the best row's personalized accuracy.

    Joint training counts only where all do it: it may be where no federated method comes to.
    """
    if target is not None:
        return [target]
    federated = [row for row in rows if not row.settings["joint"]] or rows
    means = [seed_mean(ACCURACY.values(list(row.results.values())[-1], "personalized")) for row in federated]
    best = max((mean.mean for mean in means if mean is not None), default=1.0)
    return [round(share * best, 3) for share in LEVELS]


@makes_table("row", "after")
def clients_table(rows: Sequence[Row], measure: Measure, population: Population) -> Lines:
    """Percentiles over the clients of all seeds of a row, and the share of those whose score got worse.

    Rows of which clients.csv cannot be read are not in it.
    """
    for row in rows:
        for phase in row.results:
            initial, personalized = (measure.client_scores(row.runs, phase, kind, population) for kind in KINDS)
            if initial.size == 0:
                continue
            line = {"row": row.label, "after": row.after(phase), "clients": str(initial.size)}
            for kind, scores in zip(KINDS, (initial, personalized), strict=True):
                for percentile, value in zip(_PERCENTILES, np.percentile(scores, _PERCENTILES), strict=True):
                    line[f"{kind} {measure.name} p{percentile}"] = measure.text(SeedMean(float(value)))
            worse = personalized < initial if measure.higher_is_better else personalized > initial
            yield line | {"clients hurt": percent(SeedMean(float(np.mean(worse))), digits=1)}


@makes_table("row", "after")
def epochs_table(rows: Sequence[Row]) -> Lines:
    """Accuracy after some numbers of personalization epochs, means over those seeds that measured them."""
    measured = [
        (row, phase, [dict(enumerate(scores["accuracy"] for scores in result.by_epoch)) for result in results])
        for row in rows
        for phase, results in row.results_by_epoch.items()
    ]
    known = {epochs for *_, curves in measured for curve in curves for epochs in curve}
    shown = [epochs for epochs in sorted(known) if epochs in _SHOWN_EPOCHS or epochs == max(known)]
    for row, phase, curves in measured:
        line = {"row": row.label, "seeds": str(len(curves)), "after": row.after(phase)}
        for epochs in shown:
            line[counted(epochs, "epoch")] = percent(seed_mean([curve.get(epochs) for curve in curves]))
        yield line


@makes_table("row", "after")
def steps_table(rows: Sequence[Row], measure: Measure) -> Lines:
    """Loss after some numbers of personalization steps with its 95 % confidence interval over clients, a line a seed.

    Where clients differ in the steps of an epoch, or these are not known, it is after as many epochs.
    """
    steps = {run.path: steps_per_epoch(run) for row in rows for run in row.runs}
    unit = "epoch" if None in steps.values() else "step"
    measured = []
    for row in rows:
        for phase in row.results_by_epoch:
            for run in row.runs:
                factor = 1 if unit == "epoch" else steps[run.path] or 1
                by_steps = {epochs * factor: scores for epochs, scores in enumerate(run.phases[phase].by_epoch)}
                measured += [(row, run, phase, by_steps)] if by_steps else []
    shown = [count for count in SHOWN_STEPS if any(count in by_steps for *_, by_steps in measured)]
    for row, run, phase, by_steps in measured:
        line = {"row": row.label, "seed": str(run.seed), "after": row.after(phase)}
        for count in shown:
            text = _with_confidence(by_steps[count], run.phases[phase].clients) if count in by_steps else ""
            line[f"{measure.name} after {counted(count, unit)}"] = text
        yield line


def _with_confidence(scores: Scores, num_clients: int) -> str:
    loss, deviation = scores["loss"], scores["loss_std"]
    if loss is None or deviation is None:
        return NO_NUMBER
    return f"{loss:.4f} ± {confidence_95(deviation, num_clients):.4f}"


@makes_table("row", "seed", "folder", "model sha256", "torch", "commit")
def runs_table(rows: Sequence[Row]) -> Lines:
    """Where the figures come from: each run's folder, digest, cost and code."""
    for row in rows:
        for run in row.runs:
            line = {"row": row.label, "seed": str(run.seed), "folder": str(run.path)}
            line["model sha256"] = run.result.model_sha256[:16]
            line["torch"] = str(run.environment.get("torch", NO_NUMBER))
            line["commit"] = str(run.environment.get("commit") or NO_NUMBER)[:12]
            yield line | {"seconds": f"{run.result.seconds:.0f}"}


def csv_lines(rows: Sequence[Row], levels: Sequence[float]) -> Iterator[dict[str, Any]]:
    """A line for each population, row, seed and phase, in full precision; None where there is no number."""
    for population in Population:
        for row in rows:
            for run in row.runs:
                for phase in run.results.get(population, ()):
                    yield _csv_line(row, run, population, phase, levels)


def to_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """One or more lines under the names of all their columns; empty where one has no such column."""
    text = io.StringIO()
    # Runs differ in the figures that they have: by version, and by --metrics.
    columns = [list(line) for line in lines]
    fullest = max(columns, key=len)
    names = list(dict.fromkeys(chain(fullest, *columns)))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_line(
    row: Row, run: FinishedRun, population: Population, phase: Phase, levels: Sequence[float]
) -> dict[str, Any]:
    result, fedavg = run.results[population][phase], run.settings["fedavg"]
    line = {
        "dataset": run.dataset,
        "row": row.label,
        "cohort_size": run.settings["cohort_size"],
        "num_local_epochs": fedavg["num_local_epochs"],
        "num_local_steps": fedavg["num_local_steps"],
        "seed": run.seed,
        "phase": phase.field,
        "phase_rounds": run.settings[phase.field]["num_rounds"],
        "population": population.value,
        "clients": result.clients,
        **{f"{kind}_{name}": value for kind in KINDS for name, value in getattr(result, kind).items()},
        "fraction_hurt": result.fraction_hurt,
    }
    curve = (run.curve or ()) if population is run.population else ()
    for kind in KINDS:
        best = run.best_point(kind, phase=phase) if curve else None
        line[f"best_{kind}_accuracy"] = None if best is None else getattr(best, kind)["accuracy"]
        line[f"best_{kind}_round"] = None if best is None else best.round_number
    for number, level in enumerate(levels, 1):
        line[f"level_{number}"] = level
        for kind in KINDS:
            point = first_at(curve, kind, level)
            line[f"rounds_to_level_{number}_{kind}"] = None if point is None else point.round_number
            line[f"seconds_to_level_{number}_{kind}"] = None if point is None else point.training_seconds
    return line | {"run_seconds": run.result.seconds, "model_sha256": run.result.model_sha256, "run": run.path}


def accuracy_in_brackets(row: Row, phase: Phase, kind: str) -> str:
    """Empty where the row has no such phase."""
    return in_brackets(seed_mean(ACCURACY.values(row.results[phase], kind))) if phase in row.results else ""


def points_at(row: Row, kind: str, level: float) -> list[CurvePoint] | str:
    """For each seed, the first point of the curve at which the accuracy is there; or why there is none, in words."""
    curves = [run.curve for run in row.runs if run.curve]
    if len(curves) < len(row.runs):
        return "no curve"
    reached = [point for curve in curves if (point := first_at(curve, kind, level)) is not None]
    if len(reached) == len(curves):
        return reached
    return f"reached by {len(reached)} of {len(curves)} seeds" if reached else "not reached"


def rounds_text(row: Row, kind: str, level: float) -> str:
    """Rounds to an accuracy, as the paper writes them."""
    points = points_at(row, kind, level)
    if isinstance(points, str):
        return points
    return in_brackets(seed_mean([point.round_number for point in points]), digits=1 if len(points) > 1 else 0)
