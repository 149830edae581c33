"""The multilayer perceptron of Reptile's sine task (Nichol, Achiam, Schulman 2018, arXiv 1803.02999)."""

from __future__ import annotations

from torch import nn


class SineMLP(nn.Sequential):
    """1-64-64-num_outputs with tanh between. (batch, 1) to (batch, num_outputs); 4,353 parameters with one output."""

    head = "4.*"

    def __init__(self, num_outputs: int) -> None:
        super().__init__(
            nn.Linear(1, 64),
            nn.Tanh(),
            nn.Linear(64, 64),
            nn.Tanh(),
            nn.Linear(64, num_outputs),
        )
