"""What is claimed of personalization, and what runs say of it: differences with intervals, and verdicts that follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from perfedavg.settings import Phase, Population
from reporting.comparison import (
    MANY_INTERVALS,
    SHARED_CLIENTS,
    Reference,
    paired_differences,
    scores_by_seed,
    with_interval,
)
from reporting.figures import Measure
from reporting.intervals import confidence_interval, mean_over_seeds
from reporting.rows import Row
from reporting.tables import Lines, makes_table

CLAIMS = (
    "FedAvg with several local epochs is already a meta-learner: clients adapt its model well (Jiang et al. 2019).",
    "Fine-tuning by a meta-learner gives a better global model, which also personalizes better (Jiang et al. 2019).",
    "A model trained on all data in one place personalizes worse (Jiang et al. 2019).",
    "Adapting to a client's own data hurts on FEMNIST and Shakespeare (Marfoq et al. 2021, arXiv 2108.10252, whose "
    "FedAvg+ is below their FedAvg there). It is the opposite of the first line of claim 1.",
)
"""Their numbers in tables count from 1."""
DATA_OF_CLAIM_4 = ("femnist", "shakespeare", "plays")
_INITIAL, _PERSONALIZED = 0, 1


@dataclass(frozen=True)
class Evidence:
    """What the runs say of a claim, in one comparison.

    claim: its number.
    expects_more: whether by the claim the difference is above 0, in terms of what is better; or below.
    differences: for each seed, of each client, (num_clients,).
    """

    claim: int
    compared: str
    population: Population
    expects_more: bool
    differences: list[NDArray[np.float64]]

    @cached_property
    def mean_and_interval(self) -> tuple[float, float, float]:
        columns = [values[:, None] for values in self.differences]
        (mean,), (low,), (high,) = mean_over_seeds(columns), *confidence_interval(columns)
        return float(mean), float(low), float(high)


def gather_evidence(dataset: str, rows: Sequence[Row], reference: Reference | None, measure: Measure) -> list[Evidence]:
    """All that rows of one data set can say of the claims; nothing of a claim whose rows are missing."""
    return [one for one in _of_all_claims(dataset, rows, reference, measure) if one.differences]


def _of_all_claims(
    dataset: str, rows: Sequence[Row], reference: Reference | None, measure: Measure
) -> Iterator[Evidence]:
    fedavg = _fedavg_row(rows, reference)
    if fedavg is not None:
        yield from _of_claim_1(fedavg, rows, measure)
    for row in rows:
        if row.is_fedavg and Phase.FINE_TUNE in row.results:
            yield from _of_claim_2(row, rows, measure)
    if fedavg is None:
        return
    for row in rows:
        if row.settings["joint"]:
            yield from _of_claim_3(row, fedavg, measure)
    if dataset in DATA_OF_CLAIM_4:
        for population in fedavg.populations:
            yield Evidence(4, _gain_of(fedavg), population, False, _gains(fedavg, measure, population))


def verdict(evidence: Evidence, measure: Measure) -> str:
    """Borne out where the whole interval is on the claim's side of 0, contradicted where it is on the other."""
    sign = 1 if evidence.expects_more == measure.higher_is_better else -1
    _, *bounds = evidence.mean_and_interval
    if all(sign * bound > 0 for bound in bounds):
        return "borne out"
    return "contradicted" if all(sign * bound < 0 for bound in bounds) else "undecided"


@makes_table("claim", "compared", "clients", "by the claim", "verdict")
def claims_table(found: Sequence[Evidence], measure: Measure) -> Lines:
    for one in found:
        is_more = one.expects_more == measure.higher_is_better
        agreeing = sum((values.mean() > 0) == is_more and values.mean() != 0 for values in one.differences)
        yield {
            "claim": str(one.claim),
            "compared": one.compared,
            "clients": one.population.value,
            "number": str(sum(map(len, one.differences))),
            "by the claim": "above 0" if is_more else "below 0",
            f"difference in {measure.name}": with_interval(measure, *one.mean_and_interval),
            "seeds that agree": f"{agreeing} of {len(one.differences)}",
            "verdict": verdict(one, measure),
        }


def explain_claims(found: Sequence[Evidence]) -> str:
    """How the table's verdicts come about, in words."""
    said = (
        "Each difference is of the same clients of the same seeds: the mean over seeds of the mean over clients, in "
        "brackets its 95 % interval, as in the table above. A verdict follows from the interval alone: borne out where "
        "all of it is on the claim's side of 0, contradicted where all of it is on the other, else undecided. "
        f"{MANY_INTERVALS}"
    )
    if any(one.population is Population.TRAINED for one in found):
        said += f" {SHARED_CLIENTS} Number says how many these are."
    if any(len(one.differences) == 1 for one in found):
        said += " With one seed an interval covers the draw of clients alone, and nothing of chance in training."
    return said


def _of_claim_1(fedavg: Row, rows: Sequence[Row], measure: Measure) -> Iterator[Evidence]:
    for population in fedavg.populations:
        yield Evidence(1, _gain_of(fedavg), population, True, _gains(fedavg, measure, population))
    for row in rows:
        if not (row.is_fedsgd or row.is_local_only):
            continue
        for population in fedavg.populations:
            differences = paired_differences(fedavg, row, measure, population, Phase.FEDAVG, Phase.FEDAVG)
            compared = f"personalized: {_name(fedavg)} minus {row.label}"
            yield Evidence(1, compared, population, True, _of_kind(differences, _PERSONALIZED))


def _of_claim_2(row: Row, rows: Sequence[Row], measure: Measure) -> Iterator[Evidence]:
    for other, phase, of_what in ((row, Phase.FEDAVG, "before fine-tuning"), *_as_long_without(row, rows)):
        for population in row.populations:
            differences = paired_differences(row, other, measure, population, Phase.FINE_TUNE, phase)
            for kind, name in ((_INITIAL, "initial"), (_PERSONALIZED, "personalized")):
                compared = f"{name}: {row.label} minus {of_what}"
                yield Evidence(2, compared, population, True, _of_kind(differences, kind))


def _as_long_without(row: Row, rows: Sequence[Row]) -> Iterator[tuple[Row, Phase, str]]:
    """Rows of FedAvg alone for as many rounds as both phases of a row have."""
    num_rounds = sum(row.settings[phase.field]["num_rounds"] for phase in Phase)
    for other in rows:
        is_alone = other.is_fedavg and not other.is_fedsgd and other.settings["fine_tune"] is None
        if is_alone and other.settings["fedavg"]["num_rounds"] == num_rounds:
            yield other, Phase.FEDAVG, f"{other.label} for {num_rounds} rounds"


def _of_claim_3(joint: Row, fedavg: Row, measure: Measure) -> Iterator[Evidence]:
    differences = paired_differences(joint, fedavg, measure, Population.UNSEEN, Phase.FEDAVG, Phase.FEDAVG)
    compared = f"{joint.label} minus {_name(fedavg)}"
    personalized = _of_kind(differences, _PERSONALIZED)
    yield Evidence(3, f"personalized: {compared}", Population.UNSEEN, False, personalized)
    yield Evidence(3, f"personalized minus initial: {compared}", Population.UNSEEN, False, _changes(differences))


def _fedavg_row(rows: Sequence[Row], reference: Reference | None) -> Row | None:
    """The one that is not fine-tuned, or else the reference, before its fine-tuning."""
    candidates = [row for row in rows if row.is_fedavg and not row.is_fedsgd]
    alone = [row for row in candidates if row.settings["fine_tune"] is None]
    if len(alone) == 1:
        return alone[0]
    if reference is not None and reference.row in candidates:
        return reference.row
    return candidates[0] if candidates else None


def _name(fedavg: Row) -> str:
    return fedavg.label if fedavg.settings["fine_tune"] is None else f"{fedavg.label}, before fine-tuning"


def _gain_of(fedavg: Row) -> str:
    return f"personalized minus initial: {_name(fedavg)}"


def _gains(row: Row, measure: Measure, population: Population) -> list[NDArray[np.float64]]:
    return _changes(scores_by_seed(row, measure, population, Phase.FEDAVG))


def _changes(scores: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    return [values[:, _PERSONALIZED] - values[:, _INITIAL] for values in scores]


def _of_kind(differences: Sequence[NDArray[np.float64]], kind: int) -> list[NDArray[np.float64]]:
    return [values[:, kind] for values in differences]
