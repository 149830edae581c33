"""A server's pool of workers without processes: members that answer at once, on a clock that only the tests move.

What they say arrives as it does from a peer, as the bytes of a package or the fields of a line; so a faulty one may say
anything.
"""

from __future__ import annotations

import heapq
import itertools
import json
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from helpers import QuadraticClients, basic, make_config
from torch import Tensor

from multi_process import messages, server, work_item
from multi_process.fedlab_adapter import BytePackage, MessageCode, split_content
from multi_process.messages import (
    AssignGroups,
    Configure,
    Message,
    RequestPartialSum,
    StartScoring,
    StartTraining,
    from_line,
    from_package,
)
from multi_process.server import WorkerPool
from multi_process.transport.peer import PeerLostError
from multi_process.transport.server_network import ConnectedWorker
from perfedavg.aggregation.exact_mean import ExactMean
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask
from perfedavg.settings import Phase

NUM_PARAMETERS = 3
SIZES = (5, 3, 8, 2, 9, 4, 7, 6)
"""Training examples of each client; the last two are unseen."""
NUM_UNSEEN = 2
CLIENTS = QuadraticClients([[0.0] * NUM_PARAMETERS] * len(SIZES), SIZES, NUM_UNSEEN)
COHORT = tuple(CLIENTS.train_client_ids)
UNSEEN = tuple(CLIENTS.unseen_client_ids)
MAX_GETS = 100_000
"""Looks at the queue of events, above what any run here takes."""
Values = dict[str, Any]
Event = tuple[ConnectedWorker, Message | Exception]


def update_of(client_id: int) -> Tensor:
    return torch.tensor([client_id + 1.0, -client_id / 8, 0.5])


def sum_over(client_ids: Sequence[int], capacity: int) -> ExactMean:
    running = ExactMean.zeros(NUM_PARAMETERS, capacity)
    for client_id in client_ids:
        running.add(update_of(client_id), SIZES[client_id])
    return running


def arrive(kind: str, values: Values) -> Message | Exception:
    """What the server has of a message: one of the protocol, or the error that says that it is none."""
    try:
        if kind in messages._CONTROL_MESSAGES:
            return from_line({"control": kind, "values": json.loads(json.dumps(values))})
        return from_package(getattr(messages, kind).code, package_of(kind, values))
    except ValueError as error:
        return error


def package_of(kind: str, values: Values) -> list[Tensor]:
    """The tensors of the package that carries a message of any fields."""
    tensors: list[Tensor] = []

    def plain(tensor: Tensor) -> Values:
        tensors.append(tensor)
        return {"$tensor": [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]}

    header = json.dumps({"kind": kind, "values": values}, default=plain)
    return package_of_bytes(header, *tensors)


def package_of_bytes(header: str, *tensors: Tensor) -> list[Tensor]:
    package = BytePackage(MessageCode.SetUp, header.encode(), tensors)
    return split_content(package.slices, package.content)


class Member:
    """A worker, and the server's end of its link. This one is honest.

    seconds: that a client takes.  told: how the server parted with it, `dropped` or `dismissed`, and why.
    """

    def __init__(self, rank: int = 1, seconds: float = 1.0) -> None:
        self.rank = rank
        self.seconds = seconds
        self.told: tuple[str | None, str] | None = None
        self.lost_reason: Exception | None = None
        self.heard: list[Message] = []
        self._trained: list[int] = []
        self._busy_until = 0.0
        self._start: StartTraining | StartScoring | None = None

    def connect(self, run: Pool, generation: int) -> None:
        self._run = run
        self.connected = ConnectedWorker(cast(Any, self), self.rank, generation, f"ticket {generation}", "")
        self.say("Join", **self.join_values())

    def join_values(self) -> Values:
        own = {"ticket": self.connected.ticket, "machine": f"machine {self.rank}", "num_cores": 1, "threads": 1}
        return {**own, "device_kind": "cpu", "device_memory_bytes": 0, "kernels": {"torch": "2"}}

    def say(self, kind: str, *, at: float | None = None, **values: Any) -> None:
        """Now, or at a later time."""
        self._run.put(self.connected, self._run.clock.now if at is None else at, arrive(kind, values))

    def leave(self, at: float, reason: str = "the connection was closed") -> None:
        self._run.put(self.connected, at, PeerLostError(f"worker {self.rank}", reason))

    def answer(self, message: Message) -> None:
        match message:
            case Configure():
                self.say("Ready", fingerprint=CLIENTS.fingerprint, device="cpu", warnings=[])
            case StartTraining() | StartScoring():
                self._start, self._trained = message, []
            case AssignGroups():
                for group in message.groups:
                    self.work_on(group, self._next_end())
            case RequestPartialSum():
                self.send_sum()

    def work_on(self, group: list[int], end: float) -> None:
        if isinstance(self._start, StartTraining):
            self._trained += group
            self.say("GroupTrained", at=end, first=group[0])
        else:
            self.say("GroupScored", at=end, scores=[self.score_values(client_id) for client_id in group])

    def send_sum(self) -> None:
        assert isinstance(self._start, StartTraining)
        part = sum_over(self._trained, self._start.capacity)
        reports = [self.report_values(client_id) for client_id in self._trained]
        self._trained = []
        self.say("PartialSum", weight=part.weight, capacity=part.capacity, reports=reports, total=part.total)

    def report_values(self, client_id: int) -> Values:
        return {
            "client_id": client_id,
            "num_examples": SIZES[client_id],
            "loss": client_id + 0.5,
            "seconds": self.seconds,
            "refused": None,
        }

    def score_values(self, client_id: int) -> Values:
        assert isinstance(self._start, StartScoring)
        curve = [basic(1.0, 0.25)] * (self._start.num_curve_epochs + 1) if self._start.num_curve_epochs else []
        return {
            "client_id": client_id,
            "num_train_examples": SIZES[client_id],
            "num_test_examples": 1,
            "initial": basic(1.0 + client_id, 0.25),
            "personalized": basic(0.5, 0.75),
            "by_epoch": curve,
        }

    def _next_end(self) -> float:
        self._busy_until = max(self._busy_until, self._run.clock.now) + self.seconds
        return self._busy_until

    # What follows is what the pool uses of a peer.

    def send(self, message: Message) -> None:
        self.heard.append(message)
        self.answer(message)

    def close(self, reason: str, farewell: str | None = None) -> None:
        if self.told is None:
            self.told, self.lost_reason = (farewell, reason), PeerLostError(f"worker {self.rank}", reason)

    def drain(self, timeout_seconds: float) -> None:
        pass


class Faulty(Member):
    """A member that says something else than an honest one, at certain words of its.

    tamper: is given what an honest one would say, and returns what this one says: (kind, fields), or None for nothing.
    """

    def __init__(self, tamper: Callable[[str, Values], tuple[str, Values] | None], rank: int = 2) -> None:
        super().__init__(rank)
        self._tamper = tamper

    def say(self, kind: str, *, at: float | None = None, **values: Any) -> None:
        said = self._tamper(kind, values)
        if said is not None:
            super().say(said[0], at=at, **said[1])


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Pool:
    """The server's pool with its first members, ready to work. It is also what the pool uses of a network.

    num_first: of the members, those to start with; the others come then.  said: the lines for the user.
    """

    address = ("127.0.0.1", 3002)
    is_over = False
    num_refused_for_room = 0

    def __init__(self, members: Sequence[Member], num_first: int | None = None, wait_seconds: float = 300.0) -> None:
        self.clock = Clock()
        self.said: list[str] = []
        self.members = members
        self.world_size = 1 + (len(members) if num_first is None else num_first)
        self.events = self
        self._pending: list[tuple[float, int, Event]] = []
        self._order, self._generations = itertools.count(), itertools.count(1)
        self._wait_seconds = wait_seconds
        self._num_gets = 0

    def start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (server, work_item):
            monkeypatch.setattr(module, "time", self.clock)
        monkeypatch.setattr(server, "say", self.said.append)
        config = make_config()
        pool = WorkerPool(
            cast(Any, self), cast(Any, CLIENTS), lambda _: config, NUM_PARAMETERS, 600.0, self._wait_seconds
        )
        for member in self.members:
            self.admit(member)
        pool.setup()
        self.pool = pool

    def admit(self, member: Member) -> None:
        member.connect(self, next(self._generations))

    def train(self, round_number: int = 1) -> CohortUpdate:
        capacity = sum(SIZES[client_id] for client_id in COHORT)
        task = CohortTask(Phase.FEDAVG, round_number, COHORT, capacity)
        return self.pool.train(task, torch.zeros(NUM_PARAMETERS))

    def score(self, num_curve_epochs: int = 0) -> list[ClientScore]:
        return self.pool.score(ScoringTask(Phase.FEDAVG, 1, UNSEEN, num_curve_epochs), torch.zeros(NUM_PARAMETERS))

    def put(self, connected: ConnectedWorker, at: float, event: Message | Exception) -> None:
        heapq.heappush(self._pending, (at, next(self._order), (connected, event)))

    def lines(self, *parts: str) -> Iterator[str]:
        """The lines with all of the parts."""
        return (line for line in self.said if all(part in line for part in parts))

    # What follows is what the pool uses of a network and of its queue.

    def init_network_connection(self) -> None:
        pass

    def get(self, timeout: float) -> Event:
        self._num_gets += 1
        assert self._num_gets < MAX_GETS, "the run never ends"
        if not self._pending or self._pending[0][0] > self.clock.now + timeout:
            self.clock.now += timeout
            raise queue.Empty
        at, _, event = heapq.heappop(self._pending)
        self.clock.now = max(self.clock.now, at)
        return event


def assert_whole(update: CohortUpdate) -> None:
    """It is that of honest members alone: to the bit, each client once, with the server's own numbers."""
    capacity = sum(SIZES[client_id] for client_id in COHORT)
    expected = sum_over(COHORT, capacity)
    assert torch.equal(update.sum.total, expected.total)
    assert update.sum.weight == capacity
    assert sorted((report.client_id, report.num_examples) for report in update.reports) == [
        (client_id, SIZES[client_id]) for client_id in COHORT
    ]
