"""The summary is what every figure of the project is made of."""

from __future__ import annotations

import math

import pytest
from helpers import basic

from perfedavg.engine.scores import ClientScore, mean, summarize


def test_every_client_counts_once_whatever_its_size() -> None:
    scores = [
        ClientScore(7, 1000, 500, basic(2.0, 0.25), basic(1.0, 0.75)),
        ClientScore(8, 10, 2, basic(1.0, 0.5), basic(1.5, 0.0)),
        ClientScore(9, 10, 2, basic(0.0, 1.0), basic(0.5, 1.0)),
        ClientScore(10, 10, 2, basic(5.0, 0.25), basic(1.0, 0.25)),
    ]
    summary = summarize(scores)
    assert summary["clients"] == 4
    assert summary["initial"]["loss"] == 2.0
    assert summary["initial"]["accuracy"] == 0.5
    assert summary["personalized"] == {
        "loss": 1.0,
        "loss_std": pytest.approx(0.125**0.5),  # deviations 0, .5, -.5, 0
        "loss_p10": pytest.approx(0.65),
        "loss_p50": pytest.approx(1.0),
        "loss_p90": pytest.approx(1.35),
        "accuracy": 0.5,
        "accuracy_std": pytest.approx((0.625 / 4) ** 0.5),  # deviations .25, -.5, .5, -.25
        "accuracy_p10": pytest.approx(0.075),
        "accuracy_p50": pytest.approx(0.5),
        "accuracy_p90": pytest.approx(0.925),
    }
    assert summary["fraction_hurt"] == 0.25


def test_no_client_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no client"):
        summarize([])


def test_means_of_what_diverged_are_no_numbers_and_no_error() -> None:
    """Infinities of both signs, and a sum beyond the largest float, which `math.fsum` refuses."""
    assert mean([1.0, 2.0, 6.0]) == 3.0
    assert math.isinf(mean([1.0, math.inf]))
    assert math.isnan(mean([math.inf, -math.inf]))
    assert math.isnan(mean([1.0, math.nan]))
    assert math.isinf(mean([1.5e308, 1.5e308]))
    curve = (basic(math.inf, 0.5), basic(math.nan, 0.25))
    other = (basic(-math.inf, 0.5), basic(1e308, 0.75))
    summary = summarize(
        [
            ClientScore(1, 10, 2, basic(math.inf, 0.5), basic(math.nan, 0.5), curve),
            ClientScore(2, 10, 2, basic(-math.inf, 0.5), basic(1.0, 0.5), other),
        ]
    )
    assert math.isnan(summary["initial"]["loss"])
    assert math.isnan(summary["by_epoch"][0]["loss_std"])
    assert summary["by_epoch"][1]["accuracy"] == 0.5
