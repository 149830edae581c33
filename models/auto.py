"""What fits data of which nothing is known but their shape."""

from __future__ import annotations

from torch import nn

from models.emnist_cnn import EmnistCNN
from models.mlp import MLP
from models.resnet8 import resnet8_gn
from models.shapes import Shape

LARGEST_FOR_EMNIST_CNN = 48
"""Pixels of an image's side. Its dense layer grows with the pixels: to 17 million parameters at 64x64."""


def auto(input_shape: Shape, num_classes: int) -> nn.Module:
    """For images (channels, height, width) a convolutional network: up to 48x48 that of EMNIST, for larger ones ResNet8
    with GroupNorm, whose parameters do not grow with them. For other numbers, the multilayer perceptron.
    """
    if len(input_shape) != 3:
        return MLP(input_shape, num_classes)
    is_small = max(input_shape[1:]) <= LARGEST_FOR_EMNIST_CNN
    return (EmnistCNN if is_small else resnet8_gn)(input_shape, num_classes)
