"""The experiment: FedAvg, Reptile fine-tuning, personalization of clients never seen in training.

Jiang, Konecny, Rush, Kannan 2019, "Improving Federated Learning Personalization via Model Agnostic Meta Learning",
arXiv 1909.12488. This is the only place where rounds are counted, whoever does the clients' work.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from perfedavg.client_data import ClientDirectory
from perfedavg.config import ExperimentConfig, Phase
from perfedavg.executor import CohortTask, Executor, ScoringTask, client_weight
from perfedavg.optimizers import ServerOptimizer
from perfedavg.scores import ClientScore, summarize
from perfedavg.seeding import Purpose, seed_sequence


@dataclass(frozen=True)
class RoundRecord:
    """What is known of a round when it ends.

    round_number: counted from 1 within its phase.
    train_loss: uniform mean over the cohort of the clients' mean losses over their last local epoch.
    update_norm: Euclidean norm of the mean update, before the server optimizer.
    seconds: wall time of training and aggregation, without evaluation.
    evaluation: `scores.summarize` over the clients of the curve, or None in a round without a point of the curve.
    """

    phase: Phase
    round_number: int
    client_ids: tuple[int, ...]
    num_examples: int
    train_loss: float
    update_norm: float
    seconds: float
    evaluation: dict[str, Any] | None


class Observer(Protocol):
    """Is told of progress as it happens: writes files, shows a display. Must not change the result."""

    def phase_started(self, phase: Phase, num_rounds: int) -> None: ...

    def round_ended(self, record: RoundRecord) -> None: ...

    def scoring_started(self, phase: Phase, num_clients: int) -> None: ...

    def phase_ended(self, phase: Phase, scores: Sequence[ClientScore]) -> None: ...


@dataclass(frozen=True)
class ExperimentOutcome:
    """The final global model, (num_parameters,), the scores of all unseen clients after each phase, and its cost."""

    parameters: Tensor
    scores: dict[Phase, list[ClientScore]]
    phase_seconds: dict[Phase, float]
    seconds: float

    @property
    def model_sha256(self) -> str:
        return parameters_sha256(self.parameters)


def run_experiment(
    config: ExperimentConfig,
    executor: Executor,
    clients: ClientDirectory,
    initial_parameters: Tensor,
    observers: Sequence[Observer] = (),
) -> ExperimentOutcome:
    """Train through every phase and score all unseen clients after each.

    initial_parameters: (num_parameters,), the global model to start from. The outcome follows from configuration,
    clients and initial parameters alone, to the bit, and not from which executor did the work.
    Raises ValueError where a round asks for more clients than there are to train.
    """
    config.check_cohort_size(len(clients.train_client_ids))
    started = time.monotonic()
    parameters = initial_parameters
    scores: dict[Phase, list[ClientScore]] = {}
    phase_seconds: dict[Phase, float] = {}
    unseen = tuple(clients.unseen_client_ids)
    curve_clients = draw_eval_clients(config, unseen)
    for phase, settings in config.phases.items():
        phase_started = time.monotonic()
        for observer in observers:
            observer.phase_started(phase, settings.num_rounds)
        server = ServerOptimizer(settings.server_optimizer, parameters)
        for round_number in range(1, settings.num_rounds + 1):
            record = _run_round(config, executor, clients, server, phase, round_number)
            if round_number == settings.num_rounds:
                for observer in observers:
                    observer.scoring_started(phase, len(unseen))
                scores[phase] = _score(executor, phase, round_number, unseen, server.parameters)
                point = [score for score in scores[phase] if score.client_id in curve_clients]
                record = replace(record, evaluation=summarize(point))
            elif round_number % config.eval_every == 0:
                point = _score(executor, phase, round_number, curve_clients, server.parameters)
                record = replace(record, evaluation=summarize(point))
            for observer in observers:
                observer.round_ended(record)
        parameters = server.parameters
        phase_seconds[phase] = time.monotonic() - phase_started
        for observer in observers:
            observer.phase_ended(phase, scores[phase])
    return ExperimentOutcome(parameters, scores, phase_seconds, time.monotonic() - started)


def _run_round(
    config: ExperimentConfig,
    executor: Executor,
    clients: ClientDirectory,
    server: ServerOptimizer,
    phase: Phase,
    round_number: int,
) -> RoundRecord:
    """Draw a cohort, let it train, and apply the mean of its updates to the global model."""
    started = time.monotonic()
    cohort = draw_cohort(config, clients.train_client_ids, phase, round_number)
    capacity = sum(client_weight(phase, clients.num_train_examples(client_id)) for client_id in cohort)
    parameters = server.parameters
    update = executor.train(CohortTask(phase, round_number, cohort, capacity), parameters)
    reports = sorted(update.reports, key=lambda report: report.client_id)
    assert [report.client_id for report in reports] == list(cohort), "every client of the cohort trains exactly once"
    assert update.sum.weight == capacity, "the sum holds the whole cohort"
    mean_update = update.sum.mean(parameters.dtype)
    server.step(mean_update)
    return RoundRecord(
        phase=phase,
        round_number=round_number,
        client_ids=cohort,
        num_examples=sum(report.num_examples for report in reports),
        train_loss=math.fsum(report.loss for report in reports) / len(reports),
        update_norm=float(torch.linalg.vector_norm(mean_update, dtype=torch.float64)),
        seconds=time.monotonic() - started,
        evaluation=None,
    )


def _score(
    executor: Executor, phase: Phase, round_number: int, client_ids: tuple[int, ...], parameters: Tensor
) -> list[ClientScore]:
    scores = executor.score(ScoringTask(phase, round_number, client_ids), parameters)
    scores.sort(key=lambda score: score.client_id)
    assert [score.client_id for score in scores] == sorted(client_ids), "every client is scored exactly once"
    return scores


def draw_cohort(
    config: ExperimentConfig, train_client_ids: Sequence[int], phase: Phase, round_number: int
) -> tuple[int, ...]:
    """The clients of a round: uniform, without repeats, ascending. Follows from (seed, phase, round)."""
    sequence = seed_sequence(config.seed, Purpose.COHORT, phase=phase, round_number=round_number)
    return _draw(sequence, train_client_ids, config.cohort_size)


def draw_eval_clients(config: ExperimentConfig, unseen_client_ids: Sequence[int]) -> tuple[int, ...]:
    """The unseen clients behind the accuracy curve: the same ones in every round. Follows from the seed."""
    sequence = seed_sequence(config.seed, Purpose.EVAL_CLIENTS)
    return _draw(sequence, unseen_client_ids, min(config.eval_clients, len(unseen_client_ids)))


def _draw(sequence: np.random.SeedSequence, client_ids: Sequence[int], count: int) -> tuple[int, ...]:
    positions = np.random.default_rng(sequence).choice(len(client_ids), size=count, replace=False)
    return tuple(sorted(client_ids[position] for position in positions.tolist()))


def parameters_sha256(parameters: Tensor) -> str:
    """SHA-256 of the parameters as little-endian numbers of their own type, in the order of the flat vector."""
    values = parameters.detach().cpu().contiguous().numpy()
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()).hexdigest()
