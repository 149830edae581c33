"""The convolutional network that benchmarks of personalized methods use on small images."""

from __future__ import annotations

from torch import nn

from models.shapes import Shape, image_of


class TwoConvCNN(nn.Sequential):
    """conv5x5-32, pool2, ReLU, conv5x5-64, pool2, ReLU, dense 512, ReLU, dense num_classes; no padding.

    McMahan et al. 2017 (arXiv 1602.05629) have the same one with padding. To pool before ReLU gives the same as after.
    (batch, channels, height, width) to (batch, num_classes) logits; 0.58 million parameters with 28x28 greys and 10
    classes.
    """

    head = "9.*"

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        channels, *sides = image_of(input_shape, least_side=16)
        height, width = (((side - 4) // 2 - 4) // 2 for side in sides)
        super().__init__(
            nn.Conv2d(channels, 32, kernel_size=5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * height * width, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )
