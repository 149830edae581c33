"""A message must arrive as it was sent, bit for bit: a client id or an update that is rounded on the way is wrong."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from helpers import make_config
from hypothesis import given
from hypothesis import strategies as st

from multi_process import messages
from multi_process.boundary import MAX_LINES, clean_text
from multi_process.fedlab_adapter import BytePackage, MessageCode, read_header, split_content
from multi_process.messages import (
    AssignGroups,
    Configure,
    ControlMessage,
    Failed,
    Finish,
    GroupScored,
    GroupTrained,
    Join,
    KeptStates,
    Message,
    PartialSum,
    Ready,
    RequestPartialSum,
    StartScoring,
    StartTraining,
    from_line,
    from_package,
    to_line,
    to_package,
)
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import ClientReport
from perfedavg.settings import ExperimentConfig

IDS = st.integers(0, 2**62)
COUNTS = st.integers(1, 7)
FLOATS = st.floats(allow_nan=False)
TEXTS = st.text(max_size=60)
LINES = TEXTS.map(clean_text)
SECONDS = st.floats(0, 1e9)


def float_tensors() -> st.SearchStrategy[torch.Tensor]:
    """Every bit pattern of a float32, those that are not numbers included."""
    return st.lists(st.integers(0, 2**32 - 1), max_size=7).map(
        lambda bits: torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    )


def int_tensors() -> st.SearchStrategy[torch.Tensor]:
    return st.lists(st.integers(-(2**63), 2**63 - 1), max_size=7).map(lambda v: torch.tensor(v, dtype=torch.int64))


REPORTS = st.builds(ClientReport, IDS, COUNTS, FLOATS, SECONDS, st.one_of(st.none(), LINES))
VALUES = st.dictionaries(TEXTS, FLOATS, max_size=3)
SCORES = st.builds(ClientScore, IDS, COUNTS, COUNTS, VALUES, VALUES, st.lists(VALUES, max_size=3).map(tuple))
STATES = st.dictionaries(IDS, st.dictionaries(TEXTS, st.one_of(float_tensors(), int_tensors()), max_size=3), max_size=3)
GROUPS = st.lists(st.lists(IDS, min_size=1, max_size=3), min_size=1, max_size=5)
ROUNDS = st.integers(1, 2**40)
KINDS: dict[type[Message], st.SearchStrategy[Any]] = {
    Join: st.builds(
        Join,
        TEXTS,
        TEXTS,
        COUNTS,
        st.one_of(st.none(), COUNTS),
        st.sampled_from(["cpu", "cuda"]),
        st.integers(0, 2**40),
        st.dictionaries(LINES, LINES, max_size=MAX_LINES),
    ),
    Configure: st.builds(Configure, TEXTS, st.dictionaries(TEXTS, st.one_of(FLOATS, TEXTS)), COUNTS),
    Ready: st.builds(Ready, TEXTS, LINES, st.lists(LINES, max_size=3)),
    StartTraining: st.builds(StartTraining, st.integers(1, 2), ROUNDS, st.integers(1, 2**28), float_tensors()),
    StartScoring: st.builds(StartScoring, st.integers(1, 2), ROUNDS, st.integers(0, 9), float_tensors()),
    KeptStates: st.builds(KeptStates, STATES),
    AssignGroups: st.builds(AssignGroups, GROUPS),
    GroupTrained: st.builds(GroupTrained, IDS),
    GroupScored: st.builds(GroupScored, st.lists(SCORES, min_size=1, max_size=3)),
    RequestPartialSum: st.builds(RequestPartialSum),
    PartialSum: st.builds(
        PartialSum,
        st.integers(0, 2**28),
        st.integers(1, 2**28),
        st.lists(REPORTS, min_size=1, max_size=3),
        int_tensors(),
        STATES,
    ),
    Failed: st.builds(Failed, LINES, st.one_of(st.none(), IDS)),
    Finish: st.builds(Finish),
}


def travel(message: Message, packs_sums: bool = False) -> Message:
    """Over the control connection or in a FedLab package, as a link does it."""
    if isinstance(message, ControlMessage):
        return from_line(json.loads(json.dumps(to_line(message), default=vars)))
    package = to_package(message, packs_sums)
    code, _, dtype = read_header(package.parts(receiver=1)[0])
    assert dtype is torch.int8
    return from_package(code, split_content(package.slices, package.content))


def bits(tensor: torch.Tensor) -> list[int]:
    integers: list[int] = tensor.view(torch.int8).tolist()
    return integers


def assert_equal(sent: Message, received: Message) -> None:
    assert type(received) is type(sent)
    for field in dataclasses.fields(sent):
        assert_equal_values(getattr(sent, field.name), getattr(received, field.name))


def assert_equal_values(before: Any, after: Any) -> None:
    if isinstance(before, torch.Tensor):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert bits(after) == bits(before)
    elif isinstance(before, dict):
        assert list(after) == list(before)
        for key, value in before.items():
            assert_equal_values(value, after[key])
    else:
        assert after == before


def test_every_kind_of_message_is_tried_below() -> None:
    assert set(KINDS) == {*messages._PACKAGED.values(), *messages._CONTROL_MESSAGES.values()}
    assert set(KINDS) == {*Message.__subclasses__(), *ControlMessage.__subclasses__()} - {ControlMessage}


@given(st.one_of(*KINDS.values()), st.booleans())
def test_messages_arrive_as_they_were_sent(message: Message, packs_sums: bool) -> None:
    assert_equal(message, travel(message, packs_sums))


def test_the_experiment_that_arrives_is_the_servers() -> None:
    """Nothing of it may be lost, or a worker trains with another hyper-parameter."""
    received = travel(Configure("ticket", make_config().to_dict(), 2))
    assert isinstance(received, Configure)
    assert ExperimentConfig.from_dict(received.experiment) == make_config()


@pytest.mark.parametrize("size", range(1, 9))
def test_tensors_arrive_whatever_the_length_of_the_header_before_them(size: int) -> None:
    """Their bytes can be read only where they begin at a multiple of eight."""
    sent = StartTraining(1, 10**size, 1, torch.arange(3, dtype=torch.float32))
    assert_equal(sent, travel(sent))


def test_a_part_of_a_tensor_is_sent_as_that_part() -> None:
    sent = StartScoring(1, 1, 0, torch.arange(10, dtype=torch.float32)[::3])
    received = travel(sent)
    assert isinstance(received, StartScoring)
    assert received.parameters.tolist() == [0, 3, 6, 9]


def package_of(header: dict[str, Any], *tensors: torch.Tensor) -> list[torch.Tensor]:
    package = BytePackage(MessageCode.SetUp, json.dumps(header).encode(), tensors)
    return split_content(package.slices, package.content)


def scoring(*tensor: Any) -> dict[str, Any]:
    """The header of a StartScoring with this in place of its parameters' type and shape."""
    values = {"phase": 1, "round_number": 1, "num_curve_epochs": 0, "parameters": {"$tensor": tensor}}
    return {"kind": "StartScoring", "values": values}


FOUR = torch.zeros(4, dtype=torch.float32)


def test_the_headers_below_are_refused_for_what_is_wrong_with_them() -> None:
    with pytest.raises(ValueError, match="came with code SetUp"):
        from_package(MessageCode.SetUp, package_of(scoring("float32", [4]), FOUR))


@pytest.mark.parametrize(
    "content",
    [
        [torch.arange(8, dtype=torch.int8)],
        package_of({}),
        package_of({"kind": "Nothing", "values": {}}),
        package_of({"kind": "Finish", "values": {"extra": 1}}),
        package_of({"kind": "Ready", "values": {}}),
        package_of({"kind": "GroupTrained", "values": {"first": 1}}),
        package_of({"kind": "Finish", "values": {}}, FOUR),
        package_of(scoring("float32", [4])),
        package_of(scoring("float32", [5]), FOUR),
        package_of(scoring("float32", [2]), FOUR),
        package_of(scoring("float32", [-4]), FOUR),
        package_of(scoring("float32", [2, 2]), FOUR),
        package_of(scoring("float32", 4), FOUR),
        package_of(scoring("float32", ["4"]), FOUR),
        package_of(scoring("float32", [2**70]), FOUR),
        package_of(scoring("float32"), FOUR),
        package_of(scoring("load", [4]), FOUR),
        package_of(scoring(["float32"], [4]), FOUR),
        package_of(scoring("int64", [2]), FOUR),
    ],
)
def test_what_is_not_a_message_is_refused(content: list[torch.Tensor]) -> None:
    """With the one error for which a worker is dropped, not with another that would end the server."""
    with pytest.raises(ValueError, match="a package with code SetUp is not a message of protocol"):
        from_package(MessageCode.SetUp, content)


@pytest.mark.parametrize(
    "fields",
    [
        {"control": "Nothing", "values": {}},
        {"control": ["GroupTrained"], "values": {"first": 1}},
        {"control": "GroupTrained", "values": {}},
        {"control": "GroupTrained", "values": {"first": 1, "extra": 1}},
        {"control": "GroupTrained", "values": 1},
        {"control": "GroupTrained"},
        {"control": "Finish", "values": {}},
    ],
)
def test_a_line_that_is_not_a_control_message_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a line is not a control message of protocol"):
        from_line(fields)


def test_a_package_that_is_empty_or_comes_with_another_code_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a message"):
        from_package(MessageCode.SetUp, [])
    package = to_package(Finish())
    with pytest.raises(ValueError, match="Finish message came with code SetUp"):
        from_package(MessageCode.SetUp, split_content(package.slices, package.content))
