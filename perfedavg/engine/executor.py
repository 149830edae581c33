"""Who does the clients' work. The experiment asks; an executor answers, with the same bits whoever it is.

An executor answers one question: given this global model, this phase, this round and these client ids, what is the
exact weighted sum of their updates, or what are their scores? `LocalExecutor` does the work in this process; the
FedLab server manager of `multi_process` hands it to workers, each of which runs a `LocalExecutor`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from perfedavg.aggregation.exact_sum import BadUpdateError, ExactSum
from perfedavg.contracts import ClientData, FederatedDataset
from perfedavg.engine.client_reader import ClientReader
from perfedavg.engine.cohorts import draw_cohort, draw_next_cohort
from perfedavg.engine.scores import ClientScore
from perfedavg.machine.cores import usable_cores
from perfedavg.machine.kernels import KernelLog
from perfedavg.seeding import Purpose, seed_sequence
from perfedavg.settings import ExperimentConfig, Phase
from perfedavg.training.compute import check_portable, describe_kernels
from perfedavg.training.flat_model import FlatModel
from perfedavg.training.group_training import GroupMember, StackedModel, score_together, train_together
from perfedavg.training.local_training import LocalTraining, Loss, local_training_of, loss_of, score, train_locally
from perfedavg.training.meta_learning import cut_task, fomaml_gradient, fomaml_gradients, maml_gradients
from perfedavg.training.precision import check_precision

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
    """Unseen clients to score with the global model as it is after a round of a phase.

    num_curve_epochs: they are also scored after each of 0 .. so many epochs of adapting, unless it is 0.
    """

    phase: Phase
    round_number: int
    client_ids: tuple[int, ...]
    num_curve_epochs: int = 0


@dataclass(frozen=True)
class ClientReport:
    """Outcome of one client's training.

    num_examples: size of its training part.
    loss: for FedAvg and Reptile the mean over the examples of its last local epoch, each before its step; for FOMAML
        and MAML the mean over its query part, after the steps on its support part.
    seconds: that its lane was busy with it.
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
    """See the module's docstring. `parameters` is the global model, (num_parameters,) float32 on the CPU.

    kernels: how the processes compute that do the work.
    """

    @property
    def kernels(self) -> KernelLog: ...

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate: ...

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]: ...


def client_weight(phase: Phase, num_examples: int) -> int:
    """Its weight in the mean: its examples in FedAvg (McMahan et al. 2017), 1 in phase 2 (Nichol et al. 2018)."""
    return num_examples if phase is Phase.FEDAVG else 1


def cut_into_groups(
    client_ids: Sequence[int], num_examples: Callable[[int], int], group_size: int
) -> list[tuple[int, ...]]:
    """The clients that are trained or scored at once, the largest first: the units in which work is handed out.

    They follow from the clients alone, not from who works on them, because the rounding of what is computed together
    depends on what it is computed with.
    """
    ordered = sorted(client_ids, key=lambda client_id: (-num_examples(client_id), client_id))
    return [tuple(ordered[first : first + group_size]) for first in range(0, len(ordered), group_size)]


class _Lane:
    """What one thread trains with: a model for one client, and one for a group, made when it is first needed."""

    def __init__(self, build_single: Callable[[], FlatModel], build_group: Callable[[], StackedModel]) -> None:
        self.single = build_single()
        self._build_group = build_group
        self._group: StackedModel | None = None

    @property
    def group(self) -> StackedModel:
        if self._group is None:
            self._group = self._build_group()
        return self._group


class LocalExecutor:
    """Trains and scores clients in this process, several side by side.

    num_readers: threads that read clients ahead while others train; by default none on a CPU, one a core beside a GPU.
    warnings: what a user should know before the first round, a line each.
    num_lanes: groups of clients trained at the same time, 1 or more. Each lane is a thread with models of its own that
    runs its kernels on one core. So the lanes change the speed, but not a bit of the result, unlike torch's intra-op
    threads, whose number changes the order of additions inside a kernel.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: nn.Module,
        dataset: FederatedDataset,
        device: torch.device | str = "cpu",
        num_lanes: int = 1,
        loss_function: Loss | None = None,
        num_readers: int | None = None,
    ) -> None:
        if config.client_batching is None:
            raise ValueError("--client_batching auto has not been settled; see settle_client_batching")
        self._config = config
        self._group_size = config.client_batching
        self._dataset = dataset
        self._device = torch.device(device)
        check_portable(config, self._device)
        self.kernels = KernelLog()
        self.kernels.add(describe_kernels(self._device))
        if num_readers is None:
            # A CPU's cores are the lanes', and reading takes them no less time in another thread.
            num_readers = 0 if self._device.type == "cpu" else usable_cores()
        self._reader = ClientReader(dataset, num_readers) if num_readers else None
        self._loss_function = loss_function or loss_of(dataset)
        self.warnings = check_precision(config.precision, model, dataset, self._device, self._loss_function)

        def build_single() -> FlatModel:
            return FlatModel(model, device, config.precision)

        def build_group() -> StackedModel:
            return StackedModel(model, self._group_size, device, config.precision)

        if self._group_size > 1 or any(settings.method == "maml" for settings in config.phases.values()):
            build_group()  # now, because it may refuse the model
        self._lanes = [_Lane(build_single, build_group) for _ in range(num_lanes)]
        self._free_lanes: SimpleQueue[_Lane] = SimpleQueue()
        for lane in self._lanes:
            self._free_lanes.put(lane)
        self._pool = ThreadPoolExecutor(num_lanes, thread_name_prefix="lane")

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        started = time.monotonic()
        training = self.begin_training(task, parameters)
        for group in self._groups(task.client_ids):
            training.expect(group)
        reports = self._on_lanes(training.train, task.client_ids)
        lane_seconds = self.num_lanes * (time.monotonic() - started)
        return CohortUpdate(training.take_sum(), reports, lane_seconds)

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        return self._on_lanes(self.begin_scoring(task, parameters), task.client_ids)

    def begin_training(self, task: CohortTask, parameters: Tensor) -> CohortTraining:
        """A round that takes its clients group by group; those that the task names need not be known yet.

        While a GPU trains a group, those that this process is likely to train in the next round are read.
        """
        likely_next = {} if self._reader is None else self._likely_next_groups(task, self._reader)
        return CohortTraining(self, task, parameters.to(self._device), likely_next)

    def _likely_next_groups(self, task: CohortTask, reader: ClientReader) -> dict[int, tuple[int, ...]]:
        """By the first client of a group, the group at the same place in the next round's order.

        Work is handed out in that order, so who trains the one now, alone or among others, is likely to train the other
        then. Drops what was read ahead for rounds before this one.
        """
        train_clients = self._dataset.train_client_ids
        cohorts = [
            draw(self._config, train_clients, task.phase, task.round_number) for draw in (draw_cohort, draw_next_cohort)
        ]
        reader.keep_only([*cohorts[0], *cohorts[1]])
        present, following = map(self._groups, cohorts)
        return {group[0]: next_group for group, next_group in zip(present, following, strict=False)}

    def begin_scoring(self, task: ScoringTask, parameters: Tensor) -> Callable[[Sequence[int]], list[ClientScore]]:
        """A function that scores a group of clients; it waits for a free lane, and may be called from any thread."""
        start = parameters.to(self._device)

        def score_group(group: Sequence[int]) -> list[ClientScore]:
            if len(group) == 1:
                return self._on_lane(group, lambda lane: [self._score_client(lane.single, group[0], task, start)])
            return self._on_lane(group, lambda lane: self._score_group(lane.group, group, task, start))

        return score_group

    def submit(self, work: Callable[[Sequence[int]], Result], group: Sequence[int]) -> Future[Result]:
        """Do the work in a thread of a lane, behind what was submitted before."""
        return self._pool.submit(work, group)

    def _on_lanes(self, work: Callable[[Sequence[int]], list[Result]], client_ids: Sequence[int]) -> list[Result]:
        """`work` for every group of the clients, the largest first, so that the lanes end together."""
        return [result for results in self._pool.map(work, self._groups(client_ids)) for result in results]

    def _groups(self, client_ids: Sequence[int]) -> list[tuple[int, ...]]:
        return cut_into_groups(client_ids, self._dataset.num_train_examples, self._group_size)

    def _on_lane(self, group: Sequence[int], work: Callable[[_Lane], Result]) -> Result:
        lane = self._free_lanes.get()
        try:
            return work(lane)
        except Exception as error:
            explain = getattr(self._dataset, "explain", None)  # a user's, whose model or loss may have failed
            if explain is None:
                raise
            raise explain(error, group) from None
        finally:
            self._free_lanes.put(lane)

    def _train_client(
        self, model: FlatModel, client_id: int, task: CohortTask, start: Tensor, running: ExactSum
    ) -> list[ClientReport]:
        started = time.monotonic()
        data = self._client_data(client_id)
        inputs, labels = data.train_inputs.to(self._device), data.train_labels.to(self._device)
        model.load(start)
        seeds = self._seeds(Purpose.LOCAL_TRAINING, task, client_id)
        settings, training = self._config.phases[task.phase], self._training(task.phase)
        if settings.method == "fomaml":
            meta_task = cut_task(inputs, labels, seeds, settings.support_fraction)
            gradient, loss = fomaml_gradient(model, meta_task, training, self._loss_function)
            update = gradient.neg_()
        else:
            loss = train_locally(model, inputs, labels, training, seeds, self._loss_function)
            update = model.parameters - start
        refused = _add(running, update, task.phase, client_id, len(labels))
        return [ClientReport(client_id, len(labels), loss, time.monotonic() - started, refused)]

    def _train_group(
        self, model: StackedModel, group: Sequence[int], task: CohortTask, start: Tensor, running: ExactSum
    ) -> list[ClientReport]:
        started = time.monotonic()
        members = [
            GroupMember(data.train_inputs, data.train_labels, self._seeds(Purpose.LOCAL_TRAINING, task, client_id))
            for client_id, data in zip(group, map(self._client_data, group), strict=True)
        ]
        settings, training = self._config.phases[task.phase], self._training(task.phase)
        if settings.method == "reptile":
            losses = train_together(model, start, members, training, self._loss_function)
            updates = (parameters - start for parameters in model.parameters[: len(group)])
        else:
            differentiate = maml_gradients if settings.method == "maml" else fomaml_gradients
            cuts = [cut_task(part.inputs, part.labels, part.seeds, settings.support_fraction) for part in members]
            gradients, losses = differentiate(model, start, cuts, training, self._loss_function)
            updates = iter(gradients.neg_())
        sizes = [len(member.labels) for member in members]
        refusals = [
            _add(running, update, task.phase, client_id, size)
            for update, client_id, size in zip(updates, group, sizes, strict=True)
        ]
        seconds = (time.monotonic() - started) / len(group)
        return [
            ClientReport(client_id, size, loss, seconds, refused)
            for client_id, size, loss, refused in zip(group, sizes, losses, refusals, strict=True)
        ]

    def _score_client(self, model: FlatModel, client_id: int, task: ScoringTask, start: Tensor) -> ClientScore:
        """Score, adapt on the training part with FedAvg's client optimizer, score again on the same test part."""
        data = self._client_data(client_id)
        inputs, labels = data.train_inputs.to(self._device), data.train_labels.to(self._device)
        test_inputs, test_labels = data.test_inputs.to(self._device), data.test_labels.to(self._device)
        measured: dict[int, tuple[float, float]] = {}

        def measure(epoch: int) -> None:
            if epoch in self._measured_epochs(task):
                measured[epoch] = score(model, test_inputs, test_labels, self._loss_function)

        model.load(start)
        measure(0)
        seeds = self._seeds(Purpose.PERSONALIZATION, task, client_id)
        train_locally(model, inputs, labels, self._personalization(task), seeds, self._loss_function, measure)
        return self._client_score(task, client_id, len(labels), len(test_labels), measured)

    def _score_group(
        self, model: StackedModel, group: Sequence[int], task: ScoringTask, start: Tensor
    ) -> list[ClientScore]:
        """As `_score_client`, for clients at once."""
        parts = [self._client_data(client_id) for client_id in group]
        tests = [(data.test_inputs, data.test_labels) for data in parts]
        members = [
            GroupMember(data.train_inputs, data.train_labels, self._seeds(Purpose.PERSONALIZATION, task, client_id))
            for client_id, data in zip(group, parts, strict=True)
        ]
        measured: list[dict[int, tuple[float, float]]] = [{} for _ in group]

        def measure(epochs: dict[int, int]) -> None:
            due = {client: epoch for client, epoch in epochs.items() if epoch in self._measured_epochs(task)}
            if due:
                scores = score_together(model, tests[: max(due) + 1], self._loss_function)
                for client, epoch in due.items():
                    measured[client][epoch] = scores[client]

        model.load(start)
        measure(dict.fromkeys(range(len(group)), 0))
        train_together(model, start, members, self._personalization(task), self._loss_function, measure)
        return [
            self._client_score(task, client_id, len(data.train_labels), len(data.test_labels), scores)
            for client_id, data, scores in zip(group, parts, measured, strict=True)
        ]

    def _client_score(
        self,
        task: ScoringTask,
        client_id: int,
        num_train_examples: int,
        num_test_examples: int,
        measured: Mapping[int, tuple[float, float]],
    ) -> ClientScore:
        """measured: loss and accuracy after so many epochs of adapting."""
        initial, personalized = measured[0], measured[self._config.num_personalization_epochs]
        curve = tuple(measured[epoch] for epoch in range(task.num_curve_epochs + 1)) if task.num_curve_epochs else ()
        return ClientScore(client_id, num_train_examples, num_test_examples, *initial, *personalized, curve)

    def _measured_epochs(self, task: ScoringTask) -> Sequence[int]:
        """The numbers of epochs of adapting after which a client is scored."""
        if task.num_curve_epochs:
            return range(max(task.num_curve_epochs, self._config.num_personalization_epochs) + 1)
        return 0, self._config.num_personalization_epochs

    def _personalization(self, task: ScoringTask) -> LocalTraining:
        """Longer training begins as shorter training does, so one run of it gives the whole curve.

        To the bit for a client alone; in a group up to rounding, because others may then still train beside it.
        """
        optimizer = self._config.fedavg.client_optimizer
        num_epochs = max(task.num_curve_epochs, self._config.num_personalization_epochs)
        return LocalTraining(optimizer, num_epochs, self._config.batch_size)

    def _training(self, phase: Phase) -> LocalTraining:
        return local_training_of(self._config, phase)

    def _client_data(self, client_id: int) -> ClientData:
        return (self._reader or self._dataset).client_data(client_id)

    def _seeds(self, purpose: Purpose, task: CohortTask | ScoringTask, client_id: int) -> np.random.SeedSequence:
        return seed_sequence(
            self._config.seed, purpose, phase=task.phase, round_number=task.round_number, client_id=client_id
        )


class CohortTraining:
    """A round of a `LocalExecutor`, group by group. What was trained so far can be taken out at any time."""

    def __init__(
        self, executor: LocalExecutor, task: CohortTask, start: Tensor, likely_next: Mapping[int, Sequence[int]]
    ) -> None:
        self._executor = executor
        self._likely_next = likely_next
        self._task = task
        self._start = start
        self._sums: dict[_Lane, ExactSum] = {}
        # MAML's second derivatives are those of the model for groups, also of a group of one.
        self._is_one_by_one = executor._config.phases[task.phase].method != "maml"

    def expect(self, group: Sequence[int]) -> None:
        """Begin to read the clients of a group that will be trained here, and then those likely to follow them."""
        if self._executor._reader is not None:
            self._executor._reader.read_ahead([*group, *self._likely_next.get(group[0], ())])

    def train(self, group: Sequence[int]) -> list[ClientReport]:
        """Add the clients' updates to the sum, or refuse one and say why. May be called from several threads."""

        def work(lane: _Lane) -> list[ClientReport]:
            running = self._sums.get(lane)
            if running is None:
                running = self._sums[lane] = ExactSum.zeros(len(self._start), self._task.capacity, self._start.device)
            if len(group) == 1 and self._is_one_by_one:
                return self._executor._train_client(lane.single, group[0], self._task, self._start, running)
            return self._executor._train_group(lane.group, group, self._task, self._start, running)

        return self._executor._on_lane(group, work)

    def take_sum(self) -> ExactSum:
        """The sum over the clients trained since the last call, on the CPU. None may be in training meanwhile."""
        sums = list(self._sums.values()) or [ExactSum.zeros(len(self._start), self._task.capacity)]
        self._sums.clear()
        first, *others = sums
        for other in others:
            first.merge(other)
        first.total = first.total.cpu()
        return first


def _add(running: ExactSum, update: Tensor, phase: Phase, client_id: int, num_examples: int) -> str | None:
    """Add a client's update to a sum. Returns why it is refused, or None."""
    try:
        running.add(update, client_weight(phase, num_examples), client_id)
    except BadUpdateError as error:
        return str(error)
    return None
