"""The sum of a cohort must not depend on who added what first: otherwise the model depends on the worker count."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perfedavg.aggregation.exact_sum import MAX_ENTRY, ExactSum

Update = tuple[list[float], int]
entries = st.floats(-MAX_ENTRY, MAX_ENTRY, width=32)
updates = st.lists(st.tuples(st.lists(entries, min_size=3, max_size=3), st.integers(1, 1000)), min_size=1, max_size=8)


def exact_sum(parts: list[Update], capacity: int) -> ExactSum:
    result = ExactSum.zeros(3, capacity)
    for client_id, (values, weight) in enumerate(parts):
        result.add(torch.tensor(values), weight, client_id)
    return result


@given(updates, st.randoms(use_true_random=False), st.integers(0, 8))
def test_any_order_and_any_cut_give_the_same_bits(parts: list[Update], shuffler: random.Random, cut: int) -> None:
    capacity = sum(weight for _, weight in parts)
    expected = exact_sum(parts, capacity)
    shuffled = list(parts)
    shuffler.shuffle(shuffled)
    one, other = exact_sum(shuffled[:cut], capacity), exact_sum(shuffled[cut:], capacity)
    other.merge(one)
    assert torch.equal(other.total, expected.total)
    assert other.weight == expected.weight
    assert torch.equal(other.mean(), expected.mean())


@given(updates)
def test_mean_is_the_weighted_mean(parts: list[Update]) -> None:
    """Each product is rounded to a grid of 2**-fraction_bits, so the mean is off by at most half a unit a client."""
    weights = torch.tensor([weight for _, weight in parts], dtype=torch.float64)
    vectors = torch.tensor([values for values, _ in parts], dtype=torch.float64)
    result = exact_sum(parts, int(weights.sum()))
    expected = (weights @ vectors) / weights.sum()
    bound = len(parts) * 2.0**-result.fraction_bits + 1e-15 * MAX_ENTRY
    torch.testing.assert_close(result.mean(torch.float64), expected, rtol=1e-12, atol=bound)


def test_the_largest_cohort_of_the_largest_updates_does_not_overflow() -> None:
    capacity = 2**28
    result = ExactSum.zeros(1, capacity)
    for client_id in range(4):
        result.add(torch.tensor([-MAX_ENTRY]), capacity // 4, client_id)
    assert result.mean().item() == -MAX_ENTRY


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1.001 * MAX_ENTRY])
def test_a_bad_update_is_refused_by_its_client_and_adds_nothing(value: float) -> None:
    result = exact_sum([([1.0, 2.0, 3.0], 5)], capacity=10)
    before = result.total.clone()
    with pytest.raises(ValueError, match="client 17"):
        result.add(torch.tensor([0.0, value, 0.0]), 5, client_id=17)
    assert torch.equal(result.total, before)
    assert result.weight == 5


def test_what_does_not_belong_is_refused() -> None:
    result = ExactSum.zeros(3, 10)
    with pytest.raises(ValueError, match=r"client 2.*shape"):
        result.add(torch.zeros(4), 1, client_id=2)
    with pytest.raises(ValueError, match=r"client 2.*weight 11"):
        result.add(torch.zeros(3), 11, client_id=2)
    with pytest.raises(ValueError, match="same round"):
        result.merge(ExactSum.zeros(3, 11))
    with pytest.raises(ValueError, match="no updates"):
        result.mean()
    with pytest.raises(ValueError, match="total weight"):
        ExactSum.zeros(3, 2**28 + 1)
