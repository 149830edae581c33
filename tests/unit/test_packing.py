"""Packing loses nothing, whatever the bits, and unpacking believes nothing."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multi_process.fedlab_adapter import BytePackage, MessageCode, split_content
from multi_process.messages import from_package
from multi_process.packing import pack, unpack
from perfedavg.aggregation.exact_mean import ExactMean

ENDS = (0, 1, -1, 2**62, -(2**62), 2**63 - 1, -(2**63))


@given(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from(ENDS)), min_size=1, max_size=20))
def test_what_is_unpacked_is_what_was_packed(numbers: list[int]) -> None:
    entries = torch.tensor(numbers, dtype=torch.int64)
    assert torch.equal(unpack(pack(entries), len(entries)), entries)


def test_a_sum_takes_less_than_half() -> None:
    """Its updates are float32, far below the bound, and a part of them is zero."""
    torch.manual_seed(0)
    running = ExactMean.zeros(100_000, 1000)
    for weight in (100, 150, 80):
        update = torch.randn(100_000) * 1e-3
        update[:20_000] = 0
        running.add(update, weight)
    assert len(pack(running.total)) < running.total.nbytes / 2


def package(packed: torch.Tensor, num_entries: object, num_bytes: object) -> list[torch.Tensor]:
    values = {"weight": 1, "capacity": 1, "reports": [], "total": {"$packed": [num_entries, num_bytes]}, "states": {}}
    header = json.dumps({"kind": "PartialSum", "values": values}).encode()
    sent = BytePackage(MessageCode.GradientUpdate, header, [packed])
    return split_content(sent.slices, sent.content)


@pytest.mark.parametrize(
    ("num_entries", "num_bytes"),
    [(10**15, None), (-1, None), (0, None), (2.5, None), ("8", None), (7, None), (9, None), (8, 0), (8, -8), (8, "8")],
)
def test_a_size_that_is_not_that_of_what_was_packed_is_refused(num_entries: object, num_bytes: object) -> None:
    """Before memory is taken for it: a few bytes may say that they unpack to any number of them."""
    packed = pack(torch.arange(8))
    content = package(packed, num_entries, len(packed) if num_bytes is None else num_bytes)
    with pytest.raises(ValueError, match="is not a message of protocol"):
        from_package(MessageCode.GradientUpdate, content, 1000)


def test_what_is_not_packed_is_refused() -> None:
    content = package(torch.arange(32, dtype=torch.int8), 8, 32)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        from_package(MessageCode.GradientUpdate, content, 1000)


@pytest.mark.parametrize("most_bytes", [127, 128])
def test_what_is_packed_may_not_add_up_to_more_than_the_message_may_have(most_bytes: int) -> None:
    """A thousand vectors of zeros take next to no bytes, and each may be as long as the message."""
    packed = pack(torch.zeros(8, dtype=torch.int64))
    marks = {name: {"$packed": [8, len(packed)]} for name in "ab"}
    header = json.dumps({"kind": "KeptStates", "values": {"states": {"1": marks}}}).encode()
    sent = BytePackage(MessageCode.ParameterUpdate, header, [packed, packed])
    content = split_content(sent.slices, sent.content)
    with pytest.raises(ValueError, match="no such size") if most_bytes < 128 else contextlib.nullcontext():
        from_package(MessageCode.ParameterUpdate, content, most_bytes)
