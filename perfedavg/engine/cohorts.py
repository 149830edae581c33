"""Who takes part: the training clients of each round, those of them that are scored, and the clients behind the
accuracy curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from perfedavg.contracts import ClientDirectory
from perfedavg.seeding import Purpose, seed_sequence
from perfedavg.settings import ExperimentConfig, Phase


def draw_cohort(
    config: ExperimentConfig, train_client_ids: Sequence[int], phase: Phase, round_number: int
) -> tuple[int, ...]:
    """The clients of a round: uniform, without repeats, ascending. Follows from (seed, phase, round)."""
    sequence = seed_sequence(config.seed, Purpose.COHORT, phase=phase, round_number=round_number)
    return _draw(sequence, train_client_ids, config.cohort_size)


def draw_next_cohort(
    config: ExperimentConfig, train_client_ids: Sequence[int], phase: Phase, round_number: int
) -> tuple[int, ...]:
    """The clients of the round that follows, in this phase or the next one; none after the last round."""
    if round_number < config.phases[phase].num_rounds:
        return draw_cohort(config, train_client_ids, phase, round_number + 1)
    following = [later for later in config.phases if later > phase]
    return draw_cohort(config, train_client_ids, following[0], 1) if following else ()


def draw_eval_clients(config: ExperimentConfig, scored_client_ids: Sequence[int]) -> tuple[int, ...]:
    """The clients behind the accuracy curve: the same ones in every round. Follows from the seed.

    scored_client_ids: of the population that the curve is of (`Population.main`), those that are scored at the end.
    """
    sequence = seed_sequence(config.seed, Purpose.EVAL_CLIENTS)
    return _draw(sequence, scored_client_ids, min(config.eval_clients, len(scored_client_ids)))


def draw_trained_clients(config: ExperimentConfig, clients: ClientDirectory) -> tuple[int, ...]:
    """Clients that took part in training, to be scored: the same ones after each phase. Follows from the seed.

    They are drawn from those that are in a round of the run's first phase and have a test part. An update that was
    refused makes no difference. Where there is no round and no unseen client, so that there is nobody else to be
    scored, they are drawn from all clients that would train.
    """
    count, num_unseen = config.num_trained_scored, len(clients.unseen_client_ids)
    if count is None:
        count = num_unseen or len(clients.train_client_ids)
    first, settings = next(iter(config.phases.items()))
    rounds = range(1, settings.num_rounds + 1) if count else ()
    cohorts = (draw_cohort(config, clients.train_client_ids, first, number) for number in rounds)
    nobody_trains = not settings.num_rounds and not num_unseen
    took_part = np.array(clients.train_client_ids if nobody_trains else sorted(set().union(*cohorts)))
    order = np.random.default_rng(seed_sequence(config.seed, Purpose.TRAINED_CLIENTS)).permutation(took_part)
    has_test_part = getattr(clients, "has_test_part", lambda client_id: True)
    return tuple(sorted(islice(filter(has_test_part, order.tolist()), count)))


def _draw(sequence: np.random.SeedSequence, client_ids: Sequence[int], count: int) -> tuple[int, ...]:
    positions = np.random.default_rng(sequence).choice(len(client_ids), size=count, replace=False)
    return tuple(sorted(client_ids[position] for position in positions.tolist()))
