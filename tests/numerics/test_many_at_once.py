"""Clients trained as one computation learn what each learns alone, and nothing of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Difference, half_squared_norm
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from models import build_model
from models.lstm import CharLSTM
from perfedavg.settings import OptimizerConfig
from perfedavg.training.client_models import SCORING_BATCH_SIZE, Client
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.layers import GroupBatches, GroupDropout, SeededDropout
from perfedavg.training.local_training import LocalTraining, Loss
from perfedavg.training.memory import group_memory_bytes
from perfedavg.training.stacked_model import StackedModel

BATCH_SIZE = 5
SIZES = (10, 7, 5, 3, 1)
"""Two whole batches, a smaller last batch, one batch, fewer examples than a batch, one example."""

SGD = OptimizerConfig("sgd", 0.05)
OPTIMIZERS = {
    "sgd": SGD,
    "momentum": OptimizerConfig("momentum", 0.05),
    "adam": OptimizerConfig("adam", 0.001),
}


class TiedWeights(nn.Module):
    """The same dense layer twice, its weight once more in an embedding, and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(784, 784, bias=False)
        self.again = self.dense
        self.embedding = nn.Embedding(784, 784)
        self.embedding.weight = self.dense.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.flatten(1)
        return self.again(torch.tanh(self.dense(inputs))) + self.embedding((inputs[:, 0] * 9).long())


def mlp_with_dropout() -> nn.Module:
    """With the masks of two layers to draw in turn."""
    return nn.Sequential(
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(784, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 10)
    )


def with_frozen_layer() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 30).requires_grad_(False), nn.Tanh(), nn.Linear(30, 10))


def emnist_cnn_without_dropout() -> nn.Module:
    model = build_model("emnist_cnn", (1, 28, 28), 10)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: build_model("mlp", (1, 28, 28), 10),
    "mnist_cnn": lambda: build_model("mnist_cnn", (1, 28, 28), 10),
    "two_conv_cnn": lambda: build_model("two_conv_cnn", (1, 28, 28), 10),
    "emnist_cnn": lambda: build_model("emnist_cnn", (1, 28, 28), 10),
    "emnist_cnn without dropout": emnist_cnn_without_dropout,
    "mlp with dropout": mlp_with_dropout,
    "tied weights": TiedWeights,
    "frozen layer": with_frozen_layer,
}


def build(name: str = "mlp with dropout") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().double()


NEARLY_ANOTHER = "emnist_cnn without dropout"
"""A model of which each layer is in another one, and which takes as long as all others."""
LARGE_ONE = ("emnist_cnn", "momentum")
"""Of the large models, with what one is always trained; with the other optimizers the small ones are."""


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow if name == NEARLY_ANOTHER else ()) for name in MODELS]
)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def seeds(client: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(5, spawn_key=(client,))


def examples(client: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(client)
    inputs = torch.rand(size, 1, 28, 28, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 10, (size,), generator=generator)


def members(sizes: Sequence[int] = SIZES) -> list[Client]:
    return [Client(*examples(client, size), seeds(client)) for client, size in enumerate(sizes)]


def training(optimizer: OptimizerConfig = SGD, num_epochs: int = 2) -> LocalTraining:
    return LocalTraining(optimizer, num_epochs, BATCH_SIZE)


def one_by_one(
    model: nn.Module, clients: Sequence[Client], how: LocalTraining, loss_function: Loss = F.cross_entropy
) -> tuple[Tensor, Tensor]:
    """What clients learn alone: parameters, a row a client, and losses."""
    single, rows, losses = FlatModel(model, loss_function=loss_function), [], []
    for client in clients:
        losses += single.train(flatten(model), [client], how)
        rows.append(single.vector.clone())
    return torch.stack(rows), torch.tensor(losses)


def together(
    model: nn.Module, clients: Sequence[Client], how: LocalTraining, loss_function: Loss = F.cross_entropy
) -> tuple[Tensor, Tensor]:
    """What clients learn as a group, from a stack that does not hold the start yet."""
    stacked = StackedModel(model, len(clients), loss_function=loss_function)
    stacked.parameters.fill_(torch.nan)
    losses = stacked.train(flatten(model), clients, how)
    return stacked.parameters, torch.tensor(losses)


def assert_equal_results(
    results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-12
) -> None:
    torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        pytest.param(model, name, marks=pytest.mark.slow if is_large and (model, name) != LARGE_ONE else ())
        for model, is_large in ((model, model.startswith("emnist_cnn")) for model in MODELS)
        for name in OPTIMIZERS
    ],
    indirect=["model"],
)
def test_together_is_one_by_one(model: nn.Module, optimizer: str) -> None:
    how = training(OPTIMIZERS[optimizer])
    expected = one_by_one(model, members(), how)
    assert (expected[0] - flatten(model)).abs().amax(dim=1).min() > 1e-4, "every client learned something"
    # Adam divides a gradient by its size, so that rounding, where nothing else is left of it, is not small any more.
    assert_equal_results(together(model, members(), how), expected, 1e-10 if optimizer == "adam" else 1e-12)


def test_single_precision_differs_by_rounding_only(model: nn.Module) -> None:
    model.float()
    clients = [Client(client.inputs.float(), client.labels, client.seeds) for client in members()]
    assert_equal_results(together(model, clients, training()), one_by_one(model, clients, training()), 1e-4)


@pytest.mark.parametrize("num_epochs", [1, 3])
def test_the_loss_is_that_of_the_last_epoch(num_epochs: int) -> None:
    how = training(num_epochs=num_epochs)
    model = build()
    assert_equal_results(together(model, members(), how), one_by_one(model, members(), how))


def test_any_mean_loss_will_do() -> None:
    """A step of SGD at rate a on 0.5 * ||w - c||^2 is w <- w - a (w - c); n steps leave (1 - a)^n of the way."""
    centres = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0]], dtype=torch.float64)
    sizes, start = (13, 5, 3), torch.tensor([0.5, 0.5], dtype=torch.float64)
    clients = [
        Client(centre.expand(size, -1), torch.zeros(size, dtype=torch.int64), seeds(0))
        for centre, size in zip(centres, sizes, strict=True)
    ]
    parameters, _ = together(Difference(start.tolist()), clients, training(), half_squared_norm)
    left = torch.tensor([[0.95**6], [0.95**2], [0.95**2]], dtype=torch.float64)
    torch.testing.assert_close(parameters, centres + left * (start - centres), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_company_does_not_matter(optimizer: str) -> None:
    model, how = build(), training(OPTIMIZERS[optimizer])
    clients = members()
    rows, losses = together(model, clients, how)
    others = together(model, clients[::2], how)
    assert_equal_results(others, (rows[::2], losses[::2]))
    for place, client in enumerate(clients):
        assert_equal_results(together(model, [client], how), (rows[place : place + 1], losses[place : place + 1]))


def test_a_group_may_have_fewer_clients_than_places() -> None:
    model, clients = build(), members()
    for optimizer in OPTIMIZERS.values():
        stacked = StackedModel(model, len(clients) + 2)
        stacked.train(flatten(model), clients, training(optimizer))
        expected, _ = together(model, clients, training(optimizer))
        torch.testing.assert_close(stacked.parameters, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"8 clients do not fit a group of 7"):
        stacked.train(flatten(model), members((1,) * 8), training())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_client_that_diverges_diverges_alone(poison: float) -> None:
    """The first to end, and the one that outlives all others."""
    for model in (build(), build("mnist_cnn")):
        rows, losses = together(model, members(), training(num_epochs=1))
        for place in (SIZES.index(min(SIZES)), SIZES.index(max(SIZES))):
            clients = members()
            clients[place].inputs.mul_(poison)
            sick_rows, sick_losses = together(model, clients, training(num_epochs=1))
            others = [other for other in range(len(SIZES)) if other != place]
            assert not sick_rows[place].isfinite().all()
            assert torch.equal(sick_rows[others], rows[others])
            assert torch.equal(sick_losses[others], losses[others])


def test_nothing_passes_from_one_group_to_the_next() -> None:
    model = build()
    stacked = StackedModel(model, len(SIZES))
    runs = []
    for _ in range(2):
        stacked.train(flatten(model), members(), training(OPTIMIZERS["adam"]))
        runs.append(stacked.parameters.clone())
    assert torch.equal(runs[0], runs[1])


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    model, before = build(), torch.get_rng_state()
    first, _ = together(model, members(), training())
    torch.manual_seed(2)
    second, _ = together(model, members(), training())
    assert torch.equal(first, second)
    torch.set_rng_state(before)
    together(model, members(), training())
    assert torch.equal(torch.get_rng_state(), before)


def assert_scores_are_those_of_one_by_one(model: nn.Module, sizes: Sequence[int]) -> None:
    """With each row another model, which is right about its client's last example and every other before it."""
    tests = [examples(client, size) for client, size in enumerate(sizes)]
    stacked, single = StackedModel(model, len(sizes) + 1), FlatModel(model)
    generator = torch.Generator().manual_seed(1)
    stacked.parameters.add_(torch.randn(stacked.parameters.shape, generator=generator, dtype=torch.float64), alpha=0.01)
    for row, (inputs, labels) in zip(stacked.parameters, tests, strict=False):
        single.load(row)
        right = torch.arange(len(labels) - 1, -1, -2)
        labels[right] = single.module.eval()(inputs).argmax(dim=1)[right]
    scores = stacked.score(tests)
    assert len(scores) == len(sizes)
    for values, row, (inputs, labels) in zip(scores, stacked.parameters, tests, strict=False):
        single.load(row)
        (expected,) = single.score([(inputs, labels)])
        assert values["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert values["accuracy"] == expected["accuracy"]


def test_scores_are_those_of_one_by_one(model: nn.Module) -> None:
    assert_scores_are_those_of_one_by_one(model, (3, 1, 12))


def test_scores_of_more_examples_than_are_run_at_a_time() -> None:
    """Of three clients, a third each: one more than that, far fewer, several times as many; dropout rests."""
    third = SCORING_BATCH_SIZE // 3
    assert_scores_are_those_of_one_by_one(build(), (third + 1, 1, 3 * third + 7))


def masks_alone(sizes: Sequence[int], probability: float) -> list[Tensor]:
    masks = []
    for client, size in enumerate(sizes):
        layer = SeededDropout(probability, torch.Generator().manual_seed(client))
        masks.append(torch.stack([layer(torch.ones(size, 2, 3)) for _ in range(2)]))
    return masks


@pytest.mark.parametrize("transform", ["vmap", "vmap of grad", "grad of vmap", "vmap of grad of grad"])
def test_each_client_draws_its_masks_as_if_it_were_alone(transform: str) -> None:
    """The derivative of sum(dropout(x)), and of its own derivative times x, is the mask over what is kept."""
    sizes = [2, 4, 1]
    generators = [torch.Generator().manual_seed(client) for client in range(4)]
    layer = GroupDropout(0.4, GroupBatches(generators, sizes))
    inputs = torch.ones(3, 4, 2, 3)

    def total(rows: Tensor) -> Tensor:
        return layer(rows).sum()

    def total_of_gradient(rows: Tensor) -> Tensor:
        return (grad(total)(rows) * rows).sum()

    apply = {
        "vmap": vmap(layer),
        "vmap of grad": vmap(grad(total)),
        "grad of vmap": grad(lambda stack: vmap(total)(stack).sum()),
        "vmap of grad of grad": vmap(grad(total_of_gradient)),
    }[transform]
    draws = torch.stack([apply(inputs) for _ in range(2)], dim=1)
    for client, expected in enumerate(masks_alone(sizes, 0.4)):
        size = sizes[client]
        assert torch.equal(draws[client, :, :size], expected)
        assert torch.equal(draws[client, :, size:], expected[:, :1].expand(-1, 4 - size, -1, -1))


def test_dropout_whose_first_dimension_is_not_the_batch_is_refused() -> None:
    """Which rows of it are a client's own, and which are filled up, could not be told."""
    model = nn.Sequential(nn.Flatten(0), nn.Dropout(0.5), nn.Unflatten(0, (-1, 784)), nn.Linear(784, 10)).double()
    with pytest.raises(ValueError, match="first dimension must be the batch's"):
        together(model, members(), training())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (CharLSTM((80,), 11), "LSTM cannot be trained many at once, nor differentiated twice; use --client_batching 1"),
        (nn.GRUCell(3, 3), "GRUCell cannot be trained many at once"),
        (nn.BatchNorm1d(3, track_running_stats=False), "BatchNorm1d mixes the examples of a batch"),
        (nn.BatchNorm1d(3), "BatchNorm1d mixes the examples"),
        (nn.InstanceNorm1d(3, track_running_stats=True), "moves its buffers"),
        (nn.Sequential(nn.Dropout2d(0.5)), "Dropout2d"),
    ],
)
def test_models_that_cannot_be_stacked_are_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        StackedModel(model, 2)
    with pytest.raises(ValueError, match=reason):
        group_memory_bytes(model, torch.rand(2, 3), torch.zeros(2), training())


def test_a_row_is_a_model_and_the_original_is_left_alone() -> None:
    original = build()
    before = flatten(original).clone()
    together(original, members(), training())
    assert torch.equal(flatten(original), before)
    stacked = StackedModel(original, 2)
    row = dict(
        zip(dict(original.named_parameters()), stacked.parameters[1].split([784 * 30, 30, 300, 10]), strict=True)
    )
    row = {name: part.view_as(original.get_parameter(name)) for name, part in row.items()}
    assert torch.equal(flatten(original), stacked.parameters[1])
    inputs, _ = examples(0, 3)
    labels = torch.tensor([1, 0, 2])
    expected = F.cross_entropy(functional_call(original.eval(), row, (inputs,)), labels)
    loss = stacked.score([(inputs, labels)] * 2)[1]["loss"]
    assert loss == pytest.approx(expected.item(), rel=1e-12)


def test_the_memory_estimate_counts_everything_that_a_client_holds() -> None:
    """Of the dense model: parameters, gradient, optimizer state, examples and activations, each at least once."""
    model = build_model("mlp", (1, 28, 28), 10)
    num_parameters = len(flatten(model))
    inputs, labels = torch.rand(100, 1, 28, 28), torch.zeros(100, dtype=torch.int64)

    def estimate(optimizer: str, batch_size: int) -> int:
        return group_memory_bytes(model, inputs, labels, LocalTraining(OPTIMIZERS[optimizer], 2, batch_size))

    held = 2 * 4 * num_parameters + inputs.nbytes + labels.nbytes
    activations = 4 * (784 + 2 * 200 + 2 * 200 + 10)
    assert estimate("sgd", 10) >= held + 10 * activations
    assert estimate("sgd", 100) - estimate("sgd", 10) >= 90 * activations
    assert estimate("sgd", 1000) == estimate("sgd", 100), "a batch has no more examples than the client"
    assert estimate("momentum", 10) - estimate("sgd", 10) >= 4 * num_parameters
    assert estimate("adam", 10) - estimate("sgd", 10) >= 8 * num_parameters
