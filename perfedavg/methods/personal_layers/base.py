"""What methods with personal layers have in common: clients keep some parameters, and share the others."""

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
class OwnLayers(FedAvg):
    """FedAvg of a model w = (w_shared, w_k), of which client k keeps w_k from one of its rounds to the next.

    It begins with the w_k of the global model when it has none: in its first round, and where it is unseen.
    """

    keeps_state: ClassVar[bool] = True
    goes_on: ClassVar[bool] = False

    def personal(self, layout: Layout) -> tuple[str, ...]:
        """The names of w_k."""
        raise NotImplementedError

    def sent(self, layout: Layout, change: Tensor) -> Tensor:
        """What clients send of how far their models got from the global one, (clients, num_parameters): not w_k."""
        return layout.columns(self.personal(layout)).clear(change)

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        losses = self.train(models, self.own_models(models, start, clients), clients, training)
        columns = models.layout.columns(self.personal(models.layout))
        if columns.slices:
            for client, kept in zip(clients, columns.take(models.parameters), strict=True):
                client.state[STATE] = kept
        return self.sent(models.layout, models.parameters - start), losses

    def personalize(
        self,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs,
    ) -> None:
        self.adapt(models, self.own_models(models, start, clients), clients, training, after_epochs)

    def train(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> list[float]:
        """A round's local training. start: a row a client."""
        return models.train(start, clients, training)

    def adapt(
        self,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs,
    ) -> None:
        """The training that personalizes. start: a row a client."""
        models.train(start, clients, training, after_epochs=after_epochs)

    def own_models(self, models: ClientModels, start: Tensor, clients: Sequence[Client]) -> Tensor:
        """The global model with each client's own layers, (clients, num_parameters), where the models have it."""
        columns = models.layout.columns(self.personal(models.layout))
        models.load(start, len(clients))
        for client, row in zip(clients, models.parameters, strict=True):
            if STATE in client.state:
                columns.put(row, client.state[STATE])
        return models.parameters


@dataclass(frozen=True)
class PersonalLayers(OwnLayers):
    """`OwnLayers` that are chosen by a setting.

    They are never sent, so that in the global model they stay the initial ones.
    """

    personal_layers: str | None = setting(
        None,
        "parameters that stay with a client (fedbabu: that train only when it personalizes): names or patterns, such "
        "as '4.*', with commas between; or none",
        absent="the model's last layer; for lg_fedavg all others",
    )

    def personal(self, layout: Layout) -> tuple[str, ...]:
        return self.personal_by_default(layout) if self.personal_layers is None else layout.names(self.personal_layers)

    def personal_by_default(self, layout: Layout) -> tuple[str, ...]:
        return layout.head

    def problem_with_model(self, layout: Layout) -> str | None:
        try:
            personal = self.personal(layout)
        except ValueError as error:
            return str(error)
        if not layout.others(personal):
            return f"no layer would be shared; name some of {', '.join(layout.places)} as personal, but not all"
        return None
