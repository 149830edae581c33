"""A model whose parameters are one flat vector, which is what server and clients exchange."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd


class SeededDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) that draws its masks from a generator of its own.

    `nn.Dropout` reads torch's global generator, which clients that train side by side in one process would share.
    """

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        super().__init__()
        self.probability = probability
        self.generator = generator

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return inputs
        keep = 1.0 - self.probability
        if keep == 0.0:
            return torch.zeros_like(inputs)
        mask = torch.empty_like(inputs).bernoulli_(keep, generator=self.generator).div_(keep)
        return inputs * mask


class FlatModel:
    """A private copy of a model on one device, with its parameters as views of one flat vector.

    module: the copy; calling it runs the model.
    parameters: (num_parameters,) the flat vector; writing to it changes the model.
    dropout_generator: the source of every dropout mask; seed it before training a client.

    Raises ValueError where the model has buffers (running statistics of BatchNorm would pass from one client to the
    next) or a layer whose randomness cannot be seeded for each client.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.dropout_generator = torch.Generator(device=self.device)
        buffers = [name for name, _ in model.named_buffers()]
        if buffers:
            raise ValueError(
                f"the model has buffers ({', '.join(buffers[:3])}), which would pass from client to client; "
                "use layers without running state, such as GroupNorm in place of BatchNorm"
            )
        # The generator is bound after the copy, because a generator cannot be deep-copied.
        self.module = _with_seeded_dropout(copy.deepcopy(model), self.dropout_generator).to(self.device)
        self.parameters = flatten(self.module)
        unflatten_into(self.module, self.parameters)

    def load(self, parameters: Tensor) -> None:
        """Take over a flat vector of the same size, from any device."""
        self.parameters.copy_(parameters)


def flatten(model: nn.Module) -> Tensor:
    """A copy of the model's parameters as one vector, (num_parameters,), in the order of `model.parameters()`."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def unflatten_into(model: nn.Module, parameters: Tensor) -> None:
    """Let a model's parameters be views of a flat vector, (num_parameters,), of the same device and type."""
    nn.utils.vector_to_parameters(parameters, model.parameters())


def _with_seeded_dropout(module: nn.Module, generator: torch.Generator) -> nn.Module:
    if isinstance(module, nn.Dropout):
        return SeededDropout(module.p, generator)
    if isinstance(module, _DropoutNd) or (isinstance(module, nn.RNNBase) and module.dropout > 0):
        raise ValueError(f"{type(module).__name__} draws from torch's global generator; use nn.Dropout in its place")
    for name, child in module.named_children():
        setattr(module, name, _with_seeded_dropout(child, generator))
    return module
