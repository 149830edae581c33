"""Scores of unseen clients and their summary over clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ClientScore:
    """How one unseen client fares on its test part: with the global model, and after adapting it.

    Losses are means over the client's test examples; accuracies are in 0..1.
    """

    client_id: int
    num_train_examples: int
    num_test_examples: int
    initial_loss: float
    initial_accuracy: float
    personalized_loss: float
    personalized_accuracy: float


def summarize(scores: Sequence[ClientScore]) -> dict[str, Any]:
    """Uniform means over clients, the spread of the accuracy over clients, and how many clients were hurt.

    `initial` and `personalized` each hold loss, accuracy, accuracy_std (population), accuracy_p10, _p50 and _p90.
    `fraction_hurt` is the share of clients whose accuracy fell by adapting. Raises ValueError without clients.
    """
    if not scores:
        raise ValueError("no client was scored")
    hurt = sum(score.personalized_accuracy < score.initial_accuracy for score in scores)
    return {
        "clients": len(scores),
        "initial": _spread([score.initial_loss for score in scores], [score.initial_accuracy for score in scores]),
        "personalized": _spread(
            [score.personalized_loss for score in scores], [score.personalized_accuracy for score in scores]
        ),
        "fraction_hurt": hurt / len(scores),
    }


def _spread(losses: list[float], accuracies: list[float]) -> dict[str, float]:
    p10, p50, p90 = np.percentile(accuracies, [10, 50, 90])
    return {
        "loss": math.fsum(losses) / len(losses),
        "accuracy": math.fsum(accuracies) / len(accuracies),
        "accuracy_std": float(np.std(accuracies)),
        "accuracy_p10": float(p10),
        "accuracy_p50": float(p50),
        "accuracy_p90": float(p90),
    }
