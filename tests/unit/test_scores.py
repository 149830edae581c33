"""The summary is what every figure of the project is made of."""

from __future__ import annotations

import pytest

from perfedavg.scores import ClientScore, summarize


def test_every_client_counts_once_whatever_its_size() -> None:
    scores = [
        ClientScore(7, 1000, 500, 2.0, 0.25, 1.0, 0.75),
        ClientScore(8, 10, 2, 1.0, 0.5, 1.5, 0.0),
        ClientScore(9, 10, 2, 0.0, 1.0, 0.5, 1.0),
        ClientScore(10, 10, 2, 5.0, 0.25, 1.0, 0.25),
    ]
    summary = summarize(scores)
    assert summary["clients"] == 4
    assert summary["initial"]["loss"] == 2.0
    assert summary["initial"]["accuracy"] == 0.5
    assert summary["personalized"] == {
        "loss": 1.0,
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
