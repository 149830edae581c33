"""The sum of a cohort must not depend on who added what first: otherwise the model depends on the worker count."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perfedavg.aggregation.base import Aggregation, RefusedUpdateError
from perfedavg.aggregation.exact_mean import MAX_ENTRY, ExactMean

Update = tuple[list[float], int]
entries = st.floats(-MAX_ENTRY, MAX_ENTRY, width=32)
updates = st.lists(st.tuples(st.lists(entries, min_size=3, max_size=3), st.integers(1, 1000)), min_size=1, max_size=8)


def mean_of(parts: list[Update], capacity: int) -> ExactMean:
    result = ExactMean.zeros(3, capacity)
    for values, weight in parts:
        result.add(torch.tensor(values), weight)
    return result


@given(updates, st.randoms(use_true_random=False), st.integers(0, 8))
def test_any_order_and_any_cut_give_the_same_bits(parts: list[Update], shuffler: random.Random, cut: int) -> None:
    capacity = sum(weight for _, weight in parts)
    expected = mean_of(parts, capacity)
    shuffled = list(parts)
    shuffler.shuffle(shuffled)
    one, other = mean_of(shuffled[:cut], capacity), mean_of(shuffled[cut:], capacity)
    other.merge(one)
    assert torch.equal(other.total, expected.total)
    assert other.weight == expected.weight
    assert torch.equal(other.finish(), expected.finish())


@given(updates)
def test_mean_is_the_weighted_mean(parts: list[Update]) -> None:
    """Each product is rounded to a grid of 2**-fraction_bits, so the mean is off by at most half a unit a client."""
    weights = torch.tensor([weight for _, weight in parts], dtype=torch.float64)
    vectors = torch.tensor([values for values, _ in parts], dtype=torch.float64)
    result = mean_of(parts, int(weights.sum()))
    expected = (weights @ vectors) / weights.sum()
    bound = len(parts) * 2.0**-result.fraction_bits + 1e-15 * MAX_ENTRY
    torch.testing.assert_close(result.finish(torch.float64), expected, rtol=1e-12, atol=bound)


def test_the_largest_cohort_of_the_largest_updates_does_not_overflow() -> None:
    capacity = 2**28
    result = ExactMean.zeros(1, capacity)
    for _ in range(4):
        result.add(torch.tensor([-MAX_ENTRY]), capacity // 4)
    assert result.finish().item() == -MAX_ENTRY


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1.001 * MAX_ENTRY])
def test_an_update_that_cannot_be_added_is_refused_by_its_client(value: float) -> None:
    with pytest.raises(RefusedUpdateError, match="client 17"):
        Aggregation().before_add(torch.tensor([0.0, value, 0.0]), 3, client_id=17)
    with pytest.raises(RefusedUpdateError, match=r"client 2.*shape"):
        Aggregation().before_add(torch.zeros(4), 3, client_id=2)


def test_what_does_not_belong_is_refused() -> None:
    result = ExactMean.zeros(3, 10)
    with pytest.raises(ValueError, match="weight of 11 on top of 0"):
        result.add(torch.zeros(3), 11)
    with pytest.raises(ValueError, match="same round"):
        result.merge(ExactMean.zeros(3, 11))
    with pytest.raises(ValueError, match="no updates"):
        result.finish()
    with pytest.raises(ValueError, match="total weight"):
        ExactMean.zeros(3, 2**28 + 1)
