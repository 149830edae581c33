"""The figures of a report: means over seeds, what is measured, and how a figure is written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfedavg.recording.runs import CurvePoint, FinishedRun, PhaseResult
from perfedavg.settings import Phase, Population

NO_NUMBER = "-"
"""Stands for a figure that does not exist, or is not finite."""


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds, and the sample deviation, which is None with a single seed."""

    mean: float
    deviation: float | None = None


def seed_mean(values: Sequence[float | None]) -> SeedMean | None:
    """Mean and sample deviation of one value a seed; None where one of them is no number, or there is none."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    return SeedMean(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


@dataclass(frozen=True)
class Measure:
    """What a report tells of scores.

    field: the metric, as in `Scores` and in the columns of clients.csv.
    name: what the report calls it.
    """

    field: str
    name: str
    higher_is_better: bool = False

    @property
    def is_accuracy(self) -> bool:
        return self.field == "accuracy"

    def values(self, results: Sequence[PhaseResult | CurvePoint], kind: str) -> list[float | None]:
        """kind: of KINDS."""
        return [getattr(result, kind).get(self.field) for result in results]

    def mean(self, results: Sequence[PhaseResult | CurvePoint], kind: str) -> str:
        """The mean over the results of seeds, as text."""
        return self.text(seed_mean(self.values(results, kind)))

    def text(self, value: SeedMean | None) -> str:
        return percent(value) if self.is_accuracy else plain(value)

    def difference(self, value: SeedMean | None) -> str:
        """A difference of two means, as text with its sign."""
        text = self.text(value)
        return text if text == NO_NUMBER or text.startswith("-") else f"+{text}"

    def client_scores(
        self, runs: Iterable[FinishedRun], phase: Phase, kind: str, population: Population | None = None
    ) -> NDArray[np.float64]:
        """The scores of the runs' clients, one run after the other; NaN where a score is no number."""
        columns = [run.client_scores(phase, kind, self.field, population) for run in runs]
        return np.concatenate([np.empty(0), *(column for column in columns if column is not None)])


ACCURACY = Measure("accuracy", "accuracy", higher_is_better=True)


def number(value: float, digits: int) -> str:
    """With so many digits behind the point, the same on every processor: the last bits of a sum depend on its order,
    and would decide how a figure halfway between two is rounded, and whether a nought has a sign.
    """
    return f"{round(value, digits + 6) + 0.0:.{digits}f}"


def plain(value: SeedMean | None, digits: int = 4, factor: float = 1.0, unit: str = "") -> str:
    """`mean ± deviation unit`."""
    if value is None or not math.isfinite(value.mean):
        return NO_NUMBER
    deviation = "" if value.deviation is None else f" ± {number(factor * value.deviation, digits)}"
    return f"{number(factor * value.mean, digits)}{deviation}{unit}"


def percent(value: SeedMean | None, digits: int = 2) -> str:
    """Of a share, 0..1."""
    return plain(value, digits, 100, " %")


def axis_percent(share: float) -> str:
    """A round share as an axis shows it: `97.5 %`."""
    return f"{round(100 * share, 6):g} %"


def in_brackets(value: SeedMean | None, digits: int = 4) -> str:
    """`mean (deviation)`, as the paper writes a figure."""
    if value is None:
        return NO_NUMBER
    return number(value.mean, digits) + ("" if value.deviation is None else f" ({number(value.deviation, digits)})")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def first_at(curve: Sequence[CurvePoint], kind: str, accuracy: float) -> CurvePoint | None:
    """The first point of the curve, initial or personalized, at which its mean accuracy is this or more.

    None where it never is. The curve has a point every `eval_every` rounds, which is how exact the answer is.
    """
    for point in curve:
        mean = getattr(point, kind)["accuracy"]
        if mean is not None and mean >= accuracy:
            return point
    return None


def steps_per_epoch(run: FinishedRun) -> int | None:
    """Personalization steps in an epoch; None where scored clients differ in it, or their sizes are not known."""
    if run.clients is None:
        return None
    sizes = run.clients[run.population]["num_train_examples"]
    counts = set(np.ceil(sizes / run.settings["batch_size"]).astype(int).tolist())
    return counts.pop() if len(counts) == 1 else None
