"""The experiment: FedAvg, fine-tuning, personalization of clients never seen in training, or of those that trained.

Jiang, Konecny, Rush, Kannan 2019, "Improving Federated Learning Personalization via Model Agnostic Meta Learning",
arXiv 1909.12488. This is the only place where rounds are counted, whoever does the clients' work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from perfedavg.contracts import ClientDirectory, ClientStateStore, Executor, Observer
from perfedavg.engine.client_states import StatesInMemory
from perfedavg.engine.cohorts import draw_cohort, draw_eval_clients, draw_trained_clients
from perfedavg.engine.scores import ClientScore, RunScores, check_evaluation, mean, summarize
from perfedavg.engine.tasks import CohortTask, ScoringTask
from perfedavg.plain_values import from_plain, shown
from perfedavg.seeding import Purpose, seed_sequence
from perfedavg.settings import ExperimentConfig, Phase, PhaseConfig, Population, flag
from perfedavg.training.optimizers import ServerOptimizer


@dataclass(frozen=True)
class RoundRecord:
    """What is known of a round when it ends.

    round_number: counted from 1 within its phase.
    num_examples: of the whole cohort.
    refused: why a client's update is not in the mean, by its id. Where all were refused, the model is as it was.
    train_loss: uniform mean of the clients' training losses (see `tasks.ClientReport.loss`), over those whose update
        was not refused; None where there is none.
    update_norm: Euclidean norm of the mean update, before the server optimizer and without buffers; 0 where all were
        refused.
    seconds: wall time of training and aggregation, without evaluation.
    idle_share: share of that time in which those who train had no client, 0 .. 1.
    lost_workers: why each worker that was lost in the round is gone, by its rank.
    evaluation: `scores.summarize` over the clients of the curve, or None in a round without a point of the curve.
    """

    phase: Phase
    round_number: int
    client_ids: tuple[int, ...]
    num_examples: int
    refused: dict[int, str]
    train_loss: float | None
    update_norm: float
    seconds: float
    idle_share: float
    lost_workers: dict[int, str]
    evaluation: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON, which turns the keys of `refused` and `lost_workers` into strings; `from_dict` undoes that."""
        return {**dataclasses.asdict(self), "phase": self.phase.field}

    @classmethod
    def from_dict(cls, values: Any) -> RoundRecord:
        """Raises ValueError where the values are not those of a record."""
        fields = from_plain(dict[str, Any], values)
        names = {phase.field: phase for phase in Phase}
        if fields.get("phase") not in list(names):
            raise ValueError(f"phase is {shown(fields.get('phase'))}, must be {' or '.join(names)}")
        record = from_plain(cls, {**fields, "phase": names[fields["phase"]]})
        if record.evaluation is not None:
            check_evaluation(record.evaluation)
        return record


@dataclass(eq=False)
class ExperimentState:
    """Where a run stands: all that decides how it goes on. `run_experiment` changes it, and nobody else.

    It changes in short steps under `lock`, between which it is consistent; another thread that holds the lock may
    save it as it is, so nobody needs copies of it. A state that was saved and loaded goes on to the same result.

    phase: current phase.
    num_rounds: completed rounds of the current phase.
    server: the global model and the state of the server's optimizer.
    client_states: what the phase's method lets clients keep between rounds.
    pending_record: the last round, until it has been evaluated and the observers have been told of it.
    scores: by population after each phase; those that are still to be scored are missing.
    phase_seconds: wall time of each phase so far, over all processes that took part in the run.
    step_failed: whether a step has failed in its middle (out of memory), so that the state must not be saved.
    """

    phase: Phase
    num_rounds: int
    server: ServerOptimizer
    client_states: ClientStateStore = field(default_factory=StatesInMemory)
    pending_record: RoundRecord | None = None
    scores: dict[Phase, dict[Population, list[ClientScore]]] = field(default_factory=dict)
    phase_seconds: dict[Phase, float] = field(default_factory=dict)
    step_failed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _clock: float | None = field(default=None, repr=False)

    @classmethod
    def fresh(
        cls,
        config: ExperimentConfig,
        initial_parameters: Tensor,
        num_buffer_entries: int = 0,
        client_states: ClientStateStore | None = None,
    ) -> ExperimentState:
        """Before the first round.

        initial_parameters: (num_parameters,), the global model to start from; copied.
        num_buffer_entries: how many of its entries, the last ones, are buffers.
        client_states: where what clients keep goes, which is nothing yet; by default into memory.
        """
        phase, settings = next(iter(config.phases.items()))
        server = ServerOptimizer(settings.server_optimizer, initial_parameters, num_buffer_entries)
        return cls(phase, 0, server, StatesInMemory() if client_states is None else client_states)

    @property
    def num_recorded(self) -> int:
        """Rounds of the present phase that the observers have been told of."""
        return self.num_rounds - (self.pending_record is not None)

    @property
    def has_begun(self) -> bool:
        """Whether any work has been done."""
        return self.num_rounds > 0 or bool(self.scores)

    @property
    def progress(self) -> tuple[Phase, int, bool, int]:
        """Equal for two states of one run where neither is ahead of the other."""
        return self.phase, self.num_rounds, self.pending_record is None, sum(map(len, self.scores.values()))

    @property
    def label(self) -> str:
        """What to call it: `FedAvg round 37`."""
        return f"{self.phase.label} round {self.num_rounds}" if self.num_rounds else f"the start of {self.phase.label}"

    def start_clock(self) -> None:
        """From now on, time is the present phase's."""
        self._clock = time.monotonic()

    def read_clock(self) -> None:
        """Add the time since the last reading to the present phase's. The caller holds the lock."""
        if self._clock is not None:
            now = time.monotonic()
            self.phase_seconds[self.phase] = self.phase_seconds.get(self.phase, 0.0) + now - self._clock
            self._clock = now

    def stop_clock(self) -> None:
        """Until it is started again, time is nobody's."""
        with self.lock:
            self.read_clock()
            self._clock = None

    def end_round(
        self, mean_update: Tensor | None, rate_factor: float, record: RoundRecord, keeping: Iterable[int]
    ) -> None:
        """Take the server's step, or none where every update was refused; the round then waits to be recorded.

        rate_factor: see `PhaseConfig.server_rate_factor`.  keeping: see `tasks.CohortUpdate`.
        """
        with self.lock:
            self.step_failed = True
            if mean_update is not None:
                self.server.step(mean_update, rate_factor)
            self.client_states.commit(keeping)
            self.num_rounds += 1
            self.pending_record = record
            self.step_failed = False
            self.read_clock()

    def add_scores(self, population: Population, scores: list[ClientScore]) -> None:
        """Those of a population, after the last round of the present phase."""
        with self.lock:
            self.scores.setdefault(self.phase, {})[population] = scores
            self.read_clock()

    def mark_recorded(self) -> None:
        """The observers have been told of the last round."""
        with self.lock:
            self.pending_record = None
            self.read_clock()

    def begin_phase(self, phase: Phase, settings: PhaseConfig) -> None:
        """Go on to the next phase, with the same model, a fresh server optimizer, and clients that keep nothing."""
        with self.lock:
            self.read_clock()
            server = self.server
            self.server = ServerOptimizer(settings.server_optimizer, server.parameters, server.num_buffer_entries)
            self.client_states.reset()
            self.phase, self.num_rounds = phase, 0


@dataclass(frozen=True)
class ExperimentOutcome:
    """The final global model, (num_parameters,), the scores after each phase, and its cost."""

    parameters: Tensor
    scores: RunScores
    phase_seconds: dict[Phase, float]

    @classmethod
    def of(cls, state: ExperimentState) -> ExperimentOutcome:
        """Of a run that has come to its end."""
        return cls(state.server.parameters, state.scores, state.phase_seconds)

    @property
    def seconds(self) -> float:
        return math.fsum(self.phase_seconds.values())

    @property
    def model_sha256(self) -> str:
        return parameters_sha256(self.parameters)


def run_experiment(
    config: ExperimentConfig,
    executor: Executor,
    clients: ClientDirectory,
    state: ExperimentState,
    observers: Sequence[Observer] = (),
) -> ExperimentOutcome:
    """Train through every phase from where `state` stands, and score clients after each: all unseen ones, and
    some that took part; without unseen ones, all that took part.

    The outcome follows from configuration, clients and initial parameters alone, to the bit, and not from which
    executor did the work, nor from how often the run was stopped and went on from its state.
    Raises ValueError where a round asks for more clients than there are to train, or nobody would be scored.
    """
    for _ in experiment_rounds(config, executor, clients, state, observers):
        pass
    return ExperimentOutcome.of(state)


def experiment_rounds(
    config: ExperimentConfig,
    executor: Executor,
    clients: ClientDirectory,
    state: ExperimentState,
    observers: Sequence[Observer] = (),
) -> Iterator[RoundRecord]:
    """As `run_experiment`, round by round: each when it has been recorded. Between two, the state may be saved.

    Time that the caller takes between two rounds does not count.
    """
    check_clients(config, clients)
    return _Run(config, executor, clients, state, observers).go_on()


def check_clients(config: ExperimentConfig, clients: ClientDirectory) -> None:
    """Raises ValueError where a round asks for more clients than there are to train, or nobody would be scored."""
    config.check_cohort_size(len(clients.train_client_ids))
    if len(clients.unseen_client_ids) or draw_trained_clients(config, clients):
        return
    if config.num_trained_scored == 0:
        raise ValueError(
            f"there are no unseen clients and {flag('num_trained_scored')} 0 scores no others; use a higher number, or "
            f"{flag('unseen_fraction')} above 0"
        )
    raise ValueError(
        "there are no unseen clients, and no client that took part in training has a test part to be scored on; give "
        "clients a test part, or let some be unseen"
    )


@dataclass(frozen=True)
class _Run:
    """Arguments as `run_experiment` takes them."""

    config: ExperimentConfig
    executor: Executor
    clients: ClientDirectory
    state: ExperimentState
    observers: Sequence[Observer]

    def go_on(self) -> Iterator[RoundRecord]:
        """From where the state stands to the end."""
        state = self.state
        state.start_clock()
        for phase, settings in self.config.phases.items():
            if phase < state.phase:
                continue
            if phase is not state.phase:
                state.begin_phase(phase, settings)
            for observer in self.observers:
                observer.phase_started(phase, settings.num_rounds, state.num_recorded)
            while state.num_recorded < settings.num_rounds:
                if state.pending_record is None:
                    self._train_round()
                record = self._record_round()
                state.stop_clock()
                yield record
                state.start_clock()
            self._score_populations()
            for observer in self.observers:
                observer.phase_ended(phase, state.scores)

    def _train_round(self) -> None:
        """Draw a cohort, let it train, and apply the mean of its updates to the global model."""
        started = time.monotonic()
        config, clients, state = self.config, self.clients, self.state
        phase, round_number = state.phase, state.num_rounds + 1
        method = config.phases[phase].method
        cohort = draw_cohort(config, clients.train_client_ids, phase, round_number)
        capacity = sum(method.weight(clients.num_train_examples(client_id)) for client_id in cohort)
        state.client_states.begin_round(phase, round_number)
        task = CohortTask(phase, round_number, cohort, capacity, state.client_states)
        update = self.executor.train(task, state.server.parameters)
        update.reports.sort(key=lambda report: report.client_id)
        assert tuple(report.client_id for report in update.reports) == cohort, "every client of the cohort trains once"
        accepted = [report for report in update.reports if report.refused is None]
        weight = sum(method.weight(report.num_examples) for report in accepted)
        assert update.sum.weight == weight, "the sum holds every update that was not refused"
        mean_update: Tensor | None = None
        if accepted:
            seeds = seed_sequence(config.seed, Purpose.AGGREGATION, phase=phase, round_number=round_number)
            mean_update = method.aggregation().after_mean(update.sum.finish(state.server.dtype), len(accepted), seeds)
        norm = 0.0
        if mean_update is not None:
            stepped_on = state.server.without_buffers(mean_update)
            norm = float(torch.linalg.vector_norm(stepped_on, dtype=torch.float64))
        record = RoundRecord(
            phase=phase,
            round_number=round_number,
            client_ids=cohort,
            num_examples=sum(report.num_examples for report in update.reports),
            refused={report.client_id: report.refused for report in update.reports if report.refused is not None},
            train_loss=mean([report.loss for report in accepted]) if accepted else None,
            update_norm=norm,
            seconds=time.monotonic() - started,
            idle_share=update.idle_share,
            lost_workers=dict(update.lost_workers),
            evaluation=None,
        )
        state.end_round(mean_update, config.phases[phase].server_rate_factor(round_number), record, update.keeping)

    def _record_round(self) -> RoundRecord:
        """Score the clients of the curve where the round that has been trained is a time to, and tell of the round."""
        state, record = self.state, self.state.pending_record
        assert record is not None, "a round has been trained"
        point: list[ClientScore] | None = None
        if state.num_rounds == self.config.phases[state.phase].num_rounds:
            self._score_populations()
            curve_clients = draw_eval_clients(self.config, self._main_clients)
            scores = state.scores[state.phase][self._main_population]
            point = [score for score in scores if score.client_id in curve_clients]
        elif state.num_rounds % self.config.eval_every == 0:
            point = self._score(draw_eval_clients(self.config, self._main_clients))
        if point is not None:
            record = replace(record, evaluation=summarize(point))
        for observer in self.observers:
            observer.round_ended(record)
        state.mark_recorded()
        for observer in self.observers:
            observer.checkpoint_due(state)
        return record

    def _score_populations(self) -> None:
        """The results after the present phase that are not there yet, epoch by epoch where that is asked for."""
        phase = self.state.phase
        known = self.state.scores.get(phase, {})
        for population, client_ids in self._populations.items():
            if client_ids and population not in known:
                for observer in self.observers:
                    observer.scoring_started(phase, population, len(client_ids))
                self.state.add_scores(population, self._score(client_ids, self.config.num_curve_epochs))

    @property
    def _main_population(self) -> Population:
        return Population.main(len(self.clients.unseen_client_ids))

    @property
    def _main_clients(self) -> tuple[int, ...]:
        return self._populations[self._main_population]

    @cached_property
    def _populations(self) -> dict[Population, tuple[int, ...]]:
        """Who is scored after each phase."""
        return {
            Population.UNSEEN: tuple(self.clients.unseen_client_ids),
            Population.TRAINED: draw_trained_clients(self.config, self.clients),
        }

    def _score(self, client_ids: tuple[int, ...], num_curve_epochs: int = 0) -> list[ClientScore]:
        state = self.state
        task = ScoringTask(state.phase, state.num_rounds, client_ids, num_curve_epochs, state.client_states)
        scores = self.executor.score(task, state.server.parameters)
        scores.sort(key=lambda score: score.client_id)
        assert [score.client_id for score in scores] == sorted(client_ids), "every client is scored exactly once"
        return scores


def parameters_sha256(parameters: Tensor) -> str:
    """SHA-256 of the parameters as little-endian numbers of their own type, in the order of the flat vector."""
    values = parameters.detach().cpu().contiguous().numpy()
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()).hexdigest()
