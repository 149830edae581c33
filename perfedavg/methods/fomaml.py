"""First-order MAML (Finn et al. 2017, arXiv 1703.03400, section 5.2).

A client's training part is cut at random into support and query. From theta, K steps on the support part lead to
theta_K; the client sends minus the gradient of its query loss at theta_K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.fields import setting
from perfedavg.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.training.client_models import Client, ClientModels
    from perfedavg.training.local_training import LocalTraining


@dataclass(frozen=True)
class FOMAML(Method):
    """Minus the gradient of the query loss at the adapted parameters."""

    name: ClassVar[str] = "fomaml"
    sends_gradients: ClassVar[bool] = True
    support_fraction: float = setting(
        0.5,
        "share of a client's training part that it adapts on; the gradient is taken on the rest, or, with 1, on all",
        above=0,
        at_most=1,
        search="0.2..0.8",
    )

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        from perfedavg.training.support_query import cut_clients

        supports, queries = cut_clients(clients, self.support_fraction)
        models.train(start, supports, training)
        gradients, losses = models.gradients(queries)
        return gradients.neg_(), losses

    def round_cost(self, count_steps: Callable[[int], float], num_examples: int) -> float:
        return count_steps(math.ceil(self.support_fraction * num_examples)) + 1

    def bytes_per_client(self, bytes_of_step: Callable[[int], int], training: LocalTraining, num_examples: int) -> int:
        from perfedavg.training.client_models import QUERY_BATCH_SIZE

        return bytes_of_step(max(training.batch_size, QUERY_BATCH_SIZE))
