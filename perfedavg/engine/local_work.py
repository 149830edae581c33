"""A round and a scoring as one process does them, group by group."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from perfedavg.aggregation.base import RefusedUpdateError, check_buffers
from perfedavg.aggregation.exact_mean import ExactMean
from perfedavg.contracts import ClientData
from perfedavg.engine.client_reader import ClientReader
from perfedavg.engine.client_states import ClientState, check_kept, keep_buffers, with_own_buffers
from perfedavg.engine.cohorts import draw_cohort, draw_next_cohort
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.slots import SlotPool, TrainingSlot
from perfedavg.engine.tasks import ClientReport, CohortTask, CohortUpdate, ScoringTask, cut_into_groups
from perfedavg.metrics import Metric
from perfedavg.seeding import Purpose, seed_sequence
from perfedavg.settings import ExperimentConfig
from perfedavg.training.client_models import Client
from perfedavg.training.local_training import LocalTraining, local_training_of


@dataclass(frozen=True)
class Workplace:
    """What all work of a process is done with.

    num_buffer_entries: how many entries of the global model, the last ones, are buffers.
    """

    config: ExperimentConfig
    pool: SlotPool
    reader: ClientReader
    metrics: Mapping[str, Metric]
    num_buffer_entries: int = 0

    def client(self, client_id: int, data: ClientData, purpose: Purpose, task: CohortTask | ScoringTask) -> Client:
        """A client as its method sees it, with what it kept. purpose: that its seeds are for."""
        seeds = seed_sequence(
            self.config.seed, purpose, phase=task.phase, round_number=task.round_number, client_id=client_id
        )
        return Client(data.train_inputs, data.train_labels, seeds, task.states.get(client_id))

    def keeps_buffers(self, clients: Sequence[Client]) -> bool:
        """Whether buffers are each client's own. In a group of several they are constants, the same for all."""
        return self.config.buffers == "local" and len(clients) == 1

    def start_of(self, clients: Sequence[Client], start: Tensor) -> Tensor:
        """What clients start from, (num_parameters,): the global model, with the buffers that a client kept."""
        return with_own_buffers(start, clients[0].state) if self.keeps_buffers(clients) else start


class CohortTraining:
    """A round's training. What was trained so far can be taken out at any time.

    task: whose clients need not be known yet.  start: the global model, (num_parameters,), on the slots' device.
    """

    def __init__(self, place: Workplace, task: CohortTask, start: Tensor) -> None:
        self._place = place
        self._task = task
        self._start = start
        self._training = local_training_of(place.config, task.phase)
        self._method = place.config.phases[task.phase].method
        self._aggregation = self._method.aggregation()
        self._sums: dict[TrainingSlot, ExactMean] = {}
        self._reports: list[ClientReport] = []
        self._keeping: set[int] = set()
        self._likely_next = self._likely_next_groups() if place.reader.reads_ahead else {}

    def expect(self, group: Sequence[int]) -> None:
        """Begin to read the clients of a group that will be trained here, and then those likely to follow them."""
        self._place.reader.read_ahead([*group, *self._likely_next.get(group[0], ())])

    def train(self, group: Sequence[int]) -> list[ClientReport]:
        """Add the clients' updates to the sum, or refuse one and say why. May be called from several threads."""
        return self._place.pool.run(group, lambda slot: self._train(slot, group))

    def take_update(self) -> CohortUpdate:
        """Of the clients trained since the last call, on the CPU. None may be in training meanwhile."""
        sums = list(self._sums.values()) or [self._aggregation.begin(len(self._start), self._task.capacity)]
        self._sums.clear()
        first, *others = sums
        for other in others:
            first.merge(other)
        first.total = first.total.cpu()
        reports, self._reports = self._reports, []
        keeping, self._keeping = self._keeping, set()
        return CohortUpdate(first, reports, keeping=keeping)

    def _train(self, slot: TrainingSlot, group: Sequence[int]) -> list[ClientReport]:
        started = time.monotonic()
        models = slot.models(len(group), self._method.differentiates_training)
        place = self._place
        clients = [
            place.client(each, place.reader.client_data(each), Purpose.LOCAL_TRAINING, self._task) for each in group
        ]
        start = place.start_of(clients, self._start)
        updates, losses = self._method.update(models, start, clients, self._training)
        num_buffer_entries = place.num_buffer_entries
        if num_buffer_entries and self._method.sends_gradients:
            buffers = slice(-num_buffer_entries, None)
            updates[:, buffers] = models.parameters[:, buffers] - start[buffers]
        if place.keeps_buffers(clients):
            keep_buffers(self._start, start, updates[0], clients[0].state, num_buffer_entries)
        if slot not in self._sums:
            self._sums[slot] = self._aggregation.begin(len(self._start), self._task.capacity, self._start.device)
        refusals = [
            self._add(self._sums[slot], update, len(client.labels), client_id)
            for client_id, client, update in zip(group, clients, updates, strict=True)
        ]
        seconds = (time.monotonic() - started) / len(group)
        reports = []
        for client_id, client, loss, refused in zip(group, clients, losses, refusals, strict=True):
            reports.append(ClientReport(client_id, len(client.labels), loss, seconds, refused))
            if client.state and refused is None:
                self._keep(client_id, client.state)
        self._reports += reports
        return reports

    def _keep(self, client_id: int, state: ClientState) -> None:
        """Of copies, because a value may be a part of the slot's models."""
        kept = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        check_kept(self._place.config, self._task.phase, client_id, kept, len(self._start))
        self._task.states.put(client_id, kept)
        self._keeping.add(client_id)

    def _add(self, running: ExactMean, update: Tensor, num_examples: int, client_id: int) -> str | None:
        """Add a client's update to a sum. Returns why it is refused, or None."""
        try:
            if self._place.num_buffer_entries:
                check_buffers(update[-self._place.num_buffer_entries :], client_id)
            added = self._aggregation.before_add(update, len(self._start), client_id)
        except RefusedUpdateError as error:
            return str(error)
        running.add(added, self._method.weight(num_examples))
        return None

    def _likely_next_groups(self) -> dict[int, tuple[int, ...]]:
        """By the first client of a group, the group at the same place in the next round's order.

        Work is handed out in that order, so who trains the one now, alone or among others, is likely to train the other
        then. Drops what was read ahead for rounds before this one.
        """
        config, dataset = self._place.config, self._place.reader.dataset
        cohorts = [
            draw(config, dataset.train_client_ids, self._task.phase, self._task.round_number)
            for draw in (draw_cohort, draw_next_cohort)
        ]
        self._place.reader.keep_only([*cohorts[0], *cohorts[1]])
        present, following = (
            cut_into_groups(cohort, dataset.num_train_examples, config.client_batching or 1) for cohort in cohorts
        )
        return {group[0]: next_group for group, next_group in zip(present, following, strict=False)}


TakePersonalized = Callable[[int, Tensor], None]
"""Is given a client's id and the parameters of its model, (num_parameters,)."""


class ClientScoring:
    """Scores clients before and after adapting. Arguments as `CohortTraining` takes them."""

    def __init__(self, place: Workplace, task: ScoringTask, start: Tensor) -> None:
        config = place.config
        self._place = place
        self._task = task
        self._start = start
        self._method = config.phases[task.phase].method
        # Longer training begins as shorter training does, so one run of it gives the whole curve: to the bit for a
        # client alone, in a group up to rounding, because others may then still train beside it.
        num_epochs = max(task.num_curve_epochs, config.num_personalization_epochs)
        self._training = LocalTraining(config.fedavg.client_optimizer, num_epochs, config.batch_size)
        self._measured_epochs: Sequence[int] = (
            range(num_epochs + 1) if task.num_curve_epochs else (0, config.num_personalization_epochs)
        )

    def score(self, group: Sequence[int], take_personalized: TakePersonalized | None = None) -> list[ClientScore]:
        """The scores of clients. May be called from several threads.

        take_personalized: is given each client's personalized model when it is scored.
        """
        return self._place.pool.run(group, lambda slot: self._score(slot, group, take_personalized))

    def _score(
        self, slot: TrainingSlot, group: Sequence[int], take_personalized: TakePersonalized | None
    ) -> list[ClientScore]:
        models = slot.models(len(group))
        parts = [self._place.reader.client_data(client_id) for client_id in group]
        device = self._start.device
        tests = [(data.test_inputs.to(device), data.test_labels.to(device)) for data in parts]
        clients = [
            self._place.client(client_id, data, Purpose.PERSONALIZATION, self._task)
            for client_id, data in zip(group, parts, strict=True)
        ]
        measured: list[dict[int, dict[str, float]]] = [{} for _ in group]

        def measure(epochs: dict[int, int]) -> None:
            due = {client: epoch for client, epoch in epochs.items() if epoch in self._measured_epochs}
            if due:
                scores = models.score(tests[: max(due) + 1], self._place.metrics)
                for client, epoch in due.items():
                    measured[client][epoch] = scores[client]
                    if take_personalized is not None and epoch == self._place.config.num_personalization_epochs:
                        take_personalized(group[client], models.parameters[client].clone())

        start = self._place.start_of(clients, self._start)
        self._method.personalize(models, start, clients, self._training, measure)
        return [
            ClientScore(
                client_id,
                len(data.train_labels),
                len(data.test_labels),
                scores[0],
                scores[self._place.config.num_personalization_epochs],
                tuple(scores[epoch] for epoch in range(self._task.num_curve_epochs + 1))
                if self._task.num_curve_epochs
                else (),
            )
            for client_id, data, scores in zip(group, parts, measured, strict=True)
        ]
