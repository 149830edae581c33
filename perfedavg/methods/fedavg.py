"""Federated averaging (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.training.client_models import Client, ClientModels, Penalty
    from perfedavg.training.local_training import LocalTraining


@dataclass(frozen=True)
class FedAvg(Method):
    """Clients train from the global model and send how far they got, weighted by their number of examples."""

    name: ClassVar[str] = "fedavg"

    def weight(self, num_examples: int) -> int:
        return num_examples

    def penalty(self, start: Tensor) -> Penalty | None:
        """What clients add to their loss, if anything."""
        return None

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        losses = models.train(start, clients, training, self.penalty(start))
        return models.parameters - start, losses
