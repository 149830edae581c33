"""Reptile (Nichol et al. 2018, arXiv 1803.02999), batched: the global model steps towards the mean of the clients'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.training.client_models import Client, ClientModels
    from perfedavg.training.local_training import LocalTraining


@dataclass(frozen=True)
class Reptile(Method):
    """Clients train from the global model and send how far they got, all with the same weight."""

    name: ClassVar[str] = "reptile"

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        losses = models.train(start, clients, training)
        return models.parameters - start, losses
