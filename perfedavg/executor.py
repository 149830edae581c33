"""Who does the clients' work. The experiment asks; an executor answers, with the same bits whoever it is.

An executor answers one question: given this global model, this phase, this round and these client ids, what is the
exact weighted sum of their updates, or what are their scores? `LocalExecutor` does the work in this process; the
FedLab server manager of `multi_process` hands it to workers, each of which runs a `LocalExecutor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfedavg.client_data import FederatedDataset
from perfedavg.config import ExperimentConfig, Phase
from perfedavg.exact_sum import ExactSum
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
    """What a client says of its training: examples in its training part, and mean loss over its last epoch."""

    client_id: int
    num_examples: int
    loss: float


@dataclass
class CohortUpdate:
    """The exact weighted sum of the updates `theta_i - theta` of some clients, and their reports (in any order)."""

    sum: ExactSum
    reports: list[ClientReport]

    def merge(self, other: CohortUpdate) -> None:
        self.sum.merge(other.sum)
        self.reports += other.reports


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
        self._pool = ThreadPoolExecutor(num_lanes, thread_name_prefix="lane") if num_lanes > 1 else None

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        """Raises ValueError, with the client's id, where an update is not finite or out of range."""
        start = parameters.to(self._device)
        sums = {id(lane): ExactSum.zeros(start.numel(), task.capacity, self._device) for lane in self._lanes}

        def train_one(lane: FlatModel, client_id: int) -> ClientReport:
            return self._train_client(lane, client_id, task, start, sums[id(lane)])

        reports = self._on_lanes(train_one, task.client_ids)
        first, *others = sums.values()
        for other in others:
            first.merge(other)
        first.total = first.total.cpu()
        return CohortUpdate(first, reports)

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        start = parameters.to(self._device)
        return self._on_lanes(lambda lane, client_id: self._score_client(lane, client_id, task, start), task.client_ids)

    def _train_client(
        self, lane: FlatModel, client_id: int, task: CohortTask, start: Tensor, running: ExactSum
    ) -> ClientReport:
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
        running.add(lane.parameters - start, client_weight(task.phase, len(labels)), client_id)
        return ClientReport(client_id, len(labels), loss)

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

    def _on_lanes(self, work: Callable[[FlatModel, int], Result], client_ids: Sequence[int]) -> list[Result]:
        """`work` for every client, the largest first, so that the lanes end together."""
        ordered = sorted(client_ids, key=lambda client_id: -self._dataset.num_train_examples(client_id))
        if self._pool is None:
            return [work(self._lanes[0], client_id) for client_id in ordered]
        free: SimpleQueue[FlatModel] = SimpleQueue()
        for lane in self._lanes:
            free.put(lane)

        def on_a_free_lane(client_id: int) -> Result:
            lane = free.get()
            try:
                return work(lane, client_id)
            finally:
                free.put(lane)

        return list(self._pool.map(on_a_free_lane, ordered))
