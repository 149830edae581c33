"""Methods side by side: how clients fare under each, and how far that is from a reference, client by client."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perfedavg.methods import Reptile
from perfedavg.recording.runs import KINDS, FinishedRun
from perfedavg.settings import ClientsConfig, Phase, Population
from reporting.figures import NO_NUMBER, Measure, SeedMean, percent, seed_mean
from reporting.intervals import confidence_interval, mean_over_seeds
from reporting.rows import Row, common_settings, flat_settings
from reporting.tables import Lines, makes_table

SHARED_CLIENTS = (
    "Of clients that trained, rows may have scored different ones: a difference is then over those that both scored."
)
MANY_INTERVALS = (
    "Intervals are not corrected for multiple comparisons: where two methods are equally good, about one in twenty "
    "excludes 0 by chance."
)


@dataclass(frozen=True)
class Reference:
    """The row that others are compared with, and why it is this one."""

    row: Row
    reason: str


def choose_reference(rows: Sequence[Row], against: Path | None = None) -> Reference | None:
    """The row of the run that is named, or else FedAvg with fine-tuning; None where there is neither.

    Of several such rows, one that fine-tunes with Reptile goes before others, then the one that has most settings in
    common with the rows of the report, then the first.
    """
    if against is not None:
        folder = against.resolve()
        named = [row for row in rows if any(run.path.resolve().is_relative_to(folder) for run in row.runs)]
        return Reference(named[0], "as --against says") if named else None
    candidates = [row for row in rows if row.is_fedavg and Phase.FINE_TUNE in row.results]
    if not candidates:
        return None
    all_flat = [flat_settings(row.settings) for row in rows]
    common = common_settings(all_flat)

    def unlikeness(row: Row) -> tuple[bool, int]:
        flat = flat_settings(row.settings)
        fine_tunes_otherwise = flat["fine_tune method"]["name"] != Reptile.name
        return fine_tunes_otherwise, sum(flat[name] != common.get(name) for name in flat)

    which = "" if len(candidates) == 1 else " that is most like the others"
    return Reference(
        min(candidates, key=unlikeness), f"FedAvg with fine-tuning{which}; --against RUN names another row"
    )


def paired_differences(
    row: Row,
    reference: Row,
    measure: Measure,
    population: Population,
    phase: Phase | None = None,
    reference_phase: Phase | None = None,
) -> list[NDArray[np.float64]]:
    """For each seed that both rows have, the row's scores after a phase minus the reference's; by default the last one.

    Each of the same clients, (num_clients, 2), initial and personalized: of runs on equal data, those that both scored.
    """
    references = {run.seed: run for run in reference.runs}
    found = []
    for run in row.runs:
        other = references.get(run.seed)
        if other is None or not _have_same_data(run, other):
            continue
        own = _scores(run, measure, population, phase)
        others = _scores(other, measure, population, reference_phase)
        if own is None or others is None:
            continue
        ids, other_ids = (np.asarray((one.clients or {})[population]["client_id"]) for one in (run, other))
        _, places, other_places = np.intersect1d(ids, other_ids, return_indices=True)
        if places.size:
            found.append(own[places] - others[other_places])
    return found


def scores_by_seed(
    row: Row, measure: Measure, population: Population, phase: Phase | None = None
) -> list[NDArray[np.float64]]:
    """For each seed, the clients' scores after a phase, by default the last one, (num_clients, 2), initial and
    personalized; without seeds of which they are not known.
    """
    scores = [_scores(run, measure, population, phase) for run in row.runs]
    return [one for one in scores if one is not None and len(one)]


@makes_table("row")
def main_table(rows: Sequence[Row], reference: Reference | None, measure: Measure) -> Lines:
    """The shortest: each row after its last phase, the clients of its main population, and then the others' scores."""
    has_trained = any(len(row.populations) > 1 for row in rows)
    for row in rows:
        line = {"row": row.label, "seeds": str(len(row.runs))}
        line |= _cells_of(row, row.population, measure)
        if reference is not None:
            line["difference"] = _difference_cells(row, reference.row, measure, row.population)[1]
        if has_trained:
            *_, trained = row.results_of(Population.TRAINED).values() if len(row.populations) > 1 else [[]]
            line |= {f"trained: {kind}": measure.mean(trained, kind) for kind in KINDS}
        yield line


@makes_table("row", "clients", "after")
def comparison_table(rows: Sequence[Row], reference: Reference | None, measure: Measure) -> Lines:
    """Each row after its last phase, its unseen clients and then those that trained."""
    for population in Population:
        for row in rows:
            if population not in row.populations:
                continue
            *_, (phase, results) = row.results_of(population).items()
            line = {
                "row": row.label,
                "clients": population.value,
                "after": row.after(phase),
                "seeds": str(len(results)),
            }
            line |= _cells_of(row, population, measure)
            if reference is not None:
                headers = [f"{kind}, difference" for kind in KINDS]
                line |= zip(headers, _difference_cells(row, reference.row, measure, population), strict=True)
            yield line


def _cells_of(row: Row, population: Population, measure: Measure) -> dict[str, str]:
    *_, results = row.results_of(population).values()
    initial, personalized = (measure.values(results, kind) for kind in KINDS)
    changes = [None if a is None or b is None else b - a for a, b in zip(initial, personalized, strict=True)]
    worst = [_worst_tenth(scores[:, -1], measure) for scores in scores_by_seed(row, measure, population)]
    worst = worst if len(worst) == len(results) else []
    return {
        **{kind: measure.mean(results, kind) for kind in KINDS},
        "change": measure.difference(seed_mean(changes)),
        "bottom decile": measure.text(seed_mean([edge for edge, _ in worst])),
        "worst tenth": measure.text(seed_mean([mean for _, mean in worst])),
        "hurt": percent(seed_mean([result.fraction_hurt for result in results]), digits=1),
    }


def explain_comparison(rows: Sequence[Row], reference: Reference | None) -> str:
    """What the table's columns mean, in words."""
    said = (
        "Each row after its last phase. Change is what personalization adds, hurt the share of clients that fare worse "
        "after it; the bottom decile is the personalized score that a tenth of the clients are at or worse than, the "
        "worst tenth the mean over the tenth that fares worst. "
    )
    if any(Population.TRAINED in row.populations for row in rows):
        said += (
            "Unseen clients never train; trained ones took part in at least one round, and are scored on their own "
            "test parts, from what they kept where the method lets them keep anything. "
        )
    if reference is None:
        return f"{said}There is no row of FedAvg with fine-tuning to compare with; --against RUN names another one."
    has_single_seed = any(len(row.runs) == 1 for row in rows)
    has_accuracy = any(row.has_accuracy for row in rows)
    return (
        f"{said}Differences are to {reference.row.label} ({reference.reason}), on the same clients of the same seeds"
        f"{', in percentage points' if has_accuracy else ''}; in brackets their 95 % interval, by Student's t over "
        + ("seeds, or over clients alone where a row has one seed. " if has_single_seed else "seeds. ")
        + MANY_INTERVALS
        + (f" {SHARED_CLIENTS}" if any(Population.TRAINED in row.populations for row in rows) else "")
    )


def _difference_cells(row: Row, reference: Row, measure: Measure, population: Population) -> list[str]:
    """Initial and personalized."""
    if row is reference:
        return ["reference"] * len(KINDS)
    differences = paired_differences(row, reference, measure, population)
    if not differences:
        return ["other clients"] * len(KINDS)
    means, bounds = mean_over_seeds(differences), confidence_interval(differences)
    return [with_interval(measure, *values) for values in zip(means, *bounds, strict=True)]


def with_interval(measure: Measure, *values: float) -> str:
    """values: the mean, and the bounds of its interval, which a single client has not."""
    mean, lowest, highest = (measure.difference(SeedMean(value)) for value in values)
    if NO_NUMBER in (lowest, highest):
        return mean
    unit = " %" if measure.is_accuracy else ""
    return f"{mean} [{lowest.removesuffix(unit)}, {highest.removesuffix(unit)}]"


def _have_same_data(run: FinishedRun, other: FinishedRun) -> bool:
    """Whether a client of one run is the one of that number in the other, with the same examples.

    Pooling the training clients' data changes the digest of the data, but no unseen client.
    """
    if run.settings["joint"] == other.settings["joint"]:
        return run.result.data_fingerprint == other.result.data_fingerprint
    names = [*(one.name for one in fields(ClientsConfig)), "validation"]
    return all(run.settings[name] == other.settings[name] for name in names)


def _worst_tenth(scores: NDArray[np.float64], measure: Measure) -> tuple[float, float]:
    """The score that a tenth of the clients are at or worse than, and the mean over the tenth that fares worst.

    scores: (num_clients,). Where a client has three test examples, the first is the same for most methods.
    """
    sign = 1 if measure.higher_is_better else -1
    worst_first = np.sort(sign * scores)
    mean = worst_first[: math.ceil(len(scores) / 10)].mean()
    edge = np.percentile(worst_first, 10)
    return sign * float(edge), math.nan if np.isnan(edge) else sign * float(mean)


def _scores(
    run: FinishedRun, measure: Measure, population: Population, phase: Phase | None = None
) -> NDArray[np.float64] | None:
    """After a phase, by default the last one, (num_clients, 2): initial and personalized; None where not known."""
    *_, last = run.phases
    columns = [run.client_scores(phase or last, kind, measure.field, population) for kind in KINDS]
    known = [column for column in columns if column is not None]
    return np.stack(known, axis=1) if len(known) == len(columns) else None
