"""FedBABU (Oh et al. 2022, arXiv 2106.06042): body aggregation and body update.

The head of the global model stays the initial one, h_0, for all clients and throughout the training:

    w_body' = local training on f_k(w_body, h_0) over w_body
    w_body <- sum over k of n_k / n * w_body'

A client personalizes from (w_body, h_0), unseen or not, by training the whole model, its head or its body; the paper
compares the three, and takes the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.fields import setting
from perfedavg.methods.personal_layers.base import PersonalLayers

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.training.client_models import AfterEpochs, Client, ClientModels
    from perfedavg.training.local_training import LocalTraining


@dataclass(frozen=True)
class FedBABU(PersonalLayers):
    """Clients train all but the last layer, which is trained when they personalize."""

    name: ClassVar[str] = "fedbabu"
    keeps_state: ClassVar[bool] = False
    personalization_trains: str = setting(
        "all",
        "what of the model a client trains to personalize",
        choices=("all", "head", "body"),
        search="all,head,body",
    )

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        head = self.personal(models.layout)
        losses = models.train(start, clients, training, trained=models.layout.others(head))
        return self.sent(models.layout, models.parameters - start), losses

    def adapt(
        self,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs,
    ) -> None:
        head = self.personal(models.layout)
        trained = {"all": None, "head": head or None, "body": models.layout.others(head)}[self.personalization_trains]
        models.train(start, clients, training, after_epochs=after_epochs, trained=trained)
