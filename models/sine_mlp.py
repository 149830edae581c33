"""The multilayer perceptron of Reptile's sine task (Nichol, Achiam, Schulman 2018, arXiv 1803.02999)."""

from __future__ import annotations

from torch import nn

from models.shapes import Shape, length_of


class SineMLP(nn.Sequential):
    """inputs-64-64-num_outputs with tanh between. (batch, inputs) to (batch, num_outputs).

    4,353 parameters for one input and one output.
    """

    head = "4.*"

    def __init__(self, input_shape: Shape, num_outputs: int) -> None:
        super().__init__(
            nn.Linear(length_of(input_shape, "numbers"), 64),
            nn.Tanh(),
            nn.Linear(64, 64),
            nn.Tanh(),
            nn.Linear(64, num_outputs),
        )
