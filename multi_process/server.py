"""The server's side: a FedLab server manager that is an executor, and a handler that merges what workers send."""

from __future__ import annotations

import math
import queue
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

from fedlab.core.network_manager import NetworkManager
from fedlab.core.server.handler import ServerHandler
from fedlab.core.server.manager import ServerManager
from torch import Tensor, nn

from multi_process.boundary import ExpectedScoring, ExpectedTraining, clean_text
from multi_process.messages import (
    AssignGroups,
    Configure,
    Failed,
    Finish,
    GroupScored,
    GroupTrained,
    Join,
    Message,
    PartialSum,
    Ready,
    RequestPartialSum,
    StartScoring,
    StartTraining,
)
from multi_process.pace import LEAST_SECONDS, Pace
from multi_process.schedule import Schedule
from multi_process.transport.control import FinishedError
from multi_process.transport.network import REMINDER_SECONDS, ConnectedWorker, ServerNetwork
from multi_process.transport.peer import PeerLostError
from perfedavg.aggregation.exact_mean import ExactMean
from perfedavg.contracts import Executor, FederatedDataset
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask, cut_into_groups
from perfedavg.machine.kernels import KernelLog
from perfedavg.methods import method_of
from perfedavg.settings import ExperimentConfig
from perfedavg.terminal.console import LOGGER, say
from perfedavg.terminal.entry_point import at_early_end
from perfedavg.training.client_batching import default_num_slots, say_idle_slots
from perfedavg.training.compute import ComputeDevice, describe_kernels

FINISH_SECONDS = 10.0
"""For a worker to hear that the run is over."""
CHECK_SECONDS = 5.0
"""Between two looks at how the workers get on, while nothing comes from them."""
MAX_WARNED = 1000
"""Machines and devices whose workers' warnings are shown."""
MAX_GIVEN_UP = 3
"""Times that a rank is given up for its slowness, after which it is sent away for good."""


class CohortHandler(ServerHandler):
    """FedLab's parameter server: holds the global model of a round and merges the workers' parts of its sum.

    The round loop and the server optimizer are the experiment's (`perfedavg.engine.experiment`), the same with and
    without a network; so this handler hands out parameters and adds, and decides nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, cuda=False)
        self.num_clients = 0  # FedLab's managers set it
        self._num_missing = 0
        self._update: CohortUpdate | None = None

    def begin(self, task: CohortTask, parameters: Tensor) -> None:
        """Start a round: forget the last one, take over its model."""
        self.set_model(parameters)
        self._num_missing = len(task.client_ids)
        self._update = CohortUpdate(ExactMean.zeros(parameters.numel(), task.capacity), [], 0.0)

    @property
    def downlink_package(self) -> list[Tensor]:
        return [self.model_parameters]

    @property
    def if_stop(self) -> bool:
        """Whether every client of the round has reported."""
        return self._num_missing == 0

    def load(self, payload: PartialSum) -> bool:
        """Merge a worker's part, which has been checked. True when the round is complete."""
        self.cohort_update.sum.merge(payload.part)
        self.cohort_update.reports += payload.reports
        self._num_missing -= len(payload.reports)
        return self.if_stop

    @property
    def cohort_update(self) -> CohortUpdate:
        assert self._update is not None, "a round has begun"
        return self._update

    def setup_optim(self) -> None:
        raise NotImplementedError("the server optimizer is the experiment's; see perfedavg.training.optimizers")

    def global_update(self, buffer: object) -> None:
        raise NotImplementedError("the server step is the experiment's; see perfedavg.engine.experiment")

    def evaluate(self) -> None:
        raise NotImplementedError("unseen clients are scored by the workers; see perfedavg.engine.executor")


class _ProtocolViolationError(Exception):
    """A worker does not do as this protocol says, so the run goes on without it."""


@dataclass(eq=False)
class _Worker:
    """A worker as the pool knows it, from its Join until it is gone.

    num_slots: clients that it works on side by side; 0 until it is configured.  is_ready: it may be given work.
    has_begun: it was told of the present work item.
    is_sum_requested: it was asked for the sum over the clients that it has trained.
    since: when it could begin on the present piece of work, on the clock of `time.monotonic`, as the next one.
    progress_at: when it last delivered anything of what it has in hand, or was given it.
    is_called_slow: the user has been told that nothing has come since.
    """

    connected: ConnectedWorker
    join: Join
    num_slots: int = 0
    is_ready: bool = False
    has_begun: bool = False
    is_sum_requested: bool = False
    since: float = 0.0
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


@dataclass(eq=False)
class _WorkItem:
    """A piece of work that the pool does together: a round's training, or a scoring.

    groups: of clients that are worked on at once, by the first client of each; the schedule hands these out.
    start: tells a worker of it.  accept_result: takes the results that an answer has, or raises and takes none.
    pace: of the groups.  handed_out_at: when each group was given to who has it.
    slot_seconds, lost: see `tasks.CohortUpdate`.  num_given_up: times that a rank was given up in it.
    """

    groups: dict[int, tuple[int, ...]]
    schedule: Schedule
    start: StartTraining | StartScoring
    accept_result: Callable[[Message], None]
    pace: Pace
    lost: dict[int, str]
    slot_seconds: float = 0.0
    handed_out_at: dict[int, float] = field(default_factory=dict)
    num_given_up: Counter[int] = field(default_factory=Counter)

    @property
    def answers(self) -> tuple[type[Message], ...]:
        """What it can be answered with."""
        return (GroupTrained, PartialSum) if isinstance(self.start, StartTraining) else (GroupScored,)

    def group_keys(self, client_ids: Sequence[int]) -> list[int]:
        """The first clients of the groups that these clients are. Raises ValueError where a group is not whole."""
        firsts = [client_id for client_id in client_ids if client_id in self.groups]
        whole = [client_id for first in firsts for client_id in self.groups[first]]
        if sorted(whole) != sorted(client_ids):
            raise ValueError(f"clients {sorted(set(whole) ^ set(client_ids))} were not delivered as their group")
        return firsts


class WorkerPoolManager(ServerManager):
    """FedLab's server manager as an `Executor`: hands clients to workers as these become free, and adds what they send.

    Workers may come and go at any time: what a lost one had not delivered is given to the others, and one that joins
    is given work at once. All of it happens in the experiment's thread, which waits for the network's events.

    settle: the configuration for the devices that the workers to start with compute on.
    experiment: is called once these workers are ready, with the configuration and this manager as the executor.
    join_seconds: for them to join.  worker_wait_seconds: how long to go on without any worker.
    worker_command: what starts a worker, but for its --rank, for whom the server waits in vain.
    """

    def __init__(
        self,
        network: ServerNetwork,
        handler: CohortHandler,
        settle: Callable[[Sequence[ComputeDevice]], ExperimentConfig],
        clients: FederatedDataset,
        experiment: Callable[[ExperimentConfig, Executor], None],
        join_seconds: float,
        worker_wait_seconds: float,
        worker_command: str = "client_worker.py",
    ) -> None:
        super().__init__(network, handler, mode="GLOBAL")
        self._network: ServerNetwork = network
        self._handler: CohortHandler = handler
        self._settle = settle
        self._settled: ExperimentConfig | None = None
        self._clients = clients
        self._experiment = experiment
        self._join_seconds = join_seconds
        self._worker_wait_seconds = worker_wait_seconds
        self._worker_command = worker_command
        self._workers: dict[int, _Worker] = {}  # by generation; those that are not gone
        self._is_started = False
        self._item: _WorkItem | None = None
        self._lost_between: dict[int, str] = {}
        self._gone: set[int] = set()  # generations of workers that were lost or sent away
        self._failed_ranks: defaultdict[int, set[int]] = defaultdict(set)  # by the client at which they failed
        self._paces: defaultdict[Hashable, Pace] = defaultdict(Pace)  # by the kind of work
        self._sum_pace = Pace()
        self._num_given_up: Counter[int] = Counter()  # by rank
        self._none_since = self._checked_at = 0.0
        self._is_regression: bool | None = None
        self._warned: set[tuple[str, str]] = set()  # machine and device of workers that had their say
        self.kernels = KernelLog()
        self.kernels.add(describe_kernels(None))

    def run(self) -> None:
        """Let the workers join, run the experiment with them, let them go."""
        at_early_end(self._dismiss)
        super().run()

    def setup(self) -> None:
        """Wait until the workers to start with are ready. Each must read the same data as the server."""
        NetworkManager.setup(self)  # not ServerManager's, which maps each client to a worker once and for all
        self._handler.num_clients = len(self._clients.train_client_ids) + len(self._clients.unseen_client_ids)
        deadline = time.monotonic() + self._join_seconds
        while not self._is_started:
            remaining, ranks = deadline - time.monotonic(), self._missing_ranks()
            if remaining <= 0:
                raise ValueError(
                    f"{self._missing()} did not join within {self._join_seconds:g} s (--join_timeout_seconds)"
                    + "".join(f"; start {rank} with: {self._worker_command} --rank {rank}" for rank in ranks[:1])
                )
            if not self._take_event(min(remaining, REMINDER_SECONDS)):
                say(f"server: waiting for {self._missing()}, {max(0.0, deadline - time.monotonic()):.0f} s left")
            num_first = self._num_first
            if len(self._workers) >= num_first:
                if self._settled is None:
                    self._settled = self._settle([_device_of(worker.join) for worker in self._workers.values()])
                for worker in self._workers.values():
                    self._configure(worker)
            self._is_started = sum(worker.is_ready for worker in self._workers.values()) >= num_first
        say_idle_slots(self._experiment_config, sum(worker.num_slots for worker in self._workers.values()))

    @property
    def _num_first(self) -> int:
        """Workers to start with: so many as asked for, or as there is room for."""
        num_asked = int(self._network.world_size) - 1
        return min(num_asked, max(1, self._network.num_connected)) if self._network.num_refused_for_room else num_asked

    def main_loop(self) -> None:
        self._experiment(self._experiment_config, self)

    @property
    def _experiment_config(self) -> ExperimentConfig:
        assert self._settled is not None, "the configuration is settled before it is used"
        return self._settled

    def shutdown(self) -> None:
        """Let the workers end, and close the network."""
        peers = [worker.connected.peer for worker in self._workers.values()]
        for peer in peers:
            if peer.lost_reason is None:
                peer.send(Finish())
        deadline = time.monotonic() + FINISH_SECONDS
        for peer in peers:
            peer.drain(max(0.0, deadline - time.monotonic()))
        super().shutdown()

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        self._handler.begin(task, parameters)
        (global_parameters,) = self._handler.downlink_package
        start = StartTraining(int(task.phase), task.round_number, task.capacity, global_parameters)
        sizes = self._clients.num_train_examples
        weight_of = method_of(self._experiment_config, task.phase).weight
        expected = ExpectedTraining(weight_of, task.capacity, parameters.numel(), sizes)

        def accept_result(answer: Message) -> None:
            assert isinstance(answer, PartialSum), "a trained client's result comes in a sum"
            # A copy, because the worker's next message would overwrite what has been checked.
            answer = replace(answer, total=answer.total.clone())
            expected.check(answer.part, answer.reports)
            self._handler.load(answer)

        item = self._perform(start, task.client_ids, accept_result, self._paces[StartTraining, task.phase])
        assert self._handler.if_stop, "every client was handed out and reported"
        update = self._handler.cohort_update
        update.slot_seconds, update.lost_workers = item.slot_seconds, item.lost
        return update

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        scores: list[ClientScore] = []
        sizes = self._clients.num_train_examples
        expected = ExpectedScoring(task.num_curve_epochs, self._has_no_accuracies(), sizes)

        def accept_result(answer: Message) -> None:
            assert isinstance(answer, GroupScored), "a scored group's result comes by itself"
            expected.check(answer.scores)
            scores.extend(answer.scores)

        start = StartScoring(int(task.phase), task.round_number, task.num_curve_epochs, parameters)
        self._perform(start, task.client_ids, accept_result, self._paces[StartScoring, task.num_curve_epochs])
        return scores

    def _has_no_accuracies(self) -> bool:
        """Whether the task is a regression, as the labels of one client tell."""
        if self._is_regression is None:
            example = self._clients.client_data(self._clients.unseen_client_ids[0])
            self._is_regression = example.test_labels.is_floating_point()
        return self._is_regression

    def _perform(
        self,
        start: StartTraining | StartScoring,
        client_ids: Sequence[int],
        accept_result: Callable[[Message], None],
        pace: Pace,
    ) -> _WorkItem:
        """Hand out the clients, group by group, the largest first, until each one's result has been delivered."""
        group_size = self._experiment_config.client_batching
        assert group_size is not None, "the configuration is settled"
        cut = cut_into_groups(client_ids, self._clients.num_train_examples, group_size)
        groups = {group[0]: group for group in cut}
        item = self._item = _WorkItem(groups, Schedule(list(groups)), start, accept_result, pace, self._lost_between)
        self._lost_between = {}
        self._checked_at = time.monotonic()
        for worker in self._workers.values():
            worker.has_begun = worker.is_sum_requested = False
            worker.since = time.monotonic()
        while not item.schedule.is_complete:
            self._feed(item)
            self._take_event(min(CHECK_SECONDS, self._seconds_left()))
            self._check_progress(item)
        for worker in self._workers.values():
            self._account(worker, item)
        self._item = None
        return item

    def _seconds_left(self) -> float:
        """How long to wait for a worker, where there is none. Raises ConnectionError where none came in time."""
        if self._workers:
            return CHECK_SECONDS
        remaining = self._none_since + self._worker_wait_seconds - time.monotonic()
        if remaining <= 0:
            raise ConnectionError(
                f"no worker is left, and none came within {self._worker_wait_seconds:g} s (--worker_wait_seconds)"
            )
        return remaining

    def _check_progress(self, item: _WorkItem) -> None:
        """Give up a worker that has delivered nothing for far longer than others took, so that others get its work.

        Time in which this process itself did not run (it was stopped, its machine was overloaded) does not count.
        """
        now = time.monotonic()
        has_slept = now - self._checked_at > 2 * CHECK_SECONDS
        self._checked_at = now
        for worker in list(self._workers.values()):
            if has_slept:
                worker.note_progress(now)
            quiet_seconds = now - worker.progress_at
            if quiet_seconds > LEAST_SECONDS and quiet_seconds > self._limit_seconds(worker, item):
                self._give_up(worker, quiet_seconds, item)

    def _limit_seconds(self, worker: _Worker, item: _WorkItem) -> float:
        """How long the worker may take to deliver anything. Infinite where it owes nothing."""
        in_work = item.schedule.in_work(worker.number)
        if in_work:
            return item.pace.limit_seconds(max(self._size(item.groups[first]) for first in in_work))
        return self._sum_pace.limit_seconds() if worker.is_sum_requested else math.inf

    def _give_up(self, worker: _Worker, quiet_seconds: float, item: _WorkItem) -> None:
        """Drop a slow worker, unless the others were dropped from this piece more often: somebody must do the work."""
        num_given_up = item.num_given_up[worker.rank]
        others = [other for other in self._workers.values() if other.is_ready and other is not worker]
        reason = f"it has finished nothing for {quiet_seconds:.0f} s, far longer than others took"
        if any(item.num_given_up[other.rank] <= num_given_up for other in others):
            item.num_given_up[worker.rank] += 1
            self._num_given_up[worker.rank] += 1
            self._lose(worker.connected, reason)
        elif not worker.is_called_slow:
            worker.is_called_slow = True
            say(f"server: worker {worker.rank}: {reason}; waiting on, because no other worker could do better")

    def _size(self, group: Sequence[int]) -> int:
        """The training examples of a group of clients."""
        return sum(map(self._clients.num_train_examples, group))

    def _feed(self, item: _WorkItem) -> None:
        """Give each worker as many groups as it has lanes, and one to go on with while there are plenty.

        Where there are fewer groups than lanes, each worker gets its share, and one at least while there are any.
        Where none is left for it, ask for the sum over those that it has trained.
        """
        schedule, now = item.schedule, time.monotonic()
        ready = [worker for worker in self._workers.values() if worker.is_ready]
        num_slots = sum(worker.num_slots for worker in ready)
        num_unfinished = schedule.num_unfinished  # which handing out leaves as it is
        num_idle = sum(not schedule.num_in_work(worker.number) for worker in ready)
        for worker in ready:
            share = -(-num_unfinished * worker.num_slots // num_slots)
            in_hand = min(worker.num_slots, share) + (1 if schedule.num_waiting > 2 * num_slots else 0)
            num_in_work = schedule.num_in_work(worker.number)
            num_others_idle = num_idle if num_in_work else num_idle - 1
            to_spare = max(schedule.num_waiting - num_others_idle, 0 if num_in_work else 1)
            firsts = schedule.take(worker.number, min(in_hand - num_in_work, to_spare))
            if firsts:
                item.handed_out_at.update(dict.fromkeys(firsts, now))
                if not num_in_work:
                    num_idle -= 1
                    worker.note_progress(now)
                if not worker.has_begun:
                    self._send(worker, item.start)
                    worker.has_begun = True
                self._send(worker, AssignGroups([list(item.groups[first]) for first in firsts]))
            elif not num_in_work and schedule.num_done(worker.number) and not worker.is_sum_requested:
                self._send(worker, RequestPartialSum())
                worker.is_sum_requested = True
                worker.note_progress(now)

    def _send(self, worker: _Worker, message: Message) -> None:
        try:
            worker.connected.peer.send(message)
        except (ConnectionError, ValueError, FinishedError):
            LOGGER.info("worker %d cannot be sent %s", worker.rank, type(message).__name__)  # its end is on its way

    def _take_event(self, timeout_seconds: float) -> bool:
        """Wait for what a worker says next, and act on it. False where nothing came."""
        try:
            connected, event = self._network.events.get(timeout=timeout_seconds)
        except queue.Empty:
            return False
        if connected.generation in self._gone:
            return True  # said before it was lost
        try:
            if isinstance(event, PeerLostError):
                self._lose(connected, event.reason)
            elif isinstance(event, ValueError):
                raise _ProtocolViolationError(str(event)) from event
            elif isinstance(event, Exception):
                self._lose(connected, str(event))
            elif isinstance(event, Failed):
                self._take_failure(connected, event)
            elif connected.generation in self._workers:
                self._take_message(self._workers[connected.generation], event)
            elif isinstance(event, Join):
                self._take_join(connected, event)
            else:
                raise _ProtocolViolationError(_unexpected(event))
        except _ProtocolViolationError as error:
            connected.peer.close(str(error), farewell="dismissed")
            self._lose(connected, str(error))
        return True

    def _take_join(self, connected: ConnectedWorker, join: Join) -> None:
        if join.ticket != connected.ticket:
            raise _ProtocolViolationError("it is not the worker that was admitted")
        if self._num_given_up[connected.rank] >= MAX_GIVEN_UP and any(
            other.is_ready for other in self._workers.values()
        ):
            raise _ProtocolViolationError(f"it was given up {MAX_GIVEN_UP} times, because it finished nothing")
        worker = self._workers[connected.generation] = _Worker(connected, join)
        say(f"server: worker {worker.rank} joined")
        if self._is_started:
            self._configure(worker)

    def _configure(self, worker: _Worker) -> None:
        """Send the configuration, once, with the worker's share of its machine's cores."""
        if worker.num_slots:
            return
        worker.connected.peer.num_parameters = self._handler.model_parameters.numel()
        worker.connected.peer.num_clients = self._handler.num_clients
        on_same_machine = sum(other.join.machine == worker.join.machine for other in self._workers.values())
        num_cores = worker.join.num_cores // on_same_machine
        worker.num_slots = worker.join.threads or default_num_slots(
            self._experiment_config, worker.join.device_kind, num_cores
        )
        self._send(worker, Configure(worker.connected.ticket, self._experiment_config.to_dict(), worker.num_slots))

    def _take_message(self, worker: _Worker, message: Message) -> None:
        """Act on what a worker says. Raises _ProtocolViolationError where it does not fit."""
        if isinstance(message, Ready) and worker.num_slots and not worker.is_ready:
            self._take_ready(worker, message)
            return
        if self._item is None or not isinstance(message, self._item.answers):
            raise _ProtocolViolationError(_unexpected(message))
        try:
            self._take_answer(worker, message, self._item)
        except ValueError as error:
            raise _ProtocolViolationError(str(error)) from error

    def _take_answer(self, worker: _Worker, message: Message, item: _WorkItem) -> None:
        """Raises ValueError, and takes nothing of the answer, where it does not fit what was handed out."""
        schedule, now = item.schedule, time.monotonic()
        if isinstance(message, GroupTrained):
            self._finish(worker, message.first, item)
        elif isinstance(message, PartialSum):
            firsts = item.group_keys([report.client_id for report in message.reports])
            if not worker.is_sum_requested or len(firsts) != schedule.num_done(worker.number):
                raise ValueError("its sum is not the one that it was asked for")
            self._accept_result(worker, firsts, message, item)
            self._sum_pace.learn(now - worker.progress_at)
            worker.is_sum_requested = False
        elif isinstance(message, GroupScored):
            firsts = item.group_keys([score.client_id for score in message.scores])
            for first in firsts:
                self._finish(worker, first, item)
            self._accept_result(worker, firsts, message, item)
        worker.note_progress(now)

    def _finish(self, worker: _Worker, first: int, item: _WorkItem) -> None:
        item.schedule.finish(worker.number, first)
        item.pace.learn(time.monotonic() - item.handed_out_at[first], self._size(item.groups[first]))

    def _accept_result(self, worker: _Worker, firsts: Sequence[int], message: Message, item: _WorkItem) -> None:
        item.schedule.check_done(worker.number, firsts)
        item.accept_result(message)
        item.schedule.deliver(worker.number, firsts)

    def _take_ready(self, worker: _Worker, ready: Ready) -> None:
        differences = clean_text("; ".join(self.kernels.differences(worker.join.kernels)))
        if ready.fingerprint != self._clients.fingerprint:
            cause = f" (or it makes them otherwise, for {differences})" if differences else ""
            reason = (
                f"worker {worker.rank} reads other data than the server (fingerprint {clean_text(ready.fingerprint)}, "
                f"not {self._clients.fingerprint}); give both the same files with --data_root{cause}"
            )
            raise _ProtocolViolationError(reason) if self._is_started else ValueError(reason)
        worker.is_ready = True
        worker.since = time.monotonic()
        say(f"server: worker {worker.rank} is ready, {worker.num_slots} client(s) side by side on {ready.device}")
        where = worker.join.machine, ready.device  # other workers there have the same to say
        if ready.warnings and where not in self._warned and len(self._warned) < MAX_WARNED:
            self._warned.add(where)
            for warning in ready.warnings:
                say(f"server: worker {worker.rank}: {warning}")
        self.kernels.add(worker.join.kernels)
        if differences:
            say(
                f"server: worker {worker.rank} computes otherwise than the others ({differences}): the last bits of "
                "the model depend on who trains which client"
            )

    def _take_failure(self, connected: ConnectedWorker, failure: Failed) -> None:
        """A worker cannot go on, and says why: before the start, and wherever others would fail too, the run ends."""
        client_id, worker = failure.client_id, self._workers.get(connected.generation)
        others = any(other.is_ready for other in self._workers.values() if other is not worker)
        if client_id is None:
            is_everybodys = not self._is_started
        else:
            if worker is None or self._item is None or client_id not in self._item.schedule.in_work(worker.number):
                raise _ProtocolViolationError(f"it failed at client {client_id}, which was not handed out to it")
            self._failed_ranks[client_id].add(worker.rank)
            is_everybodys = not others or len(self._failed_ranks[client_id]) > 1
        if is_everybodys:
            raise ValueError(f"worker {connected.rank}: {failure.reason}")
        self._lose(connected, failure.reason)

    def _lose(self, connected: ConnectedWorker, reason: str) -> None:
        """A worker is gone: its clients go to the others."""
        reason = clean_text(reason)
        connected.peer.close(reason, farewell="dropped")
        self._gone.add(connected.generation)
        worker = self._workers.pop(connected.generation, None)
        if worker is None:
            say(f"server: worker {connected.rank} could not join: {reason}")
            return
        if not self._workers:
            self._none_since = time.monotonic()
        lost = self._lost_between if self._item is None else self._item.lost
        lost[worker.rank] = reason
        num_clients = 0
        if self._item is not None:
            self._account(worker, self._item)
            num_clients = sum(len(self._item.groups[first]) for first in self._item.schedule.lose(worker.number))
        if self._network.is_over:
            return  # it was sent away, and there is nobody else
        if num_clients and self._workers:
            what_next = f"; {num_clients} client(s) are given to others"
        else:
            what_next = f"; {num_clients} client(s) wait for another worker" if num_clients else ""
        say(f"server: lost worker {worker.rank} ({reason}){what_next}; {len(self._workers)} left")

    def _account(self, worker: _Worker, item: _WorkItem) -> None:
        if worker.is_ready:
            item.slot_seconds += worker.num_slots * (time.monotonic() - worker.since)

    def _missing_ranks(self) -> list[int]:
        """Of the workers that are to come before the start."""
        present = {worker.rank for worker in self._workers.values()}
        ranks = [rank for rank in range(1, self._network.world_size) if rank not in present]
        return ranks[: self._num_first - len(self._workers)]

    def _missing(self) -> str:
        ranks = self._missing_ranks()
        if not ranks:
            return "the workers to read their data"
        return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

    def _dismiss(self, cause: signal.Signals | BaseException) -> None:
        """Send the workers away where the run ended for good; otherwise they wait for the server to come back."""
        if isinstance(cause, ValueError):
            self._network.dismiss(str(cause))
        elif cause == signal.SIGINT:
            self._network.dismiss("it was stopped by SIGINT")


def _unexpected(message: Message) -> str:
    return f"a {type(message).__name__} message was not expected"


def _device_of(join: Join) -> ComputeDevice:
    return ComputeDevice(join.device_kind, join.device_memory_bytes, join.threads or 1)
