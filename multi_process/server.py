"""The server's side: the pool of workers, which is an executor of the experiment."""

from __future__ import annotations

import queue
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from multi_process.boundary import ExpectedScoring, ExpectedTraining, clean_text
from multi_process.fedlab_adapter import CohortHandler, PoolManager
from multi_process.messages import (
    Configure,
    Failed,
    Finish,
    GroupScored,
    Join,
    Message,
    PartialSum,
    Ready,
    StartScoring,
    StartTraining,
)
from multi_process.pace import Pace
from multi_process.transport.peer import PeerLostError
from multi_process.transport.server_network import ConnectedWorker, ServerNetwork
from multi_process.transport.settings import REMINDER_SECONDS
from multi_process.work_item import Worker, WorkItem
from perfedavg.contracts import FederatedDataset, RoundStates, example_data
from perfedavg.engine.client_states import ClientState, check_kept, max_batch_bytes
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask, cut_into_groups
from perfedavg.machine.kernels import KernelLog
from perfedavg.own_module import sources
from perfedavg.settings import ExperimentConfig
from perfedavg.terminal.console import say
from perfedavg.terminal.entry_point import at_early_end, is_ending
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


class _ProtocolViolationError(Exception):
    """A worker does not do as this protocol says, so the run goes on without it."""


class WorkerPool(PoolManager):
    """An executor whose clients are trained by workers, in a `with` block: they join before it, and leave after it.

    Workers may come and go at any time: what a lost one had not delivered is given to the others, and one that joins
    is given work at once. All of it happens in the experiment's thread, which waits for the network's events.

    choose_config: the configuration for the devices that the workers to start with compute on.
    num_parameters: of the model.
    join_seconds: for the workers to join.
    worker_wait_seconds: how long to go on without any worker.
    worker_command: what starts a worker, but for its --rank, for whom the server waits in vain; None where that is not
        the user's to do.

    kernels: how the server and its workers compute.
    """

    def __init__(
        self,
        network: ServerNetwork,
        clients: FederatedDataset,
        choose_config: Callable[[Sequence[ComputeDevice]], ExperimentConfig],
        num_parameters: int,
        join_seconds: float,
        worker_wait_seconds: float,
        worker_command: str | None = None,
    ) -> None:
        super().__init__(network, CohortHandler(len(clients.train_client_ids) + len(clients.unseen_client_ids)))
        self._network: ServerNetwork = network
        self._clients = clients
        self._choose_config = choose_config
        self._config: ExperimentConfig | None = None
        self._num_parameters = num_parameters
        self._join_seconds = join_seconds
        self._worker_wait_seconds = worker_wait_seconds
        self._worker_command = worker_command
        self._workers: dict[int, Worker] = {}  # by generation; those that are not lost
        self._is_started = False
        self._item: WorkItem | None = None
        self._lost_between: dict[int, str] = {}
        self._gone: set[int] = set()  # generations of workers that were lost or sent away
        self._failed_ranks: defaultdict[int, set[int]] = defaultdict(set)  # by the client at which they failed
        self._paces: defaultdict[Hashable, Pace] = defaultdict(Pace)  # by the kind of work
        self._num_given_up: Counter[int] = Counter()  # by rank
        self._none_since = self._checked_at = 0.0
        self._is_regression: bool | None = None
        self._warned: set[tuple[str, str]] = set()  # machine and device of workers that had their say
        self.kernels = KernelLog()
        self.kernels.add(describe_kernels(None))

    def __enter__(self) -> WorkerPool:
        at_early_end(self.abandon)
        super().__enter__()
        return self

    def setup(self) -> None:
        """Wait until the workers to start with are ready. Each must read the same data as the server."""
        super().setup()
        deadline = time.monotonic() + self._join_seconds
        while not self._is_started:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                ranks = [] if self._worker_command is None else self._missing_ranks()[:1]
                raise ValueError(
                    f"{self._missing()} did not join within {self._join_seconds:g} s (--join_timeout_seconds)"
                    + "".join(f"; start {rank} with: {self._worker_command} --rank {rank}" for rank in ranks)
                )
            if not self._take_event(min(remaining, REMINDER_SECONDS)):
                say(f"server: waiting for {self._missing()}, {max(0.0, deadline - time.monotonic()):.0f} s left")
            num_first, workers = self._num_first, list(self._workers.values())
            if len(workers) >= num_first:
                if self._config is None:
                    self._config = self._choose_config([_device_of(worker.join) for worker in workers])
                for worker in workers:
                    self._configure(worker)
            self._is_started = len(self._ready_workers()) >= num_first
        say_idle_slots(self.config, sum(worker.num_slots for worker in self._workers.values()))

    @property
    def config(self) -> ExperimentConfig:
        assert self._config is not None, "it is chosen when the workers to start with are known"
        return self._config

    @property
    def _num_first(self) -> int:
        """Workers to start with: so many as asked for, or as there is room for."""
        num_asked = self._network.world_size - 1
        return min(num_asked, max(1, len(self._network.present))) if self._network.num_refused_for_room else num_asked

    def shutdown(self) -> None:
        """Let the workers end, and close the network."""
        peers = [worker.connected.peer for worker in self._workers.values()]
        for worker in self._workers.values():
            worker.send(Finish())
        deadline = time.monotonic() + FINISH_SECONDS
        for peer in peers:
            peer.drain(max(0.0, deadline - time.monotonic()))
        super().shutdown()

    def abandon(self, cause: signal.Signals | BaseException) -> None:
        """Send the workers away where the run ended for good; otherwise they wait for the server to come back."""
        if isinstance(cause, ValueError):
            self._network.dismiss(str(cause))
        elif cause == signal.SIGINT:
            self._network.dismiss("it was stopped by SIGINT")

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        self._handler.begin(task, parameters)
        (global_parameters,) = self._handler.downlink_package
        method = self.config.phases[task.phase].method
        expected = ExpectedTraining(method, task.capacity, parameters.numel(), self._clients.num_train_examples)

        def accept_state(client_id: int, state: ClientState) -> None:
            check_kept(self.config, task.phase, client_id, state, parameters.numel())
            task.states.put(client_id, state)

        def accept_result(worker: Worker, answer: Message) -> None:
            assert isinstance(answer, PartialSum), "a trained client's result comes in a sum"
            expected.check(answer.part, answer.reports, worker.keeping)
            self._handler.load(answer, worker.keeping)
            worker.keeping.clear()

        start = StartTraining(int(task.phase), task.round_number, task.capacity, global_parameters)
        pace = self._paces[StartTraining, task.phase]
        may_keep = accept_state if self.config.keeps_state(task.phase) else None
        item = self._perform(start, task.client_ids, accept_result, pace, task.states, may_keep)
        assert self._handler.if_stop, "every client was handed out and reported"
        update = self._handler.cohort_update
        update.slot_seconds, update.lost_workers = item.slot_seconds, item.lost
        return update

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        scores: list[ClientScore] = []
        sizes = self._clients.num_train_examples
        expected = ExpectedScoring(self.config.metric_names, task.num_curve_epochs, self._has_no_accuracies(), sizes)

        def accept_result(worker: Worker, answer: Message) -> None:
            assert isinstance(answer, GroupScored), "a scored group's result comes by itself"
            expected.check(answer.scores)
            scores.extend(answer.scores)

        start = StartScoring(int(task.phase), task.round_number, task.num_curve_epochs, parameters)
        pace = self._paces[StartScoring, task.num_curve_epochs]
        self._perform(start, task.client_ids, accept_result, pace, task.states)
        return scores

    def _has_no_accuracies(self) -> bool:
        """Whether the task is a regression, as the labels of one client tell."""
        if self._is_regression is None:
            self._is_regression = example_data(self._clients).train_labels.is_floating_point()
        return self._is_regression

    def _perform(
        self,
        start: StartTraining | StartScoring,
        client_ids: Sequence[int],
        accept_result: Callable[[Worker, Message], None],
        pace: Pace,
        states: RoundStates,
        accept_state: Callable[[int, ClientState], None] | None = None,
    ) -> WorkItem:
        """Hand out the clients, group by group, the largest first, until each one's result has been delivered."""
        assert self.config.client_batching is not None, "the configuration is settled"
        num_examples = self._clients.num_train_examples
        cut = cut_into_groups(client_ids, num_examples, self.config.client_batching)
        groups = {group[0]: group for group in cut}
        states.read_ahead([client_id for group in cut for client_id in group])
        lost, self._lost_between = self._lost_between, {}
        item = self._item = WorkItem(
            start, groups, num_examples, states, accept_result, pace, self._paces[PartialSum], lost, accept_state
        )
        self._checked_at = time.monotonic()
        for worker in self._workers.values():
            worker.has_begun = worker.is_sum_requested = False
            worker.keeping.clear()
            worker.ready_since = time.monotonic()
        while not item.schedule.is_complete:
            item.hand_out(self._ready_workers())
            self._take_event(min(CHECK_SECONDS, self._seconds_left()))
            self._check_progress(item)
        for worker in self._workers.values():
            item.account(worker)
        self._item = None
        return item

    def _ready_workers(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.is_ready]

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

    def _check_progress(self, item: WorkItem) -> None:
        """Give up a worker that has delivered nothing for far longer than others took, so that others get its work.

        Time in which this process itself did not run (it was stopped, its machine was overloaded) does not count.
        """
        now = time.monotonic()
        has_slept = now - self._checked_at > 2 * CHECK_SECONDS
        self._checked_at = now
        for worker in list(self._workers.values()):
            if has_slept:
                worker.note_progress(now)
            overdue_seconds = item.overdue_seconds(worker)
            if overdue_seconds is not None:
                self._give_up(worker, overdue_seconds, item)

    def _give_up(self, worker: Worker, quiet_seconds: float, item: WorkItem) -> None:
        """Drop a slow worker, unless the others were dropped from this item more often: somebody must do the work."""
        others = [other for other in self._ready_workers() if other is not worker]
        reason = f"it has finished nothing for {quiet_seconds:.0f} s, far longer than others took"
        if any(item.num_given_up[other.rank] <= item.num_given_up[worker.rank] for other in others):
            item.num_given_up[worker.rank] += 1
            self._num_given_up[worker.rank] += 1
            self._lose(worker.connected, reason)
        elif not worker.is_called_slow:
            worker.is_called_slow = True
            say(f"server: worker {worker.rank}: {reason}; waiting on, because no other worker could do better")

    def _take_event(self, timeout_seconds: float) -> bool:
        """Wait for what a worker says next, and act on it. False where nothing came."""
        try:
            connected, event = self._network.events.get(timeout=timeout_seconds)
        except queue.Empty:
            return False
        if connected.generation in self._gone:
            return True  # said before it was lost
        try:
            match event:
                case PeerLostError():
                    self._lose(connected, event.reason)
                case ValueError():
                    raise _ProtocolViolationError(str(event))
                case Exception():
                    self._lose(connected, str(event))
                case Failed():
                    self._take_failure(connected, event)
                case _ if connected.generation in self._workers:
                    self._take_message(self._workers[connected.generation], event)
                case Join():
                    self._take_join(connected, event)
                case _:
                    raise _ProtocolViolationError(_unexpected(event))
        except _ProtocolViolationError as error:
            connected.peer.close(str(error), farewell="dismissed")
            self._lose(connected, str(error))
        return True

    def _take_join(self, connected: ConnectedWorker, join: Join) -> None:
        if join.ticket != connected.ticket:
            raise _ProtocolViolationError("it is not the worker that was admitted")
        if self._num_given_up[connected.rank] >= MAX_GIVEN_UP and self._ready_workers():
            raise _ProtocolViolationError(f"it was given up {MAX_GIVEN_UP} times, because it finished nothing")
        worker = self._workers[connected.generation] = Worker(connected, join)
        say(f"server: worker {worker.rank} joined")
        if self._is_started:
            self._configure(worker)

    def _configure(self, worker: Worker) -> None:
        """Send the configuration, once, with the worker's share of its machine's cores."""
        if worker.num_slots:
            return
        peer, join = worker.connected.peer, worker.join
        peer.num_parameters, peer.num_clients = self._num_parameters, self._handler.num_clients
        peer.max_states_bytes = max_batch_bytes(self.config, self._num_parameters)
        on_same_machine = sum(other.join.machine == join.machine for other in self._workers.values())
        num_cores = join.num_cores // on_same_machine
        worker.num_slots = join.threads or default_num_slots(self.config, join.device_kind, num_cores)
        peer.num_in_hand = worker.num_slots + 1
        worker.send(Configure(worker.connected.ticket, self.config.to_dict(), worker.num_slots, sources()))

    def _take_message(self, worker: Worker, message: Message) -> None:
        """Act on what a worker says. Raises _ProtocolViolationError where it does not fit."""
        if isinstance(message, Ready) and worker.num_slots and not worker.is_ready:
            self._take_ready(worker, message)
            return
        if self._item is None or not self._item.expects(message):
            raise _ProtocolViolationError(_unexpected(message))
        try:
            self._item.take_answer(worker, message)
        except ValueError as error:
            raise _ProtocolViolationError(str(error)) from error

    def _take_ready(self, worker: Worker, ready: Ready) -> None:
        differences = clean_text("; ".join(self.kernels.differences(worker.join.kernels)))
        if ready.fingerprint != self._clients.fingerprint:
            cause = f" (or it makes them otherwise, for {differences})" if differences else ""
            reason = (
                f"worker {worker.rank} reads other data than the server (fingerprint {clean_text(ready.fingerprint)}, "
                f"not {self._clients.fingerprint}); give both the same files with --data_root{cause}"
            )
            raise _ProtocolViolationError(reason) if self._is_started else ValueError(reason)
        worker.is_ready = True
        worker.ready_since = time.monotonic()
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
        if client_id is None:
            is_everybodys = not self._is_started
        else:
            if worker is None or self._item is None or client_id not in self._item.schedule.in_work(worker.number):
                raise _ProtocolViolationError(f"it failed at client {client_id}, which was not handed out to it")
            self._failed_ranks[client_id].add(worker.rank)
            has_others = any(other is not worker for other in self._ready_workers())
            is_everybodys = not has_others or len(self._failed_ranks[client_id]) > 1
        if is_everybodys:
            raise ValueError(f"worker {connected.rank}: {failure.reason}")
        self._lose(connected, failure.reason)

    def _lose(self, connected: ConnectedWorker, reason: str) -> None:
        """A worker is lost: its clients go to the others."""
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
        num_clients = 0 if self._item is None else self._item.lose(worker)
        if self._network.is_over or is_ending():
            return  # it was sent away, or stopped together with this process
        what_next = "are given to others" if self._workers else "wait for another worker"
        clients = f"; {num_clients} client(s) {what_next}" if num_clients else ""
        say(f"server: lost worker {worker.rank} ({reason}){clients}; {len(self._workers)} left")

    def _missing_ranks(self) -> list[int]:
        """Of the workers that are to come before the start."""
        present = {worker.rank for worker in self._workers.values()}
        ranks = [rank for rank in range(1, self._network.world_size) if rank not in present]
        return ranks[: max(0, self._num_first - len(self._workers))]

    def _missing(self) -> str:
        ranks = self._missing_ranks()
        if not ranks:
            return "the workers to read their data"
        return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _unexpected(message: Message) -> str:
    return f"a {type(message).__name__} message was not expected"


def _device_of(join: Join) -> ComputeDevice:
    return ComputeDevice(join.device_kind, join.device_memory_bytes, join.threads or 1)
