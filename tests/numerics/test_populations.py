"""Two populations are scored, always apart: clients that never train, and clients that took part."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import CountingFedAvg, Difference, QuadraticClients, half_squared_norm, make_config, with_method

from datasets.clients.views import JointView
from perfedavg.engine.cohorts import draw_cohort, draw_trained_clients
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentOutcome, ExperimentState, run_experiment
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig, Population
from perfedavg.training.flat_model import flatten

START = [2.0, -1.0]
NUM_TRAIN, NUM_UNSEEN = 12, 3
CENTRES = torch.randn(NUM_TRAIN + NUM_UNSEEN, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLIENTS = QuadraticClients(CENTRES.tolist(), (10,) * len(CENTRES), num_unseen=NUM_UNSEEN)
RATE = 0.5


def config(**changes: Any) -> ExperimentConfig:
    """Two of twelve clients a round; a local step goes half of the way to a client's centre."""
    phase = PhaseConfig(3, 1, OptimizerConfig("sgd", RATE), OptimizerConfig("sgd", 1.0), num_local_steps=1)
    fields = {"num_clients": 15, "cohort_size": 2, "fedavg": phase, "fine_tune": phase, "eval_clients": 1}
    return make_config(**{**fields, **changes})


def run(config: ExperimentConfig, clients: Any = CLIENTS, num_slots: int = 1) -> ExperimentOutcome:
    model = Difference(START)
    executor = LocalExecutor(config, model, clients, num_slots=num_slots, loss_function=half_squared_norm)
    return run_experiment(config, executor, clients, ExperimentState.fresh(config, flatten(model)))


def participants(config: ExperimentConfig, phase: Phase) -> set[int]:
    rounds = range(1, config.phases[phase].num_rounds + 1)
    return {client for number in rounds for client in draw_cohort(config, range(NUM_TRAIN), phase, number)}


@pytest.mark.parametrize(("asked", "num_scored"), [(None, NUM_UNSEEN), (2, 2), (1000, None), (0, 0)])
def test_who_took_part_is_scored_after_each_phase(asked: int | None, num_scored: int | None) -> None:
    """The same clients, so that phases can be compared on them; as many as there are unseen ones unless told."""
    settings = config(num_trained_scored=asked)
    took_part = participants(settings, Phase.FEDAVG)
    assert took_part < set(CLIENTS.train_client_ids), "or anybody would do"
    outcome = run(settings)
    for phase in Phase:
        by_population = {kind: [score.client_id for score in some] for kind, some in outcome.scores[phase].items()}
        assert by_population.pop(Population.UNSEEN) == list(CLIENTS.unseen_client_ids)
        trained = by_population.pop(Population.TRAINED, [])
        assert trained == list(draw_trained_clients(settings, CLIENTS))
        assert set(trained) <= took_part
        assert len(trained) == (len(took_part) if num_scored is None else num_scored)


def test_the_seed_draws_them_and_nothing_else_changes() -> None:
    drawn = {draw_trained_clients(config(seed=seed, num_trained_scored=2), CLIENTS) for seed in range(20)}
    assert len(drawn) > 5
    with_them, without = run(config()), run(config(num_trained_scored=0))
    assert torch.equal(with_them.parameters, without.parameters)
    for phase in Phase:
        assert with_them.scores[phase][Population.UNSEEN] == without.scores[phase][Population.UNSEEN]


def test_where_nobody_trained_nobody_is_scored_as_trained() -> None:
    untrained = dataclasses.replace(config().fedavg, num_rounds=0)
    assert list(run(config(fedavg=untrained, fine_tune=None)).scores[Phase.FEDAVG]) == [Population.UNSEEN]
    settings = config(fedavg=untrained)
    assert set(draw_trained_clients(settings, CLIENTS)) <= participants(settings, Phase.FINE_TUNE)


def test_clients_without_a_test_part_are_passed_over() -> None:
    """Of a user's own data set, whose training clients need none; and the one that has the data of all."""

    class SomeWithout(QuadraticClients):
        def has_test_part(self, client_id: int) -> bool:
            return client_id % 2 == 0

    some = SomeWithout(CENTRES.tolist(), (10,) * len(CENTRES), num_unseen=NUM_UNSEEN)
    drawn = draw_trained_clients(config(num_trained_scored=1000), some)
    assert drawn
    assert set(drawn) == {client for client in participants(config(), Phase.FEDAVG) if client % 2 == 0}
    assert draw_trained_clients(config(cohort_size=1), JointView(CLIENTS)) == ()
    with pytest.raises(ValueError, match="--trained_clients_scored 3 does not go with --joint"):
        config(cohort_size=1, joint=True, num_trained_scored=3)


@pytest.mark.parametrize(("client_batching", "num_slots"), [(1, 1), (1, 2), (2, 1)])
def test_trained_clients_are_scored_with_what_they_kept(client_batching: int, num_slots: int) -> None:
    """A counting client starts from the global model times 1 and the rounds of the phase in which it took part."""
    settings = config(client_batching=client_batching, num_trained_scored=1000)
    for phase in Phase:
        settings = with_method(settings, phase, CountingFedAvg())
    # Who took part in phase 1 need not have in phase 2, and keeps nothing there.
    outcome = run(settings, num_slots=num_slots)
    model = outcome.parameters
    rounds = dict.fromkeys(range(len(CENTRES)), 0)
    for number in range(1, settings.phases[Phase.FINE_TUNE].num_rounds + 1):
        for client in draw_cohort(settings, range(NUM_TRAIN), Phase.FINE_TUNE, number):
            rounds[client] += 1
    trained = outcome.scores[Phase.FINE_TUNE][Population.TRAINED]
    assert {rounds[score.client_id] for score in trained} >= {0, 1}
    for score in [*trained, *outcome.scores[Phase.FINE_TUNE][Population.UNSEEN]]:
        start = model * (1 + rounds[score.client_id])
        assert score.initial["loss"] == pytest.approx(loss_at(start, score.client_id), rel=1e-12)


def loss_at(w: torch.Tensor, client_id: int) -> float:
    inputs = CLIENTS.client_data(client_id).test_inputs
    return float(half_squared_norm(w - inputs, inputs))
