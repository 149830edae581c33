"""A step of a client's model is the step that torch takes with the plain model, whatever layers and optimizer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.emnist_cnn import EmnistCNN
from models.lstm import CharLSTM
from models.mnist_cnn import MnistCNN
from perfedavg.settings import OptimizerConfig
from perfedavg.training.client_models import Client
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import LocalTraining

RATE = 0.05


class UsedTwice(nn.Module):
    """The same dense layer twice, once under another name, and its weight once more in a layer that is not dense."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6, bias=False)
        self.again = self.dense
        self.embedding = nn.Embedding(6, 6)
        self.embedding.weight = self.dense.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.again(torch.tanh(self.dense(inputs))) + self.embedding(torch.arange(len(inputs)) % 6)


class Frozen(nn.Module):
    """A dense layer that is not trained, one with a frozen bias, and one whose weight is made of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.partly = nn.Linear(6, 6)
        self.partly.bias.requires_grad_(False)
        self.normalized = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.hooked = nn.Linear(6, 6)
        self.hooked.register_forward_hook(double_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.hooked(self.normalized(torch.tanh(self.partly(torch.tanh(self.frozen(inputs))))))


def double_outputs(layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
    return 2 * outputs


def without_dropout(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


CASES = {
    "emnist_cnn": (lambda: without_dropout(EmnistCNN((1, 28, 28), 62)), lambda: torch.rand(20, 1, 28, 28).double()),
    "mnist_cnn": (lambda: MnistCNN((1, 28, 28), 10), lambda: torch.rand(7, 1, 28, 28).double()),
    "colour images": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), lambda: torch.rand(5, 3, 8, 8).double()),
    "lstm": (lambda: CharLSTM((80,), 11), lambda: torch.randint(0, 11, (6, 9))),
    "dense on sequences": (lambda: nn.Linear(5, 4), lambda: torch.rand(3, 2, 5).double()),
    "dense on one example": (lambda: nn.Linear(5, 4), lambda: torch.rand(5).double()),
    "frozen, normalized, hooked": (Frozen, lambda: torch.rand(8, 6).double()),
    "used twice": (UsedTwice, lambda: torch.rand(8, 6).double()),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build_model, build_inputs = CASES[request.param]
    return build_model().double(), build_inputs()


def loss_of(outputs: Tensor) -> Tensor:
    outputs = outputs.reshape(-1, outputs.shape[-1])
    return F.cross_entropy(outputs, torch.arange(len(outputs)) % outputs.shape[-1])


def torch_steps(model: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer, number: int) -> None:
    for _ in range(number):
        optimizer.zero_grad()
        loss_of(model(inputs)).backward()
        optimizer.step()


def test_descend_is_a_step_of_sgd(case: tuple[nn.Module, Tensor]) -> None:
    plain, inputs = case
    model = FlatModel(copy.deepcopy(plain))
    torch_steps(plain, inputs, torch.optim.SGD(plain.parameters(), RATE), 3)
    for _ in range(3):
        model.descend(loss_of(model(inputs)), RATE)
    torch.testing.assert_close(model.vector, flatten(plain), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_autograds(case: tuple[nn.Module, Tensor]) -> None:
    plain, inputs = case
    model = FlatModel(copy.deepcopy(plain))
    gradient = model.gradient(loss_of(model(inputs)))
    loss_of(plain(inputs)).backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in plain.parameters()]
    torch.testing.assert_close(gradient, nn.utils.parameters_to_vector(parts), rtol=1e-12, atol=1e-12)
    assert gradient.abs().max() > 0
    assert torch.equal(model.vector, flatten(plain)), "a gradient changes nothing"


def test_a_pass_without_a_step_leaves_nothing_behind(case: tuple[nn.Module, Tensor]) -> None:
    """The factors of a loss that nobody descended must not enter the next step."""
    plain, inputs = case
    model, other = FlatModel(copy.deepcopy(plain)), FlatModel(copy.deepcopy(plain))
    loss_of(model(inputs)).backward()
    for each in (model, other):
        each.descend(loss_of(each(inputs)), RATE)
    assert torch.equal(model.vector, other.vector)


def skip_where_bf16_is_missing(model: nn.Module, inputs: Tensor) -> None:
    """oneDNN has no bfloat16 LSTM for processors without AVX-512; any other error is the test's to find."""
    probed = FlatModel(model, precision="bf16")
    try:
        probed.descend(loss_of(probed(inputs)), RATE)
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        pytest.skip(f"this processor has no kernel for it: {error}")


def test_bf16_steps_go_where_float32_ones_do(case: tuple[nn.Module, Tensor]) -> None:
    """bfloat16 keeps 8 bits: the way of a few steps is right to some percent; what they change is kept in full."""
    plain, inputs = case
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    skip_where_bf16_is_missing(plain.float(), inputs)
    exact, rounded = FlatModel(plain.float()), FlatModel(plain.float(), precision="bf16")
    start = exact.vector.clone()
    for model in (exact, rounded):
        for _ in range(3):
            model.descend(loss_of(model(inputs)), RATE)
    assert rounded.vector.dtype == torch.float32
    assert not torch.equal(rounded.vector, exact.vector)
    distance = torch.linalg.vector_norm(rounded.vector - exact.vector)
    assert distance < 0.1 * torch.linalg.vector_norm(exact.vector - start)


def test_a_bf16_model_is_scored_in_float32() -> None:
    torch.manual_seed(0)
    plain, inputs = MnistCNN((1, 28, 28), 10), torch.rand(7, 1, 28, 28)
    model = FlatModel(plain, precision="bf16")
    model.module.eval()
    torch.testing.assert_close(model(inputs), plain(inputs), rtol=1e-5, atol=1e-6)


def test_adam_in_bf16_sees_the_weights_that_it_has_changed() -> None:
    """The copy of a dense layer's weight that bf16 multiplies with must follow every optimizer."""
    torch.manual_seed(0)
    config = OptimizerConfig("adam", 0.01)
    inputs, labels = torch.rand(40, 784), torch.randint(0, 10, (40,))
    losses = []
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        model = FlatModel(nn.Linear(784, 10), precision=precision)
        client = Client(inputs, labels, np.random.SeedSequence(0))
        losses += model.train(model.vector, [client], LocalTraining(config, 20, 20))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
