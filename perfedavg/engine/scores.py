"""Scores of unseen clients and their summary over clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perfedavg.plain_values import from_plain


@dataclass(frozen=True)
class ClientScore:
    """How one unseen client fares on its test part: with the global model, and after adapting it.

    Losses are means over the client's test examples; accuracies are in 0..1, or NaN where the task is a regression.
    by_epoch: loss and accuracy after 0, 1, .. epochs of adapting, where they were measured.
    """

    client_id: int
    num_train_examples: int
    num_test_examples: int
    initial_loss: float
    initial_accuracy: float
    personalized_loss: float
    personalized_accuracy: float
    by_epoch: tuple[tuple[float, float], ...] = ()

    @property
    def is_hurt(self) -> bool:
        """Whether the client fares worse by adapting: its accuracy fell, or in a regression its loss rose."""
        if math.isnan(self.initial_accuracy):
            return self.personalized_loss > self.initial_loss
        return self.personalized_accuracy < self.initial_accuracy


def summarize(scores: Sequence[ClientScore]) -> dict[str, Any]:
    """Uniform means over clients, the spread of the accuracy over clients, and how many clients were hurt.

    `initial` and `personalized` each hold loss, accuracy, accuracy_std (population), accuracy_p10, _p50 and _p90.
    `fraction_hurt` is the share of clients that are hurt (`ClientScore.is_hurt`). Where it was measured, `by_epoch`
    holds for each number of `epochs` from 0 loss, loss_std, accuracy and accuracy_std.
    Raises ValueError without clients.
    """
    if not scores:
        raise ValueError("no client was scored")
    summary: dict[str, Any] = {
        "clients": len(scores),
        "initial": _spread([score.initial_loss for score in scores], [score.initial_accuracy for score in scores]),
        "personalized": _spread(
            [score.personalized_loss for score in scores], [score.personalized_accuracy for score in scores]
        ),
        "fraction_hurt": sum(score.is_hurt for score in scores) / len(scores),
    }
    if scores[0].by_epoch:
        # (epochs, clients, 2)
        measured = np.array([score.by_epoch for score in scores]).swapaxes(0, 1)
        summary["by_epoch"] = [
            {
                "epochs": epochs,
                "loss": mean(losses),
                "loss_std": _std(losses),
                "accuracy": mean(accuracies),
                "accuracy_std": _std(accuracies),
            }
            for epochs, (losses, accuracies) in enumerate(measured.swapaxes(1, 2))
        ]
    return summary


def mean(values: Sequence[float]) -> float:
    """The uniform mean, rounded once. Infinite or NaN where what diverged makes it so."""
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):  # beyond the largest float, or infinities of both signs
        return sum(map(float, values)) / len(values)


def _std(values: Sequence[float]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.std(values))


def check_summary(summary: Any, name: str) -> None:
    """Raises ValueError where a value, as JSON gave it, is not what `summarize` returns. name: as an error calls it."""
    fields = from_plain(dict[str, Any], summary, name)
    for kind in ("initial", "personalized"):
        spread = from_plain(dict[str, float | None], fields.get(kind), f"{name}.{kind}")
        missing = [measure for measure in ("loss", "accuracy") if measure not in spread]
        if missing:
            raise ValueError(f"it lacks {name}.{kind}.{missing[0]}")
    from_plain(float, fields.get("fraction_hurt"), f"{name}.fraction_hurt")


def _spread(losses: list[float], accuracies: list[float]) -> dict[str, float]:
    p10, p50, p90 = np.percentile(accuracies, [10, 50, 90])
    return {
        "loss": mean(losses),
        "accuracy": mean(accuracies),
        "accuracy_std": _std(accuracies),
        "accuracy_p10": float(p10),
        "accuracy_p50": float(p50),
        "accuracy_p90": float(p90),
    }
