"""The multilayer perceptron of the first federated experiments (McMahan et al. 2017, arXiv 1602.05629: 2NN)."""

from __future__ import annotations

from torch import nn


class MLP(nn.Sequential):
    """784-200-200-num_classes with ReLU between. (batch, 1, 28, 28) to (batch, num_classes) logits."""

    head = "5.*"

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(28 * 28, 200),
            nn.ReLU(),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Linear(200, num_classes),
        )
