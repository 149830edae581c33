"""A worker asked for what cannot be says so in a line, and computes nothing: it may have met somebody else's server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from helpers import Difference, QuadraticClients, make_config

from multi_process.messages import AssignGroups, Configure, Message, RequestPartialSum, StartScoring, StartTraining
from multi_process.worker import WorkerManager
from perfedavg import own_module

CLIENTS = QuadraticClients([[0.0, 0.0]] * 5, [4, 5, 6, 7, 8], num_unseen=1)
TICKET = "a ticket"
CONFIGURE = Configure(TICKET, make_config(num_clients=5).to_dict(), 1)
TRAIN = StartTraining(1, 1, 22, torch.zeros(2))
SCORE = StartScoring(1, 1, 0, torch.zeros(2))


class Script:
    """In place of a network and its link: a server that says one thing after the other, whatever it hears."""

    rank, ticket, address = 1, TICKET, ("127.0.0.1", 3002)

    def __init__(self, said: Sequence[Message]) -> None:
        self.peer = self
        self._said = iter(said)

    def receive(self) -> Message:
        return next(self._said)

    def send(self, message: Message) -> None:
        pass

    def drain(self, timeout_seconds: float) -> None:
        pass

    def init_network_connection(self) -> None:
        pass


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([Configure("another", CONFIGURE.experiment, 1)], "is not the server"),
        ([TRAIN], "is not the server"),
        ([Configure(TICKET, {}, 1)], "dataset"),
        ([Configure(TICKET, {**CONFIGURE.experiment, "fedavg": 3}, 1)], "fedavg"),
        ([Configure(TICKET, {**CONFIGURE.experiment, "seed": "zero"}, 1)], "seed"),
        ([replace(CONFIGURE, sources={"my_method": "1" * 64})], "the code of my_method is not the server's; give both"),
        ([replace(CONFIGURE, sources={"not_here": "1" * 64}), TRAIN, TRAIN, CONFIGURE], "Configure where"),
        ([CONFIGURE, AssignGroups([[0]])], "AssignGroups where work was expected"),
        ([CONFIGURE, RequestPartialSum()], "RequestPartialSum where work was expected"),
        ([CONFIGURE, SCORE, RequestPartialSum()], "RequestPartialSum where work was expected"),
        ([CONFIGURE, CONFIGURE], "Configure where work was expected"),
        ([CONFIGURE, StartTraining(1, 1, 22, torch.zeros(3))], "phase 1 with 3 parameters"),
        ([CONFIGURE, StartScoring(1, 1, 0, torch.zeros(0))], "phase 1 with 0 parameters"),
        ([CONFIGURE, StartTraining(7, 1, 22, torch.zeros(2))], "phase 7 with 2 parameters"),
    ],
)
def test_a_worker_refuses_what_cannot_be(said: list[Message], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end of a run with a line for the user, not in an error of whatever came to use it."""
    monkeypatch.setattr(own_module, "_sources", {"my_method": "0" * 64})
    worker = WorkerManager(
        cast(Any, Script(said)),
        lambda config: (Difference([0.0, 0.0]), CLIENTS),
        torch.device("cpu"),
        1,
    )
    with pytest.raises(ValueError, match=reason):
        worker.run()
