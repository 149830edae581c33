"""How long a run still takes, and how a round of a method compares with one of FedAvg."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace

from perfedavg.contracts import ClientDirectory
from perfedavg.methods.fedavg import FedAvg
from perfedavg.settings import ExperimentConfig, Phase, PhaseConfig, Population, flag

NUM_LAST_ROUNDS = 20
NUM_SAMPLED_CLIENTS = 100
DEAR = 1.5
"""A method that takes so many times as long as FedAvg with the same local steps says so at the start of a run."""


class TimeToGo:
    """Estimates the rest of a run from the rounds and scorings of this process.

    A phase that has had no round yet is estimated from another one, by what a round costs in local
    steps of FedAvg; a scoring from the rounds, until there has been one.
    """

    def __init__(self, config: ExperimentConfig, clients: ClientDirectory) -> None:
        self._config = config
        self._phases = config.phases
        self._clients = _Sample(config, clients)
        num_unseen, num_train = len(clients.unseen_client_ids), len(clients.train_client_ids)
        self._num_scored = {Population.UNSEEN: num_unseen} if num_unseen else {}
        if not config.joint:
            most = config.num_trained_scored
            wanted = (num_unseen or num_train) if most is None else most
            num_rounds = next(iter(self._phases.values())).num_rounds
            took_part = min(num_train, config.cohort_size * num_rounds) if num_rounds or num_unseen else num_train
            self._num_scored[Population.TRAINED] = min(wanted, took_part)
        self._num_on_curve = min(config.eval_clients, self._num_scored[Population.main(num_unseen)])
        self._rounds = {phase: deque[float](maxlen=NUM_LAST_ROUNDS) for phase in self._phases}
        self._seconds_of_scored_step: float | None = None

    def add_round(self, phase: Phase, seconds: float) -> None:
        """A round's training has taken so long."""
        self._rounds[phase].append(seconds)

    def add_point(self, seconds: float) -> None:
        """Scoring the clients of the curve has taken so long."""
        self._seconds_of_scored_step = seconds / self._steps_of_point()

    def expect_scoring(self, population: Population, num_clients: int) -> None:
        """So many clients of a population are scored after each phase."""
        self._num_scored[population] = num_clients

    def add_scoring(self, population: Population, seconds: float) -> None:
        """Scoring them has taken so long."""
        self._seconds_of_scored_step = seconds / self._steps_of_scoring(population)

    def of_run(self, phase: Phase, num_rounds: int, scored: Collection[Population] = ()) -> float | None:
        """The seconds left after so many rounds of a phase; None until a round or a scoring has been timed.

        scored: whom the scoring after the phase has done already.
        """
        rounds = {later: self.of_round(later) for later in self._phases if later >= phase}
        scorings = {population: self.of_scoring(population) for population in self._num_scored}
        step = self._of_scored_step()
        if step is None:
            return None
        left = 0.0
        for later, one_round in rounds.items():
            total, every = self._phases[later].num_rounds, self._config.eval_every
            done, over = (num_rounds, scored) if later is phase else (0, ())
            left += (total - done) * (one_round or 0.0)
            left += max(0, (total - 1) // every - done // every) * step * self._steps_of_point()
            left += sum(seconds or 0.0 for population, seconds in scorings.items() if population not in over)
        return left

    def of_round(self, phase: Phase) -> float | None:
        """The seconds of a round's training."""
        if self._rounds[phase]:
            return statistics.fmean(self._rounds[phase])
        step = self._of_trained_step()
        return None if step is None else step * self._steps_of_round(phase)

    def of_scoring(self, population: Population) -> float | None:
        """The seconds of scoring a population after a phase."""
        step = self._of_scored_step()
        return None if step is None else step * self._steps_of_scoring(population)

    def _of_scored_step(self) -> float | None:
        return self._of_trained_step() if self._seconds_of_scored_step is None else self._seconds_of_scored_step

    def _of_trained_step(self) -> float | None:
        for phase, rounds in self._rounds.items():
            if rounds:
                return statistics.fmean(rounds) / self._steps_of_round(phase)
        return self._seconds_of_scored_step

    def _steps_of_round(self, phase: Phase) -> float:
        return self._config.cohort_size * self._clients.round_cost(self._phases[phase])

    def _steps_of_point(self) -> float:
        return self._num_on_curve * self._clients.adapting_cost(self._config.num_personalization_epochs)

    def _steps_of_scoring(self, population: Population) -> float:
        num_epochs = max(self._config.num_personalization_epochs, self._config.num_curve_epochs)
        return self._num_scored[population] * self._clients.adapting_cost(num_epochs)


def describe_dear_methods(config: ExperimentConfig, clients: ClientDirectory) -> list[str]:
    """A line for each phase whose method is much slower than FedAvg: by how much, and what makes it faster."""
    sample, lines = _Sample(config, clients), []
    for phase, settings in config.phases.items():
        cost, plain = sample.round_cost(settings), sample.round_cost(replace(settings, method=FedAvg()))
        if cost < DEAR * plain:
            continue
        times = cost / sample.round_cost(replace(config.fedavg, method=FedAvg()))
        counted = "num_local_epochs" if settings.num_local_steps is None else "num_local_steps"
        how_many = f"{flag(f'{phase.field}.{counted}')} {getattr(settings, counted)}"
        how_long = f"about {times:.2g} times as long as one of FedAvg in phase 1"
        name = config.phase_label(phase) if phase is Phase.FEDAVG else f"{phase.label} with {settings.method.name}"
        lines.append(f"{name}: a round takes {how_long}; {how_many} can be lowered")
    return lines


class _Sample:
    """What a client costs on average, in local steps of FedAvg, from the sizes of some."""

    def __init__(self, config: ExperimentConfig, clients: ClientDirectory) -> None:
        self._batch_size = config.batch_size
        self._train_sizes = _sizes_of_some(clients, clients.train_client_ids)
        unseen = clients.unseen_client_ids
        self._scored_sizes = _sizes_of_some(clients, unseen) if len(unseen) else self._train_sizes

    def round_cost(self, settings: PhaseConfig) -> float:
        """Of a training client in a round."""

        def count_steps(num_examples: int) -> float:
            return settings.num_local_steps or settings.num_local_epochs * -(-num_examples // self._batch_size)

        return statistics.fmean(settings.method.round_cost(count_steps, size) for size in self._train_sizes)

    def adapting_cost(self, num_epochs: int) -> float:
        """Of a client that is scored."""
        return statistics.fmean(num_epochs * -(-size // self._batch_size) for size in self._scored_sizes)


def _sizes_of_some(clients: ClientDirectory, client_ids: Sequence[int]) -> list[int]:
    some = client_ids[:: -(-len(client_ids) // NUM_SAMPLED_CLIENTS)]
    return [clients.num_train_examples(client_id) for client_id in some]
