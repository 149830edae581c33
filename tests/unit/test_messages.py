"""A message must arrive as it was sent, bit for bit: a client id or an update that is rounded on the way is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fedlab.core.communicator import Package
from fedlab.utils import MessageCode
from helpers import make_config
from hypothesis import given
from hypothesis import strategies as st

from multi_process.messages import (
    ClientsScored,
    ClientsTrained,
    Configure,
    Failed,
    Finish,
    Join,
    Message,
    Ready,
    ScoreClients,
    TrainClients,
    from_package,
    to_package,
)
from perfedavg.config import ExperimentConfig

ids = st.lists(st.integers(0, 2**62), max_size=5).map(lambda values: torch.tensor(values, dtype=torch.int64))
counts = st.integers(0, 7)


def travel(message: Message) -> Message:
    """Through a FedLab package and back, as the network does it."""
    package = to_package(message)
    return from_package(MessageCode(int(package.header[3])), Package.parse_content(package.slices, package.content))


def assert_equal(sent: Message, received: Message) -> None:
    assert type(received) is type(sent)
    for field in dataclasses.fields(sent):
        before, after = getattr(sent, field.name), getattr(received, field.name)
        if isinstance(before, torch.Tensor):
            assert after.dtype == before.dtype
            assert torch.equal(after, before)
        else:
            assert after == before


@given(ids, counts)
def test_a_rounds_work_arrives_as_it_was_sent(client_ids: torch.Tensor, num_parameters: int) -> None:
    parameters = torch.arange(num_parameters, dtype=torch.float32) * 1e-30
    assert_equal(sent := TrainClients(1, 2**40, 7, client_ids, parameters), travel(sent))
    assert_equal(sent2 := ScoreClients(2, 3, client_ids, parameters), travel(sent2))


@given(ids, counts)
def test_answers_arrive_as_they_were_sent(client_ids: torch.Tensor, num_parameters: int) -> None:
    losses = torch.linspace(0, 1, len(client_ids), dtype=torch.float64) / 3
    total = torch.full((num_parameters,), -(2**62) + 1)
    sent = ClientsTrained(2**33, 2**34, client_ids, client_ids, losses, total)
    assert_equal(sent, travel(sent))
    scored = ClientsScored(client_ids.view(-1, 1).expand(-1, 3), losses.view(-1, 1).expand(-1, 4))
    assert_equal(scored, travel(scored))


@pytest.mark.parametrize(
    "message",
    [
        Join("a machine", 2, None),
        Configure(make_config().to_dict(), 2),
        Ready("abc", "cpu"),
        Failed("ein Fehler: ä"),
        Finish(),
    ],
)
def test_messages_without_tensors_arrive_as_they_were_sent(message: Message) -> None:
    received = travel(message)
    if isinstance(message, Configure) and isinstance(received, Configure):
        assert ExperimentConfig.from_dict(received.experiment) == make_config()
    else:
        assert_equal(message, received)


def test_what_is_not_a_message_is_refused() -> None:
    with pytest.raises(ValueError, match="no content"):
        from_package(MessageCode.SetUp, [])
    with pytest.raises(ValueError, match="not a message"):
        from_package(MessageCode.SetUp, [torch.arange(8, dtype=torch.int8)])
    package = to_package(Finish())
    with pytest.raises(ValueError, match="Finish message came with code SetUp"):
        from_package(MessageCode.SetUp, Package.parse_content(package.slices, package.content))
