"""MAML (Finn et al. 2017, arXiv 1703.03400): FOMAML with the second derivatives.

A client sends minus the gradient of its query loss at theta_K with respect to theta, through the K steps between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.methods.fomaml import FOMAML

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.settings import OptimizerConfig
    from perfedavg.training.client_models import Client, ClientModels
    from perfedavg.training.local_training import LocalTraining


@dataclass(frozen=True)
class MAML(FOMAML):
    """Minus the gradient of the query loss after adapting, with respect to the parameters before it."""

    name: ClassVar[str] = "maml"
    differentiates_training: ClassVar[bool] = True
    TIMES_A_STEP: ClassVar[float] = 4.0
    """What a step costs with its derivative, in plain ones: 3 on full batches, 5 on small ones."""

    def problem_with(self, client_optimizer: OptimizerConfig) -> str | None:
        if client_optimizer.name == "sgd":
            return None
        return "it differentiates through the clients' steps, which must be plain ones; use sgd, or the method fomaml"

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        from perfedavg.training.support_query import cut_clients

        supports, queries = cut_clients(clients, self.support_fraction)
        gradients, losses = models.gradients_through_training(start, supports, queries, training)
        return gradients.neg_(), losses

    def round_cost(self, count_steps: Callable[[int], float], num_examples: int) -> float:
        return self.TIMES_A_STEP * super().round_cost(count_steps, num_examples)

    def bytes_per_client(self, bytes_of_step: Callable[[int], int], training: LocalTraining, num_examples: int) -> int:
        """All steps are kept until they have been differentiated."""
        steps = bytes_of_step(training.batch_size) * training.count_steps(num_examples)
        return super().bytes_per_client(bytes_of_step, training, num_examples) + steps
