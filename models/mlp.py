"""The multilayer perceptron of the first federated experiments (McMahan et al. 2017, arXiv 1602.05629: 2NN)."""

from __future__ import annotations

import math

from torch import nn

from models.shapes import Shape


class MLP(nn.Sequential):
    """inputs-200-200-num_classes with ReLU between. (batch, ...) floats to (batch, num_classes) logits."""

    head = "5.*"

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(math.prod(input_shape), 200),
            nn.ReLU(),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Linear(200, num_classes),
        )
