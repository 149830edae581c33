"""What methods with personal layers have in common: which layers these are, and that clients keep them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.fields import setting
from perfedavg.methods.fedavg import FedAvg

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.training.client_models import AfterEpochs, Client, ClientModels
    from perfedavg.training.layout import Layout
    from perfedavg.training.local_training import LocalTraining

STATE = "layers"


@dataclass(frozen=True)
class PersonalLayers(FedAvg):
    """FedAvg of a model w = (w_shared, w_k): a client keeps w_k, and sends the change of w_shared alone.

    In the global model the personal layers stay the initial ones, with which a client begins that has none yet.
    """

    keeps_state: ClassVar[bool] = True
    goes_on: ClassVar[bool] = False
    personal_layers: str | None = setting(
        None,
        "parameters that stay with the clients: names, or patterns such as '4.*', with commas between; or none",
        absent="the model's last layer; for lg_fedavg all others",
    )

    def personal(self, layout: Layout) -> tuple[str, ...]:
        """The names of the personal parameters."""
        return layout.head if self.personal_layers is None else layout.names(self.personal_layers)

    def problem_with_model(self, layout: Layout) -> str | None:
        try:
            personal = self.personal(layout)
        except ValueError as error:
            return f"{error}"
        if not layout.others(personal):
            return f"all of its parameters would be personal, and none shared; choose among {', '.join(layout.places)}"
        return None

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        losses = self.train(models, self.own_models(models, start, clients), clients, training)
        personal = models.layout.columns(self.personal(models.layout))
        if personal.slices:
            for client, own in zip(clients, personal.take(models.parameters), strict=True):
                client.state[STATE] = own
        return personal.clear(models.parameters - start), losses

    def train(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> list[float]:
        """A round's local training. start: a row a client."""
        return models.train(start, clients, training)

    def own_models(self, models: ClientModels, start: Tensor, clients: Sequence[Client]) -> Tensor:
        """The global model with each client's own layers, (clients, num_parameters)."""
        personal = models.layout.columns(self.personal(models.layout))
        models.load(start, len(clients))
        for client, row in zip(clients, models.parameters, strict=True):
            if STATE in client.state:
                personal.put(row, client.state[STATE])
        return models.parameters

    def personalize(
        self,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs,
    ) -> None:
        models.train(self.own_models(models, start, clients), clients, training, after_epochs=after_epochs)
