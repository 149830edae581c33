"""How long a client trains, counted in epochs or in steps, and what is measured on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
import torch
from helpers import Difference, Examples, QuadraticClients, half_squared_norm, make_config
from torch import Tensor, nn

from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import ScoringTask
from perfedavg.methods.reptile import Reptile
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.client_models import Client
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import LocalTraining
from perfedavg.training.stacked_model import StackedModel

BATCH_SIZE = 4
SIZES = (10, 9, 4, 3, 1)
"""The largest first, as groups are: three batches an epoch, again three, and one."""

OPTIMIZERS = {
    "sgd": OptimizerConfig("sgd", 0.1),
    "momentum": OptimizerConfig("momentum", 0.1),
    "adam": OptimizerConfig("adam", 0.01, betas=(0.0, 0.999)),
    "yogi": OptimizerConfig("yogi", 0.01, epsilon=1e-3),
    "adagrad": OptimizerConfig("adagrad", 0.01),
}
SGD = OPTIMIZERS["sgd"]
START = [2.0, -1.0]


def training(num_epochs: int = 1, num_steps: int | None = None, optimizer: OptimizerConfig = SGD) -> LocalTraining:
    return LocalTraining(optimizer, num_epochs, BATCH_SIZE, num_steps)


def seeds(client: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(5, spawn_key=(client,))


def model_with_dropout() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()


def examples(client: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(client)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (size,), generator=generator)


class Watched:
    """The quadratic loss, and which examples (by their labels) were in each batch and what their loss was."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.losses: list[float] = []

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        loss = half_squared_norm(outputs, labels)
        self.batches.append(labels.tolist())
        self.losses.append(loss.item())
        return loss


def watch(how: LocalTraining, size: int = 10) -> tuple[Watched, float, list[int]]:
    """Train a client on distinct examples: what was seen, what was returned, and which epochs were told of."""
    watched, told = Watched(), []
    inputs = torch.randn(size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = FlatModel(Difference(START), loss_function=watched)
    client = Client(inputs, torch.arange(size), seeds(0))
    (loss,) = model.train(model.vector, [client], how, after_epochs=lambda epochs: told.append(epochs[0]))
    return watched, loss, told


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 9])
def test_steps_are_counted_through_the_epochs(num_steps: int) -> None:
    """The first so many of the steps that epochs would take; ten examples are three batches an epoch."""
    epochs, _, _ = watch(training(num_epochs=3))
    steps, _, _ = watch(training(num_steps=num_steps))
    assert steps.batches == epochs.batches[:num_steps]
    assert steps.losses == epochs.losses[:num_steps]
    assert [len(batch) for batch in epochs.batches] == [4, 4, 2] * 3
    assert sorted(chain(*epochs.batches[3:6])) == list(range(10))


@pytest.mark.parametrize(("num_steps", "of_last_epoch"), [(1, 1), (2, 2), (3, 3), (4, 1), (8, 2)])
def test_the_loss_is_the_mean_over_the_examples_of_the_last_epoch_or_what_there_is_of_it(
    num_steps: int, of_last_epoch: int
) -> None:
    watched, loss, _ = watch(training(num_steps=num_steps))
    sizes = [len(batch) for batch in watched.batches]
    expected = sum(map(math.prod, zip(watched.losses[-of_last_epoch:], sizes[-of_last_epoch:], strict=True)))
    assert loss == pytest.approx(expected / sum(sizes[-of_last_epoch:]), rel=1e-12)


def test_the_end_of_each_epoch_is_told() -> None:
    assert watch(training(num_epochs=3))[2] == [0, 1, 2, 3]
    assert watch(training(num_steps=6))[2] == [0, 1, 2]
    assert watch(training(num_epochs=2), size=1)[2] == [0, 1, 2]


def test_no_step_changes_nothing() -> None:
    watched, loss, told = watch(training(num_steps=0))
    assert (watched.batches, told) == ([], [0])
    assert math.isnan(loss)
    stacked = StackedModel(Difference(START), 1, loss_function=half_squared_norm)
    member = Client(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), seeds(0))
    losses = stacked.train(torch.ones(2), [member], training(num_steps=0))
    assert math.isnan(losses[0])
    assert torch.equal(stacked.parameters, torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("client_batching", [1, 3])
def test_every_client_of_a_round_takes_so_many_steps(client_batching: int) -> None:
    """Of SGD at rate a on 0.5 * ||w - c||^2, each of which leaves 1 - a of the way to c, whatever the client's size."""
    sizes = (25, 7, 12, 40, 18)
    dataset = QuadraticClients([[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5]], sizes, num_unseen=1)
    phase = PhaseConfig(1, 1, SGD, OptimizerConfig("sgd", 1.0), num_local_steps=5)
    config = make_config(
        num_clients=5,
        fedavg=phase,
        fine_tune=dataclasses.replace(phase, method=Reptile()),
        client_batching=client_batching,
    )
    executor = LocalExecutor(config, Difference(START), dataset, loss_function=half_squared_norm)
    outcome = run_experiment(config, executor, dataset, ExperimentState.fresh(config, torch.tensor(START).double()))
    w, centres = torch.tensor(START, dtype=torch.float64), dataset.centres[:4]
    weights = torch.tensor(sizes[:4], dtype=torch.float64) / sum(sizes[:4])
    for mean_centre in (weights @ centres, centres.mean(0)):
        w = mean_centre + 0.9**5 * (w - mean_centre)
    torch.testing.assert_close(outcome.parameters, w, rtol=1e-12, atol=1e-12)


def members(sizes: Sequence[int] = SIZES) -> list[Client]:
    return [Client(*examples(client, size), seeds(client)) for client, size in enumerate(sizes)]


def one_by_one(clients: Sequence[Client], how: LocalTraining) -> tuple[Tensor, list[float]]:
    """What clients learn alone: parameters, a row a client, and losses."""
    model, rows, losses = FlatModel(model_with_dropout()), [], []
    for client in clients:
        losses += model.train(flatten(model_with_dropout()), [client], how)
        rows.append(model.vector.clone())
    return torch.stack(rows), losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "counted", [{"num_epochs": 2}, {"num_steps": 2}, {"num_steps": 7}], ids=["2 epochs", "2 steps", "7 steps"]
)
def test_a_group_is_its_clients_one_by_one(counted: dict[str, int], optimizer: str) -> None:
    """Two steps are less than an epoch of some clients, and more of others."""
    how, clients = training(**counted, optimizer=OPTIMIZERS[optimizer]), members()
    expected, expected_losses = one_by_one(clients, how)
    stacked = StackedModel(model_with_dropout(), len(clients) + 1)
    losses = stacked.train(flatten(model_with_dropout()), clients, how)
    torch.testing.assert_close(stacked.parameters, expected, rtol=1e-9, atol=1e-10)
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert (expected - flatten(model_with_dropout())).abs().amax(dim=1).min() > 1e-3, "every client learned something"


def test_a_group_is_what_its_clients_are_at_the_end_of_each_epoch() -> None:
    """Who has fewer batches ends an epoch earlier, and its row is then what it would have learned in so many epochs."""
    stacked = StackedModel(model_with_dropout(), len(SIZES))
    expected = {epoch: one_by_one(members(), training(num_epochs=epoch))[0] for epoch in (1, 2, 3)}
    expected[0] = flatten(model_with_dropout()).expand(len(SIZES), -1)
    told: dict[int, list[int]] = {client: [] for client in range(len(SIZES))}

    def measure(epochs: dict[int, int]) -> None:
        for client, epoch in epochs.items():
            torch.testing.assert_close(stacked.parameters[client], expected[epoch][client], rtol=1e-12, atol=1e-12)
            told[client].append(epoch)

    stacked.train(flatten(model_with_dropout()), members(), training(3), after_epochs=measure)
    assert told == {client: [0, 1, 2, 3] for client in range(len(SIZES))}


def test_a_group_has_the_largest_first() -> None:
    """Those that still train are so always the first rows."""
    stacked = StackedModel(model_with_dropout(), len(SIZES))
    with pytest.raises(ValueError, match="largest first"):
        stacked.train(flatten(model_with_dropout()), members()[::-1], training())


class UnseenClients:
    """A training client, and unseen ones of different sizes whose test parts have three examples each."""

    fingerprint = "unseen"
    train_client_ids = (99,)
    unseen_client_ids = range(len(SIZES))

    def num_train_examples(self, client_id: int) -> int:
        return SIZES[client_id] if client_id in self.unseen_client_ids else 1

    def client_data(self, client_id: int) -> Examples:
        return Examples(*examples(client_id, self.num_train_examples(client_id)), *examples(50 + client_id, 3))


def scores(config: ExperimentConfig, num_curve_epochs: int) -> list[ClientScore]:
    executor = LocalExecutor(config, model_with_dropout(), UnseenClients())
    task = ScoringTask(Phase.FEDAVG, 3, tuple(UnseenClients.unseen_client_ids), num_curve_epochs)
    return sorted(executor.score(task, flatten(model_with_dropout())), key=lambda score: score.client_id)


@pytest.mark.parametrize("client_batching", [1, 3])
@pytest.mark.parametrize("num_curve_epochs", [2, 4])
def test_a_point_of_the_curve_is_a_scoring_with_so_many_epochs(num_curve_epochs: int, client_batching: int) -> None:
    """A longer training begins as a shorter one, so that a curve costs one training.

    It may end before or behind the epochs by which clients are personalized, and changes nothing of the other scores.
    Of clients one by one, to the bit; a group's kernels round by how many still train.
    """
    config = make_config(
        batch_size=BATCH_SIZE,
        fedavg=PhaseConfig(1, 1, SGD, SGD),
        num_personalization_epochs=3,
        client_batching=client_batching,
    )
    tolerance = 0.0 if client_batching == 1 else 1e-12
    with_curve, without = scores(config, num_curve_epochs), scores(config, 0)
    for score, plain in zip(with_curve, without, strict=True):
        for values, expected in ((score.initial, plain.initial), (score.personalized, plain.personalized)):
            assert values == pytest.approx(expected, rel=tolerance, abs=0)
        assert len(score.by_epoch) == num_curve_epochs + 1
        assert score.by_epoch[0] == score.initial
    for epoch in range(1, num_curve_epochs + 1):
        shorter = scores(dataclasses.replace(config, num_personalization_epochs=epoch), 0)
        for score, plain in zip(with_curve, shorter, strict=True):
            assert score.by_epoch[epoch] == pytest.approx(plain.personalized, rel=tolerance, abs=0)
            assert score.by_epoch[epoch]["loss"] != score.by_epoch[epoch - 1]["loss"], "else nothing was learned in it"
