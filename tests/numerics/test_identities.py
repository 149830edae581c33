"""What ties the algorithms of the three papers together, in float64: where one of them is a sum or a limit of others.

If one of these failed, a figure that is called FedAvg's, Reptile's, FOMAML's or MAML's would be another algorithm's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Examples, make_config
from torch import Tensor, nn
from torch.func import functional_call, grad

from datasets.clients.views import JointView
from perfedavg.contracts import FederatedDataset
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.methods import METHODS
from perfedavg.settings import OptimizerConfig, PhaseConfig
from perfedavg.training.client_models import Client, ClientModels, Query
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import LocalTraining
from perfedavg.training.stacked_model import StackedModel
from perfedavg.training.support_query import cut_client

RATE = 0.3
NUM_TRAIN, NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 4, 6, 4, 3
UNEQUAL = (1, 3, 2, 7)
SGD = OptimizerConfig("sgd", RATE)
AVERAGING = OptimizerConfig("sgd", 1.0)
LEFT_OUT = PhaseConfig(0, 1, SGD, AVERAGING)
SEEDS = np.random.SeedSequence(3)


def initialized(build: Callable[[], nn.Module]) -> nn.Module:
    """A model in float64, the same one in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double()


def network() -> nn.Module:
    """Smooth, so that derivatives of every order are what they seem, and far from linear."""
    return initialized(lambda: nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES)))


NETWORK = network()
START = flatten(NETWORK)


class Clients:
    """Training clients and an unseen one, each with six random examples of its own.

    repeats: how often a training client has each of them, which changes its size but not its mean loss.
    """

    fingerprint = "identities"
    unseen_client_ids = (NUM_TRAIN,)
    train_client_ids = range(NUM_TRAIN)

    def __init__(self, repeats: Sequence[int] = (1,) * NUM_TRAIN) -> None:
        self._repeats = (*repeats, 1)

    def num_train_examples(self, client_id: int) -> int:
        return NUM_EXAMPLES * self._repeats[client_id]

    def client_data(self, client_id: int) -> Examples:
        inputs, labels = examples(client_id, NUM_EXAMPLES)
        inputs, labels = inputs.repeat(self._repeats[client_id], 1), labels.repeat(self._repeats[client_id])
        return Examples(inputs, labels, inputs[:1], labels[:1])


def examples(client_id: int, number: int) -> tuple[Tensor, Tensor]:
    """Random inputs, (number, features), around a point of the client's own, and labels, (number,)."""
    generator = torch.Generator().manual_seed(client_id)
    centre = torch.randn(NUM_FEATURES, generator=generator, dtype=torch.float64)
    inputs = centre + torch.randn(number, NUM_FEATURES, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, NUM_CLASSES, (number,), generator=generator)


def plain_loss(parameters: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of the plain torch network with these parameters, (num_parameters,): nothing of the project is in it."""
    shapes = dict(NETWORK.named_parameters())
    pieces = parameters.split([shape.numel() for shape in shapes.values()])
    named = {name: piece.view_as(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
    return F.cross_entropy(functional_call(NETWORK, named, (inputs,)), labels)


def fedsgd_gradients() -> Tensor:
    """The clients' gradients at the start, (clients, num_parameters)."""
    return torch.stack([grad(plain_loss)(START, *examples(client, NUM_EXAMPLES)) for client in range(NUM_TRAIN)])


def moved(
    fedavg: PhaseConfig,
    fine_tune: PhaseConfig | None = None,
    clients: FederatedDataset | None = None,
    client_batching: int = 1,
) -> Tensor:
    """How far a run in which all training clients take part in each round moves the model, (num_parameters,).

    The batch is larger than any client, so that every step is over all of its examples.
    """
    clients = clients or Clients()
    config = make_config(
        num_clients=None,
        cohort_size=len(clients.train_client_ids),
        batch_size=1000,
        fedavg=fedavg,
        fine_tune=fine_tune,
        client_batching=client_batching,
    )
    executor = LocalExecutor(config, network(), clients)
    return run_experiment(config, executor, clients, ExperimentState.fresh(config, START)).parameters - START


def one_round(num_steps: int, server: OptimizerConfig = AVERAGING, method: str = "fedavg") -> PhaseConfig:
    settings = {"support_fraction": 1.0} if method == "fomaml" else {}
    return PhaseConfig(1, 1, SGD, server, num_local_steps=num_steps, method=METHODS[method](**settings))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Up to the grid of the exact sum, which is about 1e-14, and rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, of two vectors."""
    return (torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other)).item()


@pytest.mark.parametrize("client_batching", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_fedavg_is_fedsgd_plus_fomaml_at_each_depth(num_steps: int, client_batching: int) -> None:
    """g_FedAvg = g_FedSGD + sum over j = 1 .. K-1 of g_FOMAML(j)   (Jiang et al. 2019, section 3).

    FedAvg moves the model by -rate * g_FedAvg, FOMAML with j steps and a server rate of 1 by -g_FOMAML(j).
    """
    fedavg = moved(one_round(num_steps), client_batching=client_batching)
    fomaml = [
        -moved(LEFT_OUT, one_round(depth, method="fomaml"), client_batching=client_batching)
        for depth in range(1, num_steps)
    ]
    fedsgd = fedsgd_gradients().mean(0)
    assert_close(fedavg, -RATE * sum(fomaml, fedsgd))
    assert all(distance(gradient, fedsgd) > 0.05 for gradient in fomaml), "else any of them would do for another"


def test_reptile_is_fedavg_with_equal_weights() -> None:
    """One step of the server, from the same model; FedAvg weighs by examples, Reptile does not."""
    server = OptimizerConfig("sgd", 0.7)
    fedavg = moved(one_round(3, server))
    assert_close(moved(LEFT_OUT, one_round(3, server, "reptile"), Clients(UNEQUAL)), fedavg)
    assert distance(moved(one_round(3, server), clients=Clients(UNEQUAL)), fedavg) > 0.05


@pytest.mark.parametrize("repeats", [(1,) * NUM_TRAIN, UNEQUAL], ids=["equal sizes", "unequal sizes"])
def test_one_local_step_is_fedsgd(repeats: tuple[int, ...]) -> None:
    """A step of gradient descent along the mean of the clients' gradients, FedAvg's weighted by their examples.

    So FedAvg with one step is centralized training on all examples, whoever has them. An epoch of one batch is a step.
    """
    gradients, clients = fedsgd_gradients(), Clients(repeats)
    weights = torch.tensor(repeats, dtype=torch.float64) / sum(repeats)
    fedavg = moved(one_round(1), clients=clients)
    assert_close(fedavg, -RATE * weights @ gradients)
    assert_close(moved(one_round(1), clients=JointView(clients)), fedavg)
    reptile = moved(LEFT_OUT, one_round(1, method="reptile"), clients)
    assert_close(reptile, -RATE * gradients.mean(0))
    an_epoch = PhaseConfig(1, 1, SGD, AVERAGING, method=METHODS["reptile"]())
    assert torch.equal(moved(PhaseConfig(1, 1, SGD, AVERAGING), clients=clients), fedavg)
    assert torch.equal(moved(LEFT_OUT, an_epoch, clients), reptile)


def average_gradients(num_batches: int) -> tuple[Tensor, Tensor]:
    """AvgGrad and AvgGradInner (Nichol et al. 2018, section 5.1) of a client with so many minibatches of one example.

    The means of g_i over all i, and of H_i g_j over all pairs i != j, in which H_i g_j and H_j g_i add up to the
    gradient of g_i . g_j.
    """
    inputs, labels = examples(0, num_batches)

    def gradient(parameters: Tensor, place: int) -> Tensor:
        return grad(plain_loss)(parameters, inputs[place : place + 1], labels[place : place + 1])

    def agreement(parameters: Tensor, one: int, other: int) -> Tensor:
        return gradient(parameters, one) @ gradient(parameters, other)

    average = torch.stack([gradient(START, place) for place in range(num_batches)]).mean(0)
    pairs = list(permutations(range(num_batches), 2))
    return average, torch.stack([grad(agreement)(START, *pair) for pair in pairs]).mean(0) / 2


def expected_gradient(method: str, num_batches: int, rate: float) -> Tensor:
    """The mean of a method's gradient over all orders of the client's minibatches, of one example each.

    MAML and FOMAML take a step on each but the last, on which they measure; Reptile takes a step on each. The order in
    which a client goes through its examples is drawn from one seed; over all orders of the examples it meets each order
    of the minibatches once.
    """
    inputs, labels = examples(0, num_batches)
    training = LocalTraining(OptimizerConfig("sgd", rate), num_epochs=1, batch_size=1)
    orders = [list(order) for order in permutations(range(num_batches))]
    supports = [Client(inputs[rest], labels[rest], SEEDS) for *rest, _ in orders]
    queries = [Query(inputs[[last]], labels[[last]], 0) for *_, last in orders]
    if method == "maml":
        models = StackedModel(NETWORK, len(orders))
        return models.gradients_through_training(START, supports, queries, training)[0].mean(0)
    model, gradients = FlatModel(NETWORK), []
    for order, support, query in zip(orders, supports, queries, strict=True):
        if method == "fomaml":
            gradients.append(fomaml(model, START, support, query, training)[0])
        else:
            model.train(START, [Client(inputs[order], labels[order], SEEDS)], training)
            gradients.append((START - model.vector) / rate)
    return torch.stack(gradients).mean(0)


def fomaml(
    model: ClientModels, start: Tensor, support: Client, query: Query, training: LocalTraining
) -> tuple[Tensor, float]:
    model.train(start, [support], training)
    gradients, (loss,) = model.gradients([query])
    return gradients[0], loss


@pytest.mark.parametrize("num_batches", [2, 3, 4])
@pytest.mark.parametrize(
    ("method", "of_average", "of_inner"),
    [
        ("maml", lambda k: 1, lambda k: 2 * (k - 1)),
        ("fomaml", lambda k: 1, lambda k: k - 1),
        ("reptile", lambda k: k, lambda k: k * (k - 1) / 2),
    ],
    ids=["maml", "fomaml", "reptile"],
)
def test_leading_order_coefficients(
    method: str, of_average: Callable[[int], float], of_inner: Callable[[int], float], num_batches: int
) -> None:
    """The expected gradients for k minibatches and a rate a that goes to 0 (Nichol et al. 2018, section 5.1).

    Up to terms in a^2, AvgGrad - 2 (k-1) a AvgGradInner for MAML, AvgGrad - (k-1) a AvgGradInner for FOMAML, and
    k AvgGrad - k (k-1) / 2 a AvgGradInner for Reptile.
    """
    average, inner = average_gradients(num_batches)
    expected = of_inner(num_batches) * inner

    def first_order(rate: float) -> Tensor:
        """What is measured of `expected`; its error falls with the rate."""
        return (of_average(num_batches) * average - expected_gradient(method, num_batches, rate)) / rate

    errors = [distance(first_order(rate), expected) for rate in (1e-2, 1e-3, 1e-4)]
    assert errors[-1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)
    extrapolated = 2 * first_order(5e-4) - first_order(1e-3)
    assert distance(extrapolated, expected) < 1e-4
    assert distance(inner, average) > 0.1, "else one coefficient could make up for the other"


def images(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(number, 1, 8, 8, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, NUM_CLASSES, (number,), generator=generator)


def convolutional(dropout: float = 0.0, frozen: bool = False) -> nn.Module:
    return initialized(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.MaxPool2d(2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(27, 6).requires_grad_(not frozen),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(6, NUM_CLASSES),
        )
    )


@pytest.mark.parametrize(
    "training",
    [LocalTraining(SGD, 2, 3), LocalTraining(SGD, 1, 4, num_steps=5), LocalTraining(SGD, 1, 4, num_steps=0)],
    ids=["epochs", "steps", "no step"],
)
@pytest.mark.parametrize(
    "model", [convolutional(), convolutional(dropout=0.4), convolutional(frozen=True)], ids=["cnn", "dropout", "frozen"]
)
def test_mamls_gradient_is_that_of_the_loss_after_adapting(model: nn.Module, training: LocalTraining) -> None:
    """Against central differences of the query loss after training, along a random direction of each layer.

    The masks of dropout follow from the seeds and not from the parameters, so that the loss is a function of these.
    """
    start, single = flatten(model), FlatModel(model)
    support, query = cut_client(Client(*images(12), SEEDS), support_fraction=0.6)
    generator = torch.Generator().manual_seed(2)

    def loss_after_adapting(parameters: Tensor) -> float:
        return fomaml(single, parameters, support, query, training)[1]

    gradients, losses = StackedModel(model, 1).gradients_through_training(start, [support], [query], training)
    assert losses == pytest.approx([loss_after_adapting(start)], rel=1e-12)
    first = 0
    for parameter in model.parameters():
        direction = torch.zeros_like(start)
        layer = slice(first, first := first + parameter.numel())
        if not parameter.requires_grad:
            assert not gradients[0, layer].any()
            continue
        direction[layer] = torch.randn(parameter.numel(), generator=generator, dtype=torch.float64)
        step = 1e-5 * direction / torch.linalg.vector_norm(direction)
        slope = (loss_after_adapting(start + step) - loss_after_adapting(start - step)) / 2e-5
        along = (gradients[0] @ step / 1e-5).item()
        assert along == pytest.approx(slope, rel=1e-6, abs=1e-9)
    first_order = fomaml(single, start, support, query, training)[0]
    if training.num_steps == 0:
        assert_close(first_order, gradients[0])
    else:
        assert distance(first_order, gradients[0]) > 0.05, "the second derivatives are a part of it"
