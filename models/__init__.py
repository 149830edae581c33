"""Architectures, one file each. `build_model` finds them by the name of the data set's image family and structure."""

from __future__ import annotations

from torch import nn

from models.emnist_cnn import EmnistCNN
from models.lstm import CharLSTM
from models.mlp import MLP
from models.mnist_cnn import MnistCNN
from models.sine_mlp import SineMLP


def build_model(name: str, num_classes: int) -> nn.Module:
    """A freshly initialized model, from torch's global generator. Its output is (batch, num_classes) logits.

    name: `emnist_cnn`, `mnist_cnn` or `mlp`, for (batch, 1, 28, 28) images, `lstm`, for (batch, length) tokens, or
        `sine_mlp`, for (batch, 1) numbers, whose output is (batch, num_classes) values.
    Raises ValueError where the name is unknown.
    """
    if name == "emnist_cnn":
        return EmnistCNN(num_classes)
    if name == "mnist_cnn":
        return MnistCNN(num_classes)
    if name == "mlp":
        return MLP(num_classes)
    if name == "lstm":
        return CharLSTM(num_classes)
    if name == "sine_mlp":
        return SineMLP(num_classes)
    raise ValueError(f"unknown model {name!r}; use emnist_cnn, mnist_cnn, mlp, lstm or sine_mlp")
