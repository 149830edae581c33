"""What fits data of which nothing is known but their shape."""

from __future__ import annotations

from torch import nn

from models.emnist_cnn import EmnistCNN
from models.mlp import MLP
from models.shapes import Shape


def auto(input_shape: Shape, num_classes: int) -> nn.Module:
    """The EMNIST network for images (channels, height, width), the multilayer perceptron for other numbers."""
    return (EmnistCNN if len(input_shape) == 3 else MLP)(input_shape, num_classes)
