"""FedRep (Collins et al. 2021, arXiv 2102.07078): a shared representation, and a head of each client's own.

In a round, client k fits its head h_k to the representation phi, and then improves phi under that head (algorithm 1):

    h_k  = head_epochs epochs of SGD on f_k(h, phi) over h, from its h_k of before
    phi' = local training on f_k(h_k, phi) over phi
    phi <- sum over k of n_k / n * phi'

The paper's clients take ten epochs for the head and one or five for phi, which are phase 1's local epochs here.
An unseen client begins with the initial head, and personalizes by training it under phi, as one that trained does from
its own head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from perfedavg.fields import setting
from perfedavg.methods.personal_layers.base import PersonalLayers

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.training.client_models import AfterEpochs, Client, ClientModels
    from perfedavg.training.local_training import LocalTraining


@dataclass(frozen=True)
class FedRep(PersonalLayers):
    """Clients train their own head with the body frozen, and then the shared body with the head frozen."""

    name: ClassVar[str] = "fedrep"
    head_epochs: int = setting(
        10, "epochs a round for a client's own layers, before it trains the others", at_least=1, search="1..20:log"
    )

    def train(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> list[float]:
        head = self.personal(models.layout)
        if head:
            first = [client.in_pass(0) for client in clients]
            models.train(start, first, replace(training, num_epochs=self.head_epochs, num_steps=None), trained=head)
            start = models.parameters
        return models.train(start, clients, training, trained=models.layout.others(head))

    def adapt(
        self,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs,
    ) -> None:
        head = self.personal(models.layout)
        models.train(start, clients, training, after_epochs=after_epochs, trained=head or None)

    def round_cost(self, count_steps: Callable[[int], float], num_examples: int) -> float:
        """The head's steps have no gradients below it; with twice the epochs, they take about as long as the body's."""
        return 2 * super().round_cost(count_steps, num_examples)
