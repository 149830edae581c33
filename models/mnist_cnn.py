"""The convolutional network of the MNIST experiments."""

from __future__ import annotations

from torch import nn


class MnistCNN(nn.Sequential):
    """conv5x5-32 stride 2, ReLU, conv5x5-64, pool2, ReLU, dense 512, ReLU, dense num_classes.

    (batch, 1, 28, 28) to (batch, num_classes) logits; 0.58 million parameters with 10 classes.
    """

    head = "8.*"

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(1, 32, kernel_size=5, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )
