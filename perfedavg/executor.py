"""Who does the clients' work. The experiment asks; an executor answers, with the same bits whoever it is.

An executor answers one question: given this global model, this phase, this round and these client ids, what is the
exact weighted sum of their updates, or what are their scores? `LocalExecutor` does the work in this process; the
FedLab server manager of `multi_process` hands it to workers, each of which runs a `LocalExecutor`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfedavg.client_data import FederatedDataset
from perfedavg.config import ExperimentConfig, Phase
from perfedavg.exact_sum import BadUpdateError, ExactSum
from perfedavg.flat_model import FlatModel
from perfedavg.local_training import LocalTraining, Loss, score, train_locally
from perfedavg.scores import ClientScore
from perfedavg.seeding import Purpose, seed_sequence

Result = TypeVar("Result")


@dataclass(frozen=True)
class CohortTask:
    """A round's work, or a part of it: who trains, in which phase and round (counted from 1).

    capacity: the weight of the *whole* cohort, which fixes the grid of the exact sum, also for a part of it.
    """

    phase: Phase
    round_number: int
    client_ids: tuple[int, ...]
    capacity: int


@dataclass(frozen=True)
class ScoringTask:
    """Unseen clients to score with the global model as it is after a round of a phase."""

    phase: Phase
    round_number: int
    client_ids: tuple[int, ...]


@dataclass(frozen=True)
class ClientReport:
    """What is said of a client's training.

    num_examples: in its training part.  loss: mean over its last local epoch.  seconds: that its lane was busy with it.
    refused: why its update is not in the sum, or None where it is.
    """

    client_id: int
    num_examples: int
    loss: float
    seconds: float
    refused: str | None = None


@dataclass
class CohortUpdate:
    """The exact weighted sum of the updates `theta_i - theta` of some clients, and their reports (in any order).

    lane_seconds: wall time, summed over the lanes (see `LocalExecutor`) that could have worked on the cohort.
    lost_workers: why each worker that was lost in the round is gone, by its rank.
    """

    sum: ExactSum
    reports: list[ClientReport]
    lane_seconds: float
    lost_workers: dict[int, str] = field(default_factory=dict)

    @property
    def idle_share(self) -> float:
        """Share of the lanes' time in which they had no client, 0 .. 1."""
        busy_seconds = math.fsum(report.seconds for report in self.reports)
        return max(0.0, 1.0 - busy_seconds / self.lane_seconds)


class Executor(Protocol):
    """See the module's docstring. `parameters` is the global model, (num_parameters,) float32 on the CPU."""

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate: ...

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]: ...


def client_weight(phase: Phase, num_examples: int) -> int:
    """Its weight in the mean: its examples in FedAvg (McMahan et al. 2017), 1 in Reptile (Nichol et al. 2018)."""
    return num_examples if phase is Phase.FEDAVG else 1


class LocalExecutor:
    """Trains and scores clients in this process, several side by side.

    num_lanes: clients trained at the same time, 1 or more. Each lane is a thread with a model of its own that runs
    its kernels on one core. So the lanes change the speed, but not a bit of the result, unlike torch's intra-op
    threads, whose number changes the order of additions inside a kernel.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: nn.Module,
        dataset: FederatedDataset,
        device: torch.device | str = "cpu",
        num_lanes: int = 1,
        loss_function: Loss = F.cross_entropy,
    ) -> None:
        self._config = config
        self._dataset = dataset
        self._device = torch.device(device)
        self._loss_function = loss_function
        self._lanes = [FlatModel(model, device) for _ in range(num_lanes)]
        self._free_lanes: SimpleQueue[FlatModel] = SimpleQueue()
        for lane in self._lanes:
            self._free_lanes.put(lane)
        self._pool = ThreadPoolExecutor(num_lanes, thread_name_prefix="lane")

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        started = time.monotonic()
        training = self.begin_training(task, parameters)
        reports = self._on_lanes(training.train, task.client_ids)
        lane_seconds = self.num_lanes * (time.monotonic() - started)
        return CohortUpdate(training.take_sum(), reports, lane_seconds)

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        return self._on_lanes(self.begin_scoring(task, parameters), task.client_ids)

    def begin_training(self, task: CohortTask, parameters: Tensor) -> CohortTraining:
        """A round that takes its clients one by one; those that the task names need not be known yet."""
        return CohortTraining(self, task, parameters.to(self._device))

    def begin_scoring(self, task: ScoringTask, parameters: Tensor) -> Callable[[int], ClientScore]:
        """A function that scores a client by its id; it waits for a free lane, and may be called from any thread."""
        start = parameters.to(self._device)
        return lambda client_id: self._on_lane(lambda lane: self._score_client(lane, client_id, task, start))

    def submit(self, work: Callable[[int], Result], client_id: int) -> Future[Result]:
        """Do the work in a thread of a lane, behind what was submitted before."""
        return self._pool.submit(work, client_id)

    def _on_lanes(self, work: Callable[[int], Result], client_ids: Sequence[int]) -> list[Result]:
        """`work` for every client, the largest first, so that the lanes end together."""
        ordered = sorted(client_ids, key=lambda client_id: -self._dataset.num_train_examples(client_id))
        return list(self._pool.map(work, ordered))

    def _on_lane(self, work: Callable[[FlatModel], Result]) -> Result:
        lane = self._free_lanes.get()
        try:
            return work(lane)
        finally:
            self._free_lanes.put(lane)

    def _train_client(
        self, lane: FlatModel, client_id: int, task: CohortTask, start: Tensor, running: ExactSum
    ) -> ClientReport:
        started = time.monotonic()
        phase = self._config.phases[task.phase]
        training = LocalTraining(phase.client_optimizer, phase.num_local_epochs, self._config.batch_size)
        seeds = seed_sequence(
            self._config.seed,
            Purpose.LOCAL_TRAINING,
            phase=task.phase,
            round_number=task.round_number,
            client_id=client_id,
        )
        data = self._dataset.client_data(client_id)
        inputs, labels = data.train_inputs.to(self._device), data.train_labels.to(self._device)
        lane.load(start)
        loss = train_locally(lane, inputs, labels, training, seeds, self._loss_function)
        refused = None
        try:
            running.add(lane.parameters - start, client_weight(task.phase, len(labels)), client_id)
        except BadUpdateError as error:
            refused = str(error)
        return ClientReport(client_id, len(labels), loss, time.monotonic() - started, refused)

    def _score_client(self, lane: FlatModel, client_id: int, task: ScoringTask, start: Tensor) -> ClientScore:
        """Score, adapt on the training part with FedAvg's client optimizer, score again on the same test part."""
        training = LocalTraining(
            self._config.fedavg.client_optimizer, self._config.num_personalization_epochs, self._config.batch_size
        )
        seeds = seed_sequence(
            self._config.seed,
            Purpose.PERSONALIZATION,
            phase=task.phase,
            round_number=task.round_number,
            client_id=client_id,
        )
        data = self._dataset.client_data(client_id)
        inputs, labels = data.train_inputs.to(self._device), data.train_labels.to(self._device)
        test_inputs, test_labels = data.test_inputs.to(self._device), data.test_labels.to(self._device)
        lane.load(start)
        initial_loss, initial_accuracy = score(lane, test_inputs, test_labels, self._loss_function)
        train_locally(lane, inputs, labels, training, seeds, self._loss_function)
        personalized_loss, personalized_accuracy = score(lane, test_inputs, test_labels, self._loss_function)
        return ClientScore(
            client_id,
            len(labels),
            len(test_labels),
            initial_loss,
            initial_accuracy,
            personalized_loss,
            personalized_accuracy,
        )


class CohortTraining:
    """A round of a `LocalExecutor`, client by client. What was trained so far can be taken out at any time."""

    def __init__(self, executor: LocalExecutor, task: CohortTask, start: Tensor) -> None:
        self._executor = executor
        self._task = task
        self._start = start
        self._sums: dict[FlatModel, ExactSum] = {}

    def train(self, client_id: int) -> ClientReport:
        """Add a client's update to the sum, or refuse it and say why. May be called from several threads at once."""

        def work(lane: FlatModel) -> ClientReport:
            running = self._sums.get(lane)
            if running is None:
                running = self._sums[lane] = ExactSum.zeros(len(self._start), self._task.capacity, self._start.device)
            return self._executor._train_client(lane, client_id, self._task, self._start, running)

        return self._executor._on_lane(work)

    def take_sum(self) -> ExactSum:
        """The sum over the clients trained since the last call, on the CPU. None may be in training meanwhile."""
        sums = list(self._sums.values()) or [ExactSum.zeros(len(self._start), self._task.capacity)]
        self._sums.clear()
        first, *others = sums
        for other in others:
            first.merge(other)
        first.total = first.total.cpu()
        return first
