"""The convolutional network of the EMNIST experiments (Jiang et al. 2019, arXiv 1909.12488)."""

from __future__ import annotations

from torch import nn


class EmnistCNN(nn.Sequential):
    """conv5x5-32 same, pool2, ReLU, conv5x5-64 same, pool2, ReLU, dense 1024, ReLU, dropout 0.6, dense num_classes.

    (batch, 1, 28, 28) to (batch, num_classes) logits; 3.3 million parameters with 62 classes.
    """

    head = "10.*"

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(1, 32, kernel_size=5, padding="same"),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=5, padding="same"),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 1024),
            nn.ReLU(),
            nn.Dropout(0.6),
            nn.Linear(1024, num_classes),
        )
