"""Ditto (Li et al. 2021, arXiv 2012.04221, algorithm 1): a personal model beside the global one, pulled towards it.

The global model w is FedAvg's. Besides, a client of the round takes steps of its personal model v, on other batches:

    v <- v - rate * (grad F(v) + lambda * (v - w))        so on F(v) + lambda/2 * ||v - w||^2

F is the client's loss, w the global model that the round began with. v begins at the w of the client's first round: the
paper leaves its beginning open; in its authors' code, where all clients are known, all begin at the initial w.

An unseen client has no v yet: it begins at w, and adapts by the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from perfedavg.fields import setting
from perfedavg.methods.base import problem_with_pull
from perfedavg.methods.fedavg import FedAvg

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.settings import OptimizerConfig
    from perfedavg.training.client_models import AfterEpochs, Client, ClientModels
    from perfedavg.training.local_training import LocalTraining


@dataclass(frozen=True)
class Ditto(FedAvg):
    """FedAvg, to the bit, whose clients keep a personal model each. lambda = 0 trains it on the client's data alone."""

    name: ClassVar[str] = "ditto"
    keeps_state: ClassVar[bool] = True
    goes_on: ClassVar[bool] = False
    ditto_lambda: float = setting(
        1.0, "weight of the pull of personal models to the global one", at_least=0, search="0.05..2:log"
    )
    ditto_epochs: int | None = setting(
        None, "local epochs a round of the personal models", at_least=1, absent="as the global model's"
    )

    def problem_with(self, client_optimizer: OptimizerConfig) -> str | None:
        return problem_with_pull(client_optimizer, self.ditto_lambda)

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        updates, losses = super().update(models, start, clients, training)
        if self.ditto_epochs is not None:
            training = replace(training, num_epochs=self.ditto_epochs, num_steps=None)
        self.train_personal(models, start, [client.in_pass(0) for client in clients], training)
        for client, v in zip(clients, models.parameters, strict=True):
            client.state["model"] = v
        return updates, losses

    def personalize(
        self,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs,
    ) -> None:
        def after_steps(ended: dict[int, int]) -> None:
            if 0 not in ended.values():
                after_epochs(ended)

        models.load(start, len(clients))
        after_epochs(dict.fromkeys(range(len(clients)), 0))
        self.train_personal(models, start, clients, training, after_steps)

    def train_personal(
        self,
        models: ClientModels,
        w: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs | None = None,
    ) -> None:
        from perfedavg.training.client_models import kept_rows, pull_to

        v = kept_rows(clients, "model", w)
        models.train(v, clients, training, pull_to(w, self.ditto_lambda) if self.ditto_lambda else None, after_epochs)

    def round_cost(self, count_steps: Callable[[int], float], num_examples: int) -> float:
        """As if both models trained for as many epochs."""
        return 2 * super().round_cost(count_steps, num_examples)

    def bytes_per_client(self, bytes_of_step: Callable[[int], int], training: LocalTraining, num_examples: int) -> int:
        """The update, where v began and the pull are there beside v and its step."""
        return 2 * super().bytes_per_client(bytes_of_step, training, num_examples)
