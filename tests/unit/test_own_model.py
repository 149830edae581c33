"""A model of the user's own: taken for any data set by name, and tried before there is anything to lose."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import digits_dataset, make_config
from torch import Tensor, nn

import utils
from models import MODELS
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.tasks import CohortTask
from perfedavg.methods import FOMAML
from perfedavg.settings import OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.flat_model import flatten

NAME = f"{__name__}:build"
DIGITS = digits_dataset(20)
IMAGE_MODELS = ("emnist_cnn", "mlp", "mnist_cnn", "resnet8", "resnet8_gn", "two_conv_cnn", "vit_tiny")


def given(build: Callable[[tuple[int, ...], int], Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> nn.Module:
    """The model that an entry point builds where the factory of `--model` is `build`."""
    monkeypatch.setattr(sys.modules[__name__], "build", build, raising=False)
    return utils.get_model(make_config(architecture=NAME, **changes), DIGITS)


def test_a_factory_gets_the_shape_of_the_inputs_and_the_number_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        asked.append((input_shape, num_classes))
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    one, two = given(build, monkeypatch), given(build, monkeypatch)
    assert asked == [((1, 28, 28), 10)] * 2
    assert torch.equal(flatten(one), flatten(two)), "its weights follow from the seed"
    assert not torch.equal(flatten(one), flatten(given(build, monkeypatch, seed=1)))


class Noisy(nn.Module):
    """Draws what no seed of a client reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(F.dropout(inputs.flatten(1), 0.5, self.training))
        return outputs


class Replacing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)
        self.register_buffer("mean", torch.zeros(784))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.flatten(1).detach().mean(0)
        outputs: Tensor = self.linear(inputs.flatten(1) - self.mean)
        return outputs


def normed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))


class Attending(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(28, 4, 32, dropout=dropout, batch_first=True)
        self.head = nn.Linear(28, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(inputs[:, 0]).mean(1))
        return logits


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda *of: "a model", "is a str; return a torch.nn.Module"),
        (lambda *of: nn.Identity(), "the model has no parameter that is trained"),
        (lambda *of: nn.Linear(28, 10), r"the model's outputs \(2, 1, 28, 10\) are not .* which is \(2, 10\)"),
        (lambda shape: nn.Identity(), r"build\(input_shape=\(1, 28, 28\), num_classes=10\): TypeError"),
        (lambda *of: nn.Sequential(nn.Flatten(), nn.Linear(700, 10)), r"inputs \(2, 1, 28, 28\) .* RuntimeError: mat1"),
        (lambda *of: Noisy(), "draws from torch's global generator .* use nn.Dropout"),
        (lambda *of: Replacing(), "Replacing puts a new tensor in the place of its buffer mean"),
        (lambda *of: Attending(0.1), "MultiheadAttention draws from torch's global generator; give it dropout=0"),
    ],
)
def test_what_cannot_be_trained_is_one_line_with_the_fix(
    build: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=rf"--model test_own_model:build.*{reason}") as refusal:
        given(build, monkeypatch)
    assert "\n" not in str(refusal.value)


def test_batches_of_one_example_are_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm on a vector has no variance there: torch would end the run in the middle of a round."""
    size = DIGITS.num_train_examples(0)
    with pytest.raises(ValueError, match=r"BatchNorm cannot train on a batch of one example, and client \d+ has one"):
        given(lambda *of: normed(), monkeypatch, batch_size=size - 1)
    sizes = {DIGITS.num_train_examples(client_id) for client_id in range(20)}
    fitting = next(size for size in range(2, 100) if all(count % size != 1 for count in sizes))
    given(lambda *of: normed(), monkeypatch, batch_size=fitting)


def test_a_batch_of_one_example_that_a_method_makes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """FOMAML cuts a client's examples once more, which nobody foresees."""
    method = PhaseConfig(2, 1, OptimizerConfig("sgd", 0.1), OptimizerConfig("sgd", 1.0), method=FOMAML(0.01))
    model = given(lambda *of: normed(), monkeypatch, batch_size=8)
    executor = LocalExecutor(make_config(architecture=NAME, batch_size=8, fedavg=method), model, DIGITS)
    expected = r"--model test_own_model:build: the model's BatchNorm cannot .* one of client 3; use GroupNorm"
    with pytest.raises(ValueError, match=expected):
        executor.train(CohortTask(Phase.FEDAVG, 1, (3,), 1000), flatten(model))


def test_an_error_in_training_is_one_line_with_the_users_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(nn.Module):
        """Fails on batches that the trial before the first round does not have."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(784, 10)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.linear(inputs.flatten(1))
            return outputs if len(outputs) <= 2 else outputs + {}["rows"]  # type: ignore[index]

    model = given(lambda *of: Picky(), monkeypatch)
    executor = LocalExecutor(make_config(architecture=NAME), model, DIGITS)
    expected = r"--model test_own_model:build: training or scoring client 3: .*test_own_model.py, line \d+: KeyError"
    with pytest.raises(ValueError, match=expected):
        executor.train(CohortTask(Phase.FEDAVG, 1, (3,), 1000), flatten(model))


def test_a_transformer_layer_of_torchs_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = given(lambda *of: Attending(0.0), monkeypatch)
    executor = LocalExecutor(make_config(architecture=NAME), model, DIGITS)
    update = executor.train(CohortTask(Phase.FEDAVG, 1, (3,), 1000), flatten(model))
    assert update.reports[0].refused is None


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 18)])
def test_this_projects_image_models_take_images_of_any_size_and_colour(name: str, shape: tuple[int, ...]) -> None:
    model = utils.build_architecture(name, shape, 7)
    assert model(torch.rand(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("mnist_cnn", (1, 8, 8), r"it takes images from 15x15 pixels on, these have 8x8; name another one"),
        ("resnet8", (20,), r"it takes images \(channels, height, width\), the inputs are \(20,\); name another one"),
        ("lstm", (1, 28, 28), r"it takes tokens \(length,\), the inputs are \(1, 28, 28\); name another one"),
        ("nothing", (1, 28, 28), "unknown model 'nothing'; use auto, char_conv, char_transformer"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line(name: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"--model {name} does not fit the data: {reason}"):
        utils.build_architecture(name, shape, 10)


def test_what_fits_is_found_for_data_of_which_only_the_shape_is_known() -> None:
    kinds = {shape: type(MODELS["auto"](shape, 3)).__name__ for shape in ((20,), (1, 28, 28), (4, 5))}
    assert kinds == {(20,): "MLP", (1, 28, 28): "EmnistCNN", (4, 5): "MLP"}
