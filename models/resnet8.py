"""A small residual network (He et al. 2016, arXiv 1512.03385, section 4.2, with n = 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.shapes import Shape, image_of

Norm = Callable[[int], nn.Module]
"""From a number of channels to the layer that normalizes them."""
CHANNELS_A_GROUP = 8


class ResNet8(nn.Module):
    """conv3x3-16, three residual blocks of 16, 32 and 64 channels, mean over pixels, dense num_classes.

    (batch, channels, height, width) to (batch, num_classes) logits; 78 thousand parameters for greys and 10 classes.
    With BatchNorm, whose running statistics are buffers.
    """

    def __init__(self, input_shape: Shape, num_classes: int, norm: Norm = nn.BatchNorm2d) -> None:
        channels, _, _ = image_of(input_shape, least_side=8)
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, kernel_size=3, padding=1, bias=False)
        self.norm = norm(16)
        self.blocks = nn.Sequential(
            ResidualBlock(16, 16, 1, norm), ResidualBlock(16, 32, 2, norm), ResidualBlock(32, 64, 2, norm)
        )
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(torch.relu(self.norm(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class ResidualBlock(nn.Module):
    """Two convolutions 3x3, and around them the inputs, brought to the same shape by a convolution 1x1 if need be."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first = nn.Conv2d(num_inputs, num_outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.first_norm = norm(num_outputs)
        self.second = nn.Conv2d(num_outputs, num_outputs, kernel_size=3, padding=1, bias=False)
        self.second_norm = norm(num_outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or num_inputs != num_outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(num_inputs, num_outputs, kernel_size=1, stride=stride, bias=False), norm(num_outputs)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        inner = torch.relu(self.first_norm(self.first(inputs)))
        return torch.relu(self.second_norm(self.second(inner)) + self.shortcut(inputs))


def resnet8_gn(input_shape: Shape, num_classes: int) -> ResNet8:
    """With GroupNorm in place of BatchNorm, which suits clients with few classes (Hsieh et al. 2020, 1910.00189)."""
    return ResNet8(input_shape, num_classes, lambda channels: nn.GroupNorm(channels // CHANNELS_A_GROUP, channels))
