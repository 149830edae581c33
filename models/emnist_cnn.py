"""The convolutional network of the EMNIST experiments (Jiang et al. 2019, arXiv 1909.12488)."""

from __future__ import annotations

from torch import nn

from models.shapes import Shape, image_of


class EmnistCNN(nn.Sequential):
    """conv5x5-32 same, pool2, ReLU, conv5x5-64 same, pool2, ReLU, dense 1024, ReLU, dropout 0.6, dense num_classes.

    (batch, channels, height, width) to (batch, num_classes) logits; 3.3 million parameters with 28x28 greys and 62
    classes.
    """

    head = "10.*"

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        channels, height, width = image_of(input_shape, least_side=4)
        super().__init__(
            nn.Conv2d(channels, 32, kernel_size=5, padding="same"),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=5, padding="same"),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 1024),
            nn.ReLU(),
            nn.Dropout(0.6),
            nn.Linear(1024, num_classes),
        )
