"""Scores of clients, by the names of metrics, and their summary over clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perfedavg.metrics import BASIC_METRICS
from perfedavg.plain_values import from_plain
from perfedavg.settings import Phase, Population

_PERCENTILES = (10, 50, 90)
_STANDARD_ERRORS_OF_95_PERCENT = 1.96
"""On either side of a mean."""


@dataclass(frozen=True)
class ClientScore:
    """How one client fares on its test part: with the model that it starts from, and after adapting it.

    initial, personalized: values by metric. `loss` is the mean over the client's test examples; `accuracy` is in 0..1,
        or NaN where the task is a regression.
    by_epoch: the values after 0, 1, .. epochs of adapting, where they were measured.
    """

    client_id: int
    num_train_examples: int
    num_test_examples: int
    initial: dict[str, float]
    personalized: dict[str, float]
    by_epoch: tuple[dict[str, float], ...] = ()

    @property
    def is_hurt(self) -> bool:
        """Whether the client fares worse by adapting: its accuracy fell, or in a regression its loss rose."""
        if math.isnan(self.initial["accuracy"]):
            return self.personalized["loss"] > self.initial["loss"]
        return self.personalized["accuracy"] < self.initial["accuracy"]


PhaseScores = Mapping[Population, Sequence[ClientScore]]
"""After a phase, in order of the clients' ids."""
RunScores = Mapping[Phase, PhaseScores]


def summarize(scores: Sequence[ClientScore]) -> dict[str, Any]:
    """Uniform means over clients, the spread over clients, and how many clients were hurt.

    `initial` and `personalized` each hold for each metric the mean under its name and, behind it, `_std` (population),
    `_p10`, `_p50` and `_p90`. `fraction_hurt` is the share of clients that are hurt (`ClientScore.is_hurt`). Where it
    was measured, `by_epoch` holds for each number of `epochs` from 0 mean and `_std` of each metric.
    Raises ValueError without clients.
    """
    if not scores:
        raise ValueError("no client was scored")
    summary: dict[str, Any] = {
        "clients": len(scores),
        "initial": _spread([score.initial for score in scores], _PERCENTILES),
        "personalized": _spread([score.personalized for score in scores], _PERCENTILES),
        "fraction_hurt": sum(score.is_hurt for score in scores) / len(scores),
    }
    if scores[0].by_epoch:
        epochs = zip(*(score.by_epoch for score in scores), strict=True)
        summary["by_epoch"] = [{"epochs": number, **_spread(values, ())} for number, values in enumerate(epochs)]
    return summary


def mean(values: Sequence[float]) -> float:
    """The uniform mean, rounded once. Infinite or NaN where what diverged makes it so."""
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):  # beyond the largest float, or infinities of both signs
        return sum(map(float, values)) / len(values)


def confidence_95(deviation: float, num_clients: int) -> float:
    """Half the width of the 95 % confidence interval of a mean over clients, from their population deviation.

    By the normal distribution, so with a few clients it is too narrow. It covers the draw of clients and of their test
    parts, and not the chance in training.
    """
    return _STANDARD_ERRORS_OF_95_PERCENT * deviation / math.sqrt(num_clients)


def check_evaluation(summary: Any) -> None:
    """Raises ValueError where a round's `evaluation`, as JSON gave it, is not what `summarize` returns."""
    fields = from_plain(dict[str, Any], summary, "evaluation")
    for kind in ("initial", "personalized"):
        spread = from_plain(dict[str, float | None], fields.get(kind), f"evaluation.{kind}")
        missing = [metric for metric in BASIC_METRICS if metric not in spread]
        if missing:
            raise ValueError(f"it lacks evaluation.{kind}.{missing[0]}")
    from_plain(float, fields.get("fraction_hurt"), "evaluation.fraction_hurt")


def _spread(scores: Sequence[Mapping[str, float]], percentiles: Sequence[int]) -> dict[str, float]:
    """By metric: mean, population deviation and percentiles over clients."""
    spread: dict[str, float] = {}
    for metric in scores[0]:
        values = [score[metric] for score in scores]
        with np.errstate(over="ignore", invalid="ignore"):
            spread |= {metric: mean(values), f"{metric}_std": float(np.std(values))}
            at = np.percentile(values, percentiles).tolist() if percentiles else []
        spread |= {f"{metric}_p{percentile}": value for percentile, value in zip(percentiles, at, strict=True)}
    return spread
