"""Where a model's parameters stand in a row, and which of them are its head."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import digits_dataset, make_config
from torch import Tensor, nn

import utils
from models import MODELS
from perfedavg.methods import METHODS
from perfedavg.settings import OptimizerConfig, PhaseConfig
from perfedavg.training.flat_model import flatten
from perfedavg.training.layout import Layout, entries_of

SGD = OptimizerConfig("sgd", 0.1)


class Named(nn.Module):
    """Its head is neither its last layer nor its own attribute's only parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.norm = nn.LayerNorm(4)
        self.body = nn.Linear(5, 4, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.norm(self.body(inputs)))
        return outputs


class Tied(nn.Module):
    """The last layer's weight is the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.middle = nn.Linear(3, 3)
        self.output = nn.Linear(3, 6)
        self.output.weight = self.embedding.weight


@pytest.mark.parametrize("model", [Named(), Tied(), nn.BatchNorm1d(2)], ids=["named", "tied", "buffers"])
def test_places_are_those_of_the_flat_vector(model: nn.Module) -> None:
    layout, row = Layout.of(model), flatten(model)
    for name, entry in entries_of(model).items():
        assert torch.equal(row[layout.places[name]], entry.detach().flatten())
    assert sum(place.stop - place.start for place in layout.places.values()) == len(row)


def test_the_head_is_what_the_model_calls_so_or_its_last_layer() -> None:
    assert Layout.of(Named()).head == ("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias")
    assert Layout.of(Tied()).head == ("embedding.weight", "output.bias")
    assert Layout.of(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.Flatten())).head == (
        "2.weight",
        "2.bias",
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_head_of_a_model_gives_its_outputs(name: str) -> None:
    """A weight and a bias for each of 7 outputs."""
    shapes_of_others = {"lstm": (80,), "lstm_each_step": (80,), "sine_mlp": (1,)}
    shapes_of_others |= dict.fromkeys(("char_conv", "char_transformer"), (80,))
    model = MODELS[name](shapes_of_others.get(name, (1, 28, 28)), 7)
    shapes = dict(model.named_parameters())
    assert [len(shapes[part]) for part in Layout.of(model).head] == [7, 7]


def test_normalization_layers_are_found() -> None:
    assert Layout.of(Named()).normalization == ("norm.weight", "norm.bias")
    assert Layout.of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2))).normalization == ("1.weight", "1.bias")
    statistics = ("1.running_mean", "1.running_var")
    assert Layout.of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3))).normalization == (
        "1.weight",
        "1.bias",
        *statistics,
    )


def test_patterns_name_parameters() -> None:
    layout = Layout.of(Named())
    assert layout.names("norm.*, body.weight") == ("norm.weight", "norm.bias", "body.weight")
    assert layout.names("none") == ()
    assert layout.others(layout.names("h*")) == ("norm.weight", "norm.bias", "body.weight")
    with pytest.raises(ValueError, match=r"none of its parameters is called 'foot\.\*'; they are head\.0\.weight, "):
        layout.names("norm.*,foot.*")


def test_columns_are_taken_and_put_back() -> None:
    """Neighbours are one slice: body and norm stand side by side, the head's last bias before them is left out."""
    layout = Layout.of(Named())
    columns = layout.columns(("norm.bias", "head.0.weight", "norm.weight", "body.weight"))
    assert columns.slices == (slice(0, 12), slice(23, 51))
    assert columns.span == slice(0, 51)
    rows = torch.arange(2 * 51.0).view(2, 51)
    taken, other = columns.take(rows), torch.zeros(51)
    columns.put(other, taken[1])
    assert torch.equal(other[:12], rows[1, :12])
    assert torch.equal(other[23:], rows[1, 23:])
    assert not other[12:23].any()
    assert torch.equal(columns.clear(rows.clone())[:, 12:23], rows[:, 12:23])
    assert not columns.take(columns.clear(rows)).any()
    assert layout.columns(()).take(rows).shape == (2, 0)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("x*", "none of its parameters is called 'x*'; they are 0.weight, 0.bias, 2.weight, "),
        ("*", "no layer would be shared; name some of 0.weight, 0.bias, 2.weight, "),
    ],
)
def test_personal_layers_must_be_some_of_the_model(patterns: str, said: str) -> None:
    """It is said when the model is built, before anything is trained."""
    phase = PhaseConfig(1, 1, SGD, SGD, method=METHODS["fedper"](personal_layers=patterns))
    config = make_config(architecture="mnist_cnn", fedavg=phase, fine_tune=None)
    with pytest.raises(ValueError, match=re.escape(f"--method fedper does not go with the model: {said}")):
        utils.get_model(config, digits_dataset(20))
