"""How sure a mean is: closed forms, and how often the interval holds the true mean."""

from __future__ import annotations

import numpy as np
import pytest

from reporting.intervals import confidence_interval, mean_over_seeds, t_quantile


@pytest.mark.parametrize(
    ("degrees", "value"),
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799), (100_000, 1.9600)],
)
def test_the_quantile_is_that_of_printed_tables(degrees: int, value: float) -> None:
    assert t_quantile(degrees) == pytest.approx(value, abs=5e-5)


def test_the_interval_of_one_seed_is_that_of_the_mean_over_clients() -> None:
    """Student's t over clients, by hand: mean 2 and deviation sqrt(2.5) of 1, 2, 3, 0, 4, times t of 4 degrees."""
    (lowest,), (highest,) = confidence_interval([np.array([[1.0], [2.0], [3.0], [0.0], [4.0]])])
    half_width = 2.7764 * np.sqrt(2.5 / 5)
    assert (lowest, highest) == pytest.approx((2 - half_width, 2 + half_width), abs=1e-4)


def test_a_single_client_has_no_interval() -> None:
    assert np.isnan(confidence_interval([np.ones((1, 2))])).all()


def test_the_interval_of_several_seeds_covers_how_they_differ() -> None:
    """Clients of a seed share its model: a thousand of them say little where two seeds differ much."""
    seeds = [np.full((1000, 1), value) for value in (0.0, 1.0)]
    (lowest,), (highest,) = confidence_interval(seeds)
    assert (lowest, highest) == pytest.approx((0.5 - 12.7062 / 2, 0.5 + 12.7062 / 2), abs=1e-4)


def test_seeds_that_agree_by_chance_are_no_surer_than_their_clients() -> None:
    """Their means are the same; the draw of 200 clients of deviation 1 is 1.97 / sqrt(200) on either side."""
    seeds = [np.tile([[-1.0], [1.0]], (50, 1)), np.tile([[1.0], [-1.0]], (50, 1))]
    (lowest,), (highest,) = confidence_interval(seeds)
    half_width = t_quantile(198) / np.sqrt(198)
    assert (lowest, highest) == pytest.approx((-half_width, half_width))


def test_columns_are_taken_by_themselves() -> None:
    values = np.random.default_rng(0).normal(size=(50, 1))
    both = confidence_interval([np.hstack([values, 2 * values]), np.hstack([values + 1, values])])
    np.testing.assert_allclose(both[:, :1], confidence_interval([values, values + 1]))


@pytest.mark.parametrize(("num_seeds", "seed_deviation"), [(2, 1.0), (3, 1.0), (5, 1.0), (3, 0.0), (1, 0.0)])
def test_at_least_95_percent_hold_the_true_mean(num_seeds: int, seed_deviation: float) -> None:
    """Of 5,000 trials, side by side as columns; with three standard errors to spare. Too wide would be useless."""
    generator = np.random.default_rng(1)
    seeds = [
        generator.normal(0, seed_deviation, 5000) + generator.normal(0, 2, size=(30, 5000)) for _ in range(num_seeds)
    ]
    assert mean_over_seeds(seeds).shape == (5000,)
    lowest, highest = confidence_interval(seeds)
    held = np.mean((lowest <= 0) & (highest >= 0))
    assert 0.94 < held < (0.97 if seed_deviation else 1.0)
