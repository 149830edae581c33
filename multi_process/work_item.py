"""A piece of work that the pool does together: who has which of its clients, and for how long."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from multi_process.messages import (
    AssignGroups,
    GroupScored,
    GroupTrained,
    Join,
    KeptStates,
    Message,
    PartialSum,
    RequestPartialSum,
    StartScoring,
    StartTraining,
)
from multi_process.pace import LEAST_SECONDS, Pace
from multi_process.schedule import Schedule
from multi_process.transport.handshake import FinishedError
from multi_process.transport.server_network import ConnectedWorker
from perfedavg.contracts import RoundStates
from perfedavg.engine.client_states import ClientState, ClientStates, in_batches
from perfedavg.terminal.console import LOGGER


@dataclass(eq=False)
class Worker:
    """A worker as the pool knows it, from its Join until it is lost.

    num_slots: clients that it trains side by side; 0 until it is configured.
    is_ready: it may be given work.
    has_begun: it was told of the present work item.
    is_sum_requested: it was asked for the sum over the clients that it has trained.
    keeping: clients of which it delivered what they keep, before the sum that has their updates.
    ready_since: when it could begin on the present work item, on the clock of `time.monotonic`.
    progress_at: when it last delivered anything of what it has in hand, or was given it.
    is_called_slow: the user has been told that nothing has come since.
    """

    connected: ConnectedWorker
    join: Join
    num_slots: int = 0
    is_ready: bool = False
    has_begun: bool = False
    is_sum_requested: bool = False
    keeping: set[int] = field(default_factory=set)
    ready_since: float = 0.0
    progress_at: float = 0.0
    is_called_slow: bool = False

    @property
    def rank(self) -> int:
        return self.connected.rank

    @property
    def number(self) -> int:
        """By which the schedule knows it: no later worker of the same rank has the same."""
        return self.connected.generation

    def note_progress(self, now: float) -> None:
        self.progress_at, self.is_called_slow = now, False

    def send(self, message: Message) -> None:
        try:
            self.connected.peer.send(message)
        except (ConnectionError, ValueError, FinishedError):  # its end is on its way to the pool
            LOGGER.info("worker %d cannot be sent %s", self.rank, type(message).__name__)


@dataclass(eq=False)
class WorkItem:
    """A round's training, or a scoring.

    start: tells a worker of it.
    groups: of clients that are worked on at once, by the first client of each; in the order of handing out.
    num_examples: a client's training examples, by its id.
    states: what clients kept from earlier rounds.
    accept_result: takes the results that a worker's answer has, or raises ValueError and takes none.
    pace, sum_pace: how long a group takes, and sending a sum.
    lost: why each worker that was lost meanwhile is gone, by its rank.
    accept_state: takes what a client of a round keeps from now on, or raises ValueError; None where none may.
    slot_seconds: see `tasks.CohortUpdate`.
    num_given_up: times that a rank was given up in it.
    """

    start: StartTraining | StartScoring
    groups: dict[int, tuple[int, ...]]
    num_examples: Callable[[int], int]
    states: RoundStates
    accept_result: Callable[[Worker, Message], None]
    pace: Pace
    sum_pace: Pace
    lost: dict[int, str]
    accept_state: Callable[[int, ClientState], None] | None = None
    slot_seconds: float = 0.0
    num_given_up: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.schedule = Schedule(list(self.groups))
        self._first_of = {client_id: first for first, group in self.groups.items() for client_id in group}
        self._handed_out_at: dict[int, float] = {}
        self._began_at: dict[int, float] = {}
        self._in_reserve: dict[int, int] = {}
        self._num_waiting_examples = sum(map(self._size, self.groups))
        self._rate: tuple[tuple[int, int, int], float] = ((0, 0, 0), 0.0)

    def hand_out(self, workers: Sequence[Worker]) -> None:
        """Give each worker as many groups as it has slots, and one to go on with while it will come to that in time.

        Where there are fewer groups than slots, each worker gets its share, and one at least while there are any.
        Where none is left for it, ask for the sum over those that it has trained.
        """
        schedule, now = self.schedule, time.monotonic()
        examples_per_second = self._examples_per_second(workers, now)
        num_slots = sum(worker.num_slots for worker in workers)
        num_unfinished = schedule.num_unfinished  # which handing out leaves as it is
        num_idle = sum(not schedule.in_work(worker.number) for worker in workers)
        for worker in workers:
            num_in_work = len(schedule.in_work(worker.number))
            if num_in_work > worker.num_slots:
                continue  # it has one to go on with
            share = -(-num_unfinished * worker.num_slots // num_slots)
            in_hand = min(worker.num_slots, share) + self._may_have_reserve(worker, examples_per_second)
            num_others_idle = num_idle if num_in_work else num_idle - 1
            to_spare = max(schedule.num_waiting - num_others_idle, 0 if num_in_work else 1)
            firsts = schedule.take(worker.number, min(in_hand - num_in_work, to_spare))
            if firsts:
                self._note_handed_out(worker, firsts, now)
                if not num_in_work:
                    num_idle -= 1
                    worker.note_progress(now)
                if not worker.has_begun:
                    worker.send(self.start)
                    worker.has_begun = True
                groups = [list(self.groups[first]) for first in firsts]
                for batch in in_batches((id, self.states.get(id)) for group in groups for id in group):
                    worker.send(KeptStates(batch))
                worker.send(AssignGroups(groups))
            elif not num_in_work and schedule.num_done(worker.number) and not worker.is_sum_requested:
                worker.send(RequestPartialSum())
                worker.is_sum_requested = True
                worker.note_progress(now)

    def _examples_per_second(self, workers: Sequence[Worker], now: float) -> float:
        """What the workers train or score together; one of which nothing is known yet counts as the fastest of them.

        Looked at anew each second, and when others are there or known.
        """
        known = self.pace.seconds_per_example
        looked_at = (len(known), len(workers), int(now))
        if self._rate[0] != looked_at:
            fastest = min((known[worker.number] for worker in workers if worker.number in known), default=math.inf)
            rates = (worker.num_slots / max(known.get(worker.number, fastest), 1e-9) for worker in workers)
            self._rate = looked_at, sum(rates)
        return self._rate[1]

    def _may_have_reserve(self, worker: Worker, examples_per_second: float) -> bool:
        """Whether there is more waiting than all workers do while this one does two such groups.

        Only then it does not hold up the others at the end, however slow it is.
        """
        first, seconds_per_example = self.schedule.next_waiting, self.pace.seconds_per_example.get(worker.number)
        if first is None or seconds_per_example is None:
            return False
        return self._num_waiting_examples > 2 * self._size(first) * seconds_per_example * examples_per_second

    def _note_handed_out(self, worker: Worker, firsts: Sequence[int], now: float) -> None:
        self._handed_out_at.update(dict.fromkeys(firsts, now))
        self._num_waiting_examples -= sum(map(self._size, firsts))
        num_begun = worker.num_slots - (len(self.schedule.in_work(worker.number)) - len(firsts))
        self._began_at.update(dict.fromkeys(firsts[:num_begun], now))
        for first in firsts[num_begun:]:
            self._in_reserve[worker.number] = first

    def expects(self, message: Message) -> bool:
        kinds = (GroupTrained, KeptStates, PartialSum) if isinstance(self.start, StartTraining) else (GroupScored,)
        return isinstance(message, kinds)

    def take_answer(self, worker: Worker, message: Message) -> None:
        """Raises ValueError, and takes nothing of the answer, where it does not fit what was handed out."""
        if isinstance(message, GroupTrained):
            self._finish(worker, message.first)
        elif isinstance(message, KeptStates):
            self._take_states(worker, message.states)
        elif isinstance(message, PartialSum):
            firsts = self.group_keys([report.client_id for report in message.reports])
            if not worker.is_sum_requested or len(firsts) != self.schedule.num_done(worker.number):
                raise ValueError("its sum is not the one that it was asked for")
            self._take_states(worker, message.states)
            self._deliver(worker, firsts, message)
            self.sum_pace.learn(time.monotonic() - worker.progress_at)
            worker.is_sum_requested = False
        elif isinstance(message, GroupScored):
            firsts = self.group_keys([score.client_id for score in message.scores])
            for first in firsts:
                self._finish(worker, first)
            self._deliver(worker, firsts, message)
        worker.note_progress(time.monotonic())

    def _take_states(self, worker: Worker, states: ClientStates) -> None:
        for client_id, state in states.items():
            if self.accept_state is None:
                raise ValueError(f"clients {sorted(states)} have no reason to keep anything")
            if not self.schedule.is_at(worker.number, self._first_of.get(client_id)):
                raise ValueError(f"client {client_id} keeps something, but was not handed out to it")
            self.accept_state(client_id, state)
            worker.keeping.add(client_id)

    def group_keys(self, client_ids: Sequence[int]) -> list[int]:
        """The first clients of the groups that these clients are. Raises ValueError where a group is not whole."""
        firsts = [client_id for client_id in client_ids if client_id in self.groups]
        whole = [client_id for first in firsts for client_id in self.groups[first]]
        if sorted(whole) != sorted(client_ids):
            raise ValueError(f"clients {sorted(set(whole) ^ set(client_ids))} were not delivered as their group")
        return firsts

    def _finish(self, worker: Worker, first: int) -> None:
        self.schedule.finish(worker.number, first)
        now, reserve = time.monotonic(), self._in_reserve.pop(worker.number, None)
        self.pace.learn(now - self._handed_out_at[first], self._size(first))
        if first != reserve:
            self.pace.learn_of(worker.number, now - self._began_at[first], self._size(first))
        if reserve is not None:
            self._began_at[reserve] = now

    def _deliver(self, worker: Worker, firsts: Sequence[int], message: Message) -> None:
        self.schedule.check_done(worker.number, firsts)
        self.accept_result(worker, message)
        self.schedule.deliver(worker.number, firsts)

    def overdue_seconds(self, worker: Worker) -> float | None:
        """For how long it has delivered nothing, where that is far longer than others took; otherwise None."""
        quiet_seconds = time.monotonic() - worker.progress_at
        is_overdue = quiet_seconds > LEAST_SECONDS and quiet_seconds > self._limit_seconds(worker)
        return quiet_seconds if is_overdue else None

    def _limit_seconds(self, worker: Worker) -> float:
        """How long the worker may take to deliver anything. Infinite where it owes nothing."""
        in_work = self.schedule.in_work(worker.number)
        if in_work:
            return self.pace.limit_seconds(max(map(self._size, in_work)))
        return self.sum_pace.limit_seconds() if worker.is_sum_requested else math.inf

    def _size(self, first: int) -> int:
        """The training examples of a group."""
        return sum(map(self.num_examples, self.groups[first]))

    def lose(self, worker: Worker) -> int:
        """Let others do what the worker has not delivered. Returns how many clients that are."""
        self.account(worker)
        lost = self.schedule.lose(worker.number)
        self._in_reserve.pop(worker.number, None)
        self._num_waiting_examples += sum(map(self._size, lost))
        return sum(len(self.groups[first]) for first in lost)

    def account(self, worker: Worker) -> None:
        """Count the time that the worker could work on it."""
        if worker.is_ready:
            self.slot_seconds += worker.num_slots * (time.monotonic() - worker.ready_since)
