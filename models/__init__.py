"""Models, one file each, found by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.emnist_cnn import EmnistCNN
from models.lstm import CharLSTM
from models.mlp import MLP
from models.mnist_cnn import MnistCNN
from models.sine_mlp import SineMLP

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "emnist_cnn": EmnistCNN,
    "lstm": CharLSTM,
    "mlp": MLP,
    "mnist_cnn": MnistCNN,
    "sine_mlp": SineMLP,
}
"""Each is built for a number of classes, which are its outputs for one example."""


def build_model(name: str, num_classes: int) -> nn.Module:
    """A freshly initialized model, from torch's global generator. Raises ValueError where the name is unknown."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; use {', '.join(MODELS)}")
    return MODELS[name](num_classes)
