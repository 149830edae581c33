"""MAML and FOMAML as clients compute them: in groups as alone, from the parts that a client's identity cuts for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from helpers import Difference, QuadraticClients, digits_dataset, half_squared_norm, make_config
from torch import Tensor, nn

from datasets.clients.split import SplitDataset
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentOutcome, ExperimentState, run_experiment
from perfedavg.methods import METHODS
from perfedavg.methods.maml import MAML
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig, Population
from perfedavg.training import client_models
from perfedavg.training.client_models import Client, ClientModels, Query
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import LocalTraining
from perfedavg.training.stacked_model import StackedModel
from perfedavg.training.support_query import cut_client

SGD = OptimizerConfig("sgd", 0.1)
ADAM = OptimizerConfig("adam", 0.01)
LEFT_OUT = PhaseConfig(0, 1, SGD, SGD)
SIZES = (14, 9, 6, 3, 1)
"""Of one example, support and query part are the same."""
Task = tuple[Client, Query]

TRAININGS = {
    "epochs": LocalTraining(SGD, num_epochs=2, batch_size=4),
    "less than an epoch": LocalTraining(SGD, num_epochs=1, batch_size=2, num_steps=2),
    "more than an epoch": LocalTraining(SGD, num_epochs=1, batch_size=3, num_steps=7),
}


def convolutional(dropout: float) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout))
        return nn.Sequential(*layers, nn.Linear(27, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).double()


@pytest.fixture(params=[0.0, 0.4], ids=["cnn", "dropout"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return convolutional(request.param)


@pytest.fixture(params=TRAININGS)
def training(request: pytest.FixtureRequest) -> LocalTraining:
    return TRAININGS[request.param]


def seeds(client: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(5, spawn_key=(client,))


def examples(client: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(client)
    inputs = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (size,), generator=generator)


def cut(client: int, size: int, support_fraction: float) -> Task:
    return cut_client(Client(*examples(client, size), seeds(client)), support_fraction)


def tasks(sizes: Sequence[int] = SIZES, support_fraction: float = 0.6) -> list[Task]:
    return [cut(client, size, support_fraction) for client, size in enumerate(sizes)]


def differentiate(
    method: str, models: ClientModels, start: Tensor, clients: Sequence[Task], training: LocalTraining
) -> tuple[Tensor, list[float]]:
    supports, queries = [support for support, _ in clients], [query for _, query in clients]
    if method == "maml":
        return models.gradients_through_training(start, supports, queries, training)
    models.train(start, supports, training)
    return models.gradients(queries)


def together(
    method: str, model: nn.Module, clients: Sequence[Task], training: LocalTraining
) -> tuple[Tensor, list[float]]:
    """A group's gradients and losses, with a place more than clients, from a stack that does not hold the start yet."""
    stacked = StackedModel(model, len(clients) + 1)
    stacked.parameters.fill_(torch.nan)
    return differentiate(method, stacked, flatten(model), clients, training)


def one_by_one(
    method: str, model: nn.Module, clients: Sequence[Task], training: LocalTraining
) -> tuple[Tensor, list[float]]:
    """Each client's, FOMAML's with the model for one client, which is trained by other code."""
    models = StackedModel(model, 1) if method == "maml" else FlatModel(model)
    alone = [differentiate(method, models, flatten(model), [client], training) for client in clients]
    return torch.cat([gradients for gradients, _ in alone]), [loss for _, (loss,) in alone]


@pytest.mark.parametrize("method", ["fomaml", "maml"])
def test_a_group_is_its_clients_one_by_one(method: str, model: nn.Module, training: LocalTraining) -> None:
    """Clients of unequal sizes end at different steps, and have query parts of different sizes."""
    expected, expected_losses = one_by_one(method, model, tasks(), training)
    gradients, losses = together(method, model, tasks(), training)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)
    assert losses == pytest.approx(expected_losses, rel=1e-10)
    assert expected.abs().amax(dim=1).min() > 1e-3, "every client has one"


def test_both_measure_the_same_loss_and_differ_by_second_derivatives(model: nn.Module, training: LocalTraining) -> None:
    (first, first_losses), (second, second_losses) = (
        together(method, model, tasks(), training) for method in ("fomaml", "maml")
    )
    assert second_losses == pytest.approx(first_losses, rel=1e-10)
    assert (first - second).abs().amax(dim=1).min() > 1e-4


def test_fomaml_takes_any_optimizer_on_the_way() -> None:
    """MAML cannot; its configuration says so."""
    model, training = convolutional(0.4), LocalTraining(ADAM, 2, 4)
    expected, _ = one_by_one("fomaml", model, tasks(), training)
    gradients, _ = together("fomaml", model, tasks(), training)
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"--fine_tune_method maml .* --fine_tune_client_optimizer adam: .* use sgd"):
        make_config(fine_tune=PhaseConfig(1, 1, ADAM, SGD, method=MAML()))


@pytest.mark.parametrize("method", ["fomaml", "maml"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_client_that_diverges_diverges_alone(method: str, poison: float) -> None:
    """The largest, whose steps the others wait for, and the smallest, which waits."""
    model, training = convolutional(0.4), TRAININGS["epochs"]
    gradients, losses = together(method, model, tasks(), training)
    for place in (SIZES.index(max(SIZES)), SIZES.index(min(SIZES))):
        clients = tasks()
        clients[place][0].inputs.mul_(poison)
        sick_gradients, sick_losses = together(method, model, clients, training)
        others = [other for other in range(len(SIZES)) if other != place]
        assert not sick_gradients[place].isfinite().all()
        assert torch.equal(sick_gradients[others], gradients[others])
        assert [sick_losses[other] for other in others] == [losses[other] for other in others]


@pytest.mark.parametrize("method", ["fomaml", "maml"])
def test_bf16_points_where_float32_does(method: str) -> None:
    """bfloat16 keeps 8 bits; the second derivatives survive that."""
    model, training = convolutional(0.4).float(), TRAININGS["epochs"]
    clients = [
        (dataclasses.replace(support, inputs=support.inputs.float()), query._replace(inputs=query.inputs.float()))
        for support, query in tasks()
    ]
    exact, rounded = (
        differentiate(method, StackedModel(model, len(SIZES), precision=precision), flatten(model), clients, training)[
            0
        ]
        for precision in ("float32", "bf16")
    )
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert torch.linalg.vector_norm(rounded - exact) < 0.1 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("support_fraction", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("size", [2, 3, 10, 31])
def test_the_cut_loses_and_repeats_nothing(size: int, support_fraction: float) -> None:
    inputs, labels = torch.arange(size)[:, None], 100 + torch.arange(size)
    support, query = cut_client(Client(inputs, labels, seeds(0)), support_fraction)
    assert len(support.labels) == min(max(round(size * support_fraction), 1), size - 1)
    assert sorted([*support.labels.tolist(), *query.labels.tolist()]) == labels.tolist()
    for part in (support, query):
        assert torch.equal(part.inputs[:, 0] + 100, part.labels)


def test_the_cut_follows_from_the_clients_seeds() -> None:
    """And is random: sorted labels must not end up in one part."""
    parts = [cut_client(Client(*examples(0, 30), seeds(client)), 0.5)[1].inputs for client in (0, 0, 1)]
    assert torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[0], parts[2])
    labels = torch.arange(1000)
    _, query = cut_client(Client(labels[:, None], labels, seeds(0)), 0.5)
    assert 400 < query.labels.double().mean() < 600


@pytest.mark.parametrize(("size", "support_fraction"), [(1, 0.5), (1, 1.0), (10, 1.0)])
def test_both_parts_may_be_all_examples(size: int, support_fraction: float) -> None:
    inputs, labels = examples(0, size)
    for part in cut_client(Client(inputs, labels, seeds(0)), support_fraction):
        assert torch.equal(part.inputs, inputs)
        assert torch.equal(part.labels, labels)


START = [2.0, -1.0]
CENTRES = [[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5]]


@pytest.mark.parametrize("client_batching", [1, 3])
@pytest.mark.parametrize(("method", "times"), [("fomaml", 1), ("maml", 2)])
def test_clients_with_a_quadratic_loss_have_a_closed_form(method: str, times: int, client_batching: int) -> None:
    """K steps at rate a on 0.5 * ||w - c||^2 lead from w to a gradient of (1 - a)^K (w - c); MAML has the factor twice.

    Two rounds, with equal weights whatever the clients' sizes, and a server rate that falls.
    """
    server = OptimizerConfig("sgd", 0.8)
    phase = PhaseConfig(2, 1, SGD, server, num_local_steps=3, server_schedule="linear", method=METHODS[method]())
    config = make_config(num_clients=5, fedavg=LEFT_OUT, fine_tune=phase, client_batching=client_batching)
    dataset, model = QuadraticClients(CENTRES, (25, 7, 12, 40, 18), num_unseen=1), Difference(START)
    executor = LocalExecutor(config, model, dataset, loss_function=half_squared_norm)
    outcome = run_experiment(config, executor, dataset, ExperimentState.fresh(config, flatten(model)))
    w, mean_centre = torch.tensor(START, dtype=torch.float64), dataset.centres[:4].mean(0)
    for rate in (0.8, 0.4):
        w = w - rate * 0.9 ** (3 * times) * (w - mean_centre)
    torch.testing.assert_close(outcome.parameters, w, rtol=1e-12, atol=1e-12)


@cache
def digits() -> SplitDataset:
    return digits_dataset(20)


def dense_with_dropout() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(784, 16), nn.Tanh(), nn.Linear(16, 10))


@cache
def run(config: ExperimentConfig, num_slots: int) -> ExperimentOutcome:
    executor = LocalExecutor(config, dense_with_dropout(), digits(), num_slots=num_slots)
    state = ExperimentState.fresh(config, flatten(dense_with_dropout()))
    return run_experiment(config, executor, digits(), state)


@pytest.mark.parametrize("client_batching", [1, 4])
@pytest.mark.parametrize("method", ["fomaml", "maml"])
def test_slots_do_not_change_a_bit(method: str, client_batching: int) -> None:
    """Six clients a round, in groups of four and two. What a client sends is float32."""
    fine_tune = PhaseConfig(2, 1, SGD, OptimizerConfig("adam", 0.01), method=METHODS[method]())
    config = make_config(cohort_size=6, client_batching=client_batching, fine_tune=fine_tune, num_curve_epochs=2)
    one, two = run(config, 1), run(config, 2)
    assert torch.equal(one.parameters, two.parameters)
    assert one.scores == two.scores
    assert not torch.equal(one.parameters, run(make_config(cohort_size=6), 1).parameters)
    scores = one.scores[Phase.FINE_TUNE][Population.UNSEEN]
    assert all(len(score.by_epoch) == 3 for score in scores)


@pytest.mark.parametrize("method", ["fomaml", "maml"])
def test_a_clients_task_follows_from_its_round(method: str) -> None:
    """Two rounds at a server rate of almost nothing: another cut, so another loss of the same clients."""
    fine_tune = PhaseConfig(2, 1, SGD, OptimizerConfig("sgd", 1e-30), method=METHODS[method]())
    config = make_config(cohort_size=16, fedavg=LEFT_OUT, fine_tune=fine_tune)
    losses: list[float | None] = []

    class Listener:
        def round_ended(self, record: object) -> None:
            losses.append(record.train_loss)

        def __getattr__(self, name: str) -> object:
            return lambda *told: None

    executor = LocalExecutor(config, dense_with_dropout(), digits(), num_slots=2)
    state = ExperimentState.fresh(config, flatten(dense_with_dropout()))
    run_experiment(config, executor, digits(), state, [Listener()])
    assert losses[0] != losses[1]


seen_rows: list[int] = []
"""Of examples that a `Watched` was given at once."""


class Watched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        seen_rows.append(len(inputs))
        outputs: Tensor = self.dense(torch.tanh(inputs))
        return outputs


def gradients_of(way: str, network: nn.Module, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """way: `fomaml`, one by one, or with all tasks as a group `fomaml group` or `maml group`."""
    method, _, is_group = way.partition(" ")
    gradients, losses = (together if is_group else one_by_one)(
        method, network, tasks, LocalTraining(SGD, 1, 10, num_steps=3)
    )
    return gradients, torch.tensor(losses)


def tasks_of(*sizes: int) -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    clients = [
        Client(
            torch.rand(size, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
            np.random.SeedSequence(client),
        )
        for client, size in enumerate(sizes)
    ]
    return [cut_client(client, support_fraction=0.5) for client in clients]


@pytest.mark.parametrize("way", ["fomaml", "fomaml group", "maml group"])
def test_a_query_part_of_any_size_is_run_in_pieces(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client with the data of all has tens of thousands of examples there, whose activations would fill a memory.

    The gradient of the mean is the same as in one piece.
    """
    network, tasks = Watched().double(), tasks_of(5000, 2300, 7)
    seen_rows.clear()
    gradients, losses = gradients_of(way, network, tasks)
    assert max(seen_rows) <= 1024
    monkeypatch.setattr(client_models, "QUERY_BATCH_SIZE", 5000)
    torch.testing.assert_close((gradients, losses), gradients_of(way, network, tasks), rtol=1e-10, atol=1e-12)
    assert max(seen_rows) == 2500
