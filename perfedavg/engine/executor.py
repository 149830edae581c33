"""The work of clients in this process. The experiment asks; an executor answers, with the same bits whoever it is.

`LocalExecutor` does the work here; the server of `multi_process` hands it to workers, each of which has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor, nn

from perfedavg.contracts import FederatedDataset
from perfedavg.engine.client_reader import ClientReader
from perfedavg.engine.local_work import ClientScoring, CohortTraining, Workplace
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.slots import Result, SlotPool, TrainingSlot
from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask, cut_into_groups
from perfedavg.machine.cores import usable_cores
from perfedavg.machine.kernels import KernelLog
from perfedavg.metrics import find_metrics
from perfedavg.own_files import is_own_code
from perfedavg.own_model import explain
from perfedavg.settings import ExperimentConfig, flag
from perfedavg.training.compute import check_portable, describe_kernels
from perfedavg.training.flat_model import FlatModel
from perfedavg.training.layout import count_buffer_entries
from perfedavg.training.local_training import Loss, loss_of
from perfedavg.training.precision import check_precision
from perfedavg.training.stacked_model import StackedModel


class LocalExecutor:
    """Trains and scores clients in this process, several side by side.

    num_slots: groups of clients trained at the same time, 1 or more. Each slot is a thread with models of its own whose
        kernels run on one core, so that slots change the speed, but not a bit of the result.
    num_readers: threads that read clients ahead while others train; by default none on a CPU, one a core beside a GPU.
    warnings: what a user should know before the first round, a line each.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: nn.Module,
        dataset: FederatedDataset,
        device: torch.device | str = "cpu",
        num_slots: int = 1,
        loss_function: Loss | None = None,
        num_readers: int | None = None,
    ) -> None:
        if config.client_batching is None:
            raise ValueError(f"{flag('client_batching')} auto has not been settled; see choose_group_size")
        self._group_size = group_size = config.client_batching
        self._dataset = dataset
        self.device = torch.device(device)
        check_portable(config, self.device)
        self.kernels = KernelLog()
        self.kernels.add(describe_kernels(self.device))
        if num_readers is None:
            # A CPU's cores are the slots', and reading takes them no less time in another thread.
            num_readers = 0 if self.device.type == "cpu" else usable_cores()
        loss = loss_function or loss_of(dataset)
        self.warnings = check_precision(config.precision, model, dataset, self.device, loss)

        def build_single() -> FlatModel:
            return FlatModel(model, device, config.precision, loss)

        def build_group() -> StackedModel:
            return StackedModel(model, group_size, device, config.precision, loss)

        if group_size > 1 or any(phase.method.differentiates_training for phase in config.phases.values()):
            build_group()  # now, because it may refuse the model
        slots = [TrainingSlot(build_single, build_group) for _ in range(num_slots)]
        settings = {field: getattr(config, field) for field in ("dataset", "architecture")}
        whose = " with ".join(f"{flag(field)} {value}" for field, value in settings.items() if is_own_code(value))
        self._pool = SlotPool(slots, explain(whose) if whose else None)
        reader, metrics = ClientReader(dataset, num_readers), find_metrics(config.own_metrics)
        self._place = Workplace(config, self._pool, reader, metrics, count_buffer_entries(model))

    @property
    def num_slots(self) -> int:
        return self._pool.num_slots

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        started = time.monotonic()
        training = self.begin_training(task, parameters)
        groups = self._groups(task.client_ids)
        task.states.read_ahead([client_id for group in groups for client_id in group])
        for group in groups:
            training.expect(group)
        self._pool.map(training.train, groups)
        update = training.take_update()
        update.slot_seconds = self.num_slots * (time.monotonic() - started)
        return update

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        groups = self._groups(task.client_ids)
        task.states.read_ahead([client_id for group in groups for client_id in group])
        return self._pool.map(self.begin_scoring(task, parameters).score, groups)

    def begin_training(self, task: CohortTask, parameters: Tensor) -> CohortTraining:
        """A round that takes its clients group by group; those that the task names need not be known yet."""
        return CohortTraining(self._place, task, parameters.to(self.device))

    def begin_scoring(self, task: ScoringTask, parameters: Tensor) -> ClientScoring:
        """A scoring that takes its clients group by group."""
        return ClientScoring(self._place, task, parameters.to(self.device))

    def submit(self, work: Callable[[Sequence[int]], Result], group: Sequence[int]) -> Future[Result]:
        """Call `work`, which trains or scores the group, in a thread of the pool."""
        return self._pool.submit(work, group)

    def _groups(self, client_ids: Sequence[int]) -> list[tuple[int, ...]]:
        return cut_into_groups(client_ids, self._dataset.num_train_examples, self._group_size)
