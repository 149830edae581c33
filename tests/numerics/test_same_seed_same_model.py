"""Same seed, same bits: however many clients train side by side, in whatever order, whoever adds the sums."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from helpers import digits_dataset, make_config
from torch import Tensor, nn

from datasets.clients.split import SplitDataset
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, parameters_sha256, run_experiment
from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask, cut_into_groups
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.flat_model import flatten

SGD = OptimizerConfig("sgd", 0.1)
CONFIG = make_config(cohort_size=6, fedavg=PhaseConfig(2, 1, SGD, OptimizerConfig("momentum", 1.0)), eval_every=100)
IN_GROUPS = dataclasses.replace(CONFIG, client_batching=4)  # four clients, then two


@cache
def dataset() -> SplitDataset:
    return digits_dataset(20)


def model_with_dropout() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(576, 32),
            nn.Dropout(0.6),
            nn.Linear(32, 10),
        )


def executor(num_slots: int, config: ExperimentConfig = CONFIG) -> LocalExecutor:
    return LocalExecutor(config, model_with_dropout(), dataset(), num_slots=num_slots)


def train(slots: int, client_ids: tuple[int, ...], capacity: int, round_number: int = 1) -> CohortUpdate:
    task = CohortTask(Phase.FEDAVG, round_number, client_ids, capacity)
    return executor(slots).train(task, flatten(model_with_dropout()))


@cache
def final_model(slots: int, config: ExperimentConfig = CONFIG) -> Tensor:
    state = ExperimentState.fresh(config, flatten(model_with_dropout()))
    return run_experiment(config, executor(slots, config), dataset(), state).parameters


@pytest.mark.parametrize("config", [CONFIG, IN_GROUPS, dataclasses.replace(CONFIG, precision="bf16")])
def test_slots_do_not_change_a_bit(config: ExperimentConfig) -> None:
    models = [final_model(slots, config) for slots in (1, 2, 3)]
    assert torch.equal(models[0], models[1])
    assert torch.equal(models[0], models[2])
    assert parameters_sha256(models[0]) == parameters_sha256(models[2])


def test_groups_change_no_more_than_the_rounding() -> None:
    """Through both phases, dropout included; the scores too."""
    start = flatten(model_with_dropout())
    torch.testing.assert_close(final_model(2, IN_GROUPS), final_model(2), rtol=1e-4, atol=1e-5)
    task = ScoringTask(Phase.FEDAVG, 1, tuple(dataset().unseen_client_ids))
    for together, alone in zip(
        sorted(executor(1, IN_GROUPS).score(task, start), key=lambda score: score.client_id),
        sorted(executor(1).score(task, start), key=lambda score: score.client_id),
        strict=True,
    ):
        assert together.initial == pytest.approx(alone.initial, rel=1e-4)
        assert together.personalized == pytest.approx(alone.personalized, rel=1e-4)


def test_groups_follow_from_the_clients_alone() -> None:
    """Largest first, equal ones by their id, whatever the order in which they are named."""
    sizes = {7: 10, 3: 30, 9: 10, 1: 20, 4: 10}
    expected = [(3, 1), (4, 7), (9,)]
    assert cut_into_groups([7, 3, 9, 1, 4], sizes.__getitem__, 2) == expected
    assert cut_into_groups([1, 4, 3, 9, 7], sizes.__getitem__, 2) == expected


def test_another_seed_gives_another_model() -> None:
    assert not torch.equal(final_model(1), final_model(1, dataclasses.replace(CONFIG, seed=1)))


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_cohort_may_be_cut_anywhere(cut: int) -> None:
    clients = (9, 2, 14, 0, 5, 7)
    capacity = sum(dataset().num_train_examples(client_id) for client_id in clients)
    whole = train(1, clients, capacity)
    part, rest = train(1, clients[cut:], capacity), train(2, clients[:cut], capacity)
    part.sum.merge(rest.sum)
    assert torch.equal(part.sum.finish(), whole.sum.finish())
    losses = [
        {report.client_id: report.loss for report in reports}
        for reports in (part.reports + rest.reports, whole.reports)
    ]
    assert losses[0] == losses[1]


def test_a_sum_may_be_taken_out_in_the_middle_of_a_round() -> None:
    """A worker that gave its sum away and is then handed the clients of a lost one begins a new sum."""
    clients = (9, 2, 14, 0, 5)
    capacity = sum(dataset().num_train_examples(client_id) for client_id in clients)
    training = executor(2).begin_training(CohortTask(Phase.FEDAVG, 1, (), capacity), flatten(model_with_dropout()))
    taken = []
    for part in (clients[:2], clients[2:]):
        for client_id in part:
            training.train((client_id,))
        taken.append(training.take_update().sum)
    taken[0].merge(taken[1])
    assert torch.equal(taken[0].total, train(1, clients, capacity).sum.total)
    assert training.take_update().sum.weight == 0


def test_a_clients_work_follows_from_its_round() -> None:
    """The same client in another round sees its examples in another order, and other dropout masks."""
    capacity = dataset().num_train_examples(3)
    assert not torch.equal(train(1, (3,), capacity, 1).sum.total, train(1, (3,), capacity, 2).sum.total)


def test_scores_do_not_depend_on_order_or_slots() -> None:
    clients = tuple(dataset().unseen_client_ids)
    start = flatten(model_with_dropout())
    one = executor(1).score(ScoringTask(Phase.FEDAVG, 1, clients), start)
    two = executor(2).score(ScoringTask(Phase.FEDAVG, 1, clients[::-1]), start)
    assert sorted(one, key=lambda score: score.client_id) == sorted(two, key=lambda score: score.client_id)


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train(1, (3, 4), 1000).sum.total
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(train(1, (3, 4), 1000).sum.total, first)
