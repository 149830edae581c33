"""Models, one file each, found by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.auto import auto
from models.char_conv import CharConv
from models.char_transformer import CharTransformer
from models.emnist_cnn import EmnistCNN
from models.lstm import CharLSTM, CharLSTMEachStep
from models.mlp import MLP
from models.mnist_cnn import MnistCNN
from models.resnet8 import ResNet8, resnet8_gn
from models.shapes import Shape
from models.sine_mlp import SineMLP
from models.two_conv_cnn import TwoConvCNN
from models.vit_tiny import ViTTiny

MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "auto": auto,
    "char_conv": CharConv,
    "char_transformer": CharTransformer,
    "emnist_cnn": EmnistCNN,
    "lstm": CharLSTM,
    "lstm_each_step": CharLSTMEachStep,
    "mlp": MLP,
    "mnist_cnn": MnistCNN,
    "resnet8": ResNet8,
    "resnet8_gn": resnet8_gn,
    "sine_mlp": SineMLP,
    "two_conv_cnn": TwoConvCNN,
    "vit_tiny": ViTTiny,
}
"""Each is built for the shape of an example's inputs and a number of classes, which are its outputs for one
example or, where every token of it has a class, for each token."""


def build_model(name: str, input_shape: Shape, num_classes: int) -> nn.Module:
    """A freshly initialized model, from torch's global generator.

    Raises ValueError where the name is unknown, or the model does not take such inputs.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; use {', '.join(MODELS)}")
    return MODELS[name](input_shape, num_classes)
