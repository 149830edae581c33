"""pFedMe (T. Dinh et al. 2020, arXiv 2006.08848, algorithm 1): FedAvg of the clients' Moreau envelopes.

A client's envelope is F(w) = min over theta of f(theta) + lambda/2 * ||theta - w||^2. The minimum is at theta(w), its
personal model, and the gradient is lambda * (w - theta(w)). In each local step, from the global model w, on a batch:

    theta <- theta - rate * (grad f(theta) + lambda * (theta - w))        K times, from where theta stood
    w     <- w - eta * lambda * (w - theta)

The server then mixes: w <- (1 - beta) * w + beta * (the plain mean of the clients' w).

theta(w) follows from the global w and the client's own data, so that nothing is kept. Clients that trained and unseen
ones alike begin at w, and adapt by steps on f(theta) + lambda/2 * ||theta - w||^2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.fields import setting
from perfedavg.methods.base import Method, problem_with_pull

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.settings import OptimizerConfig
    from perfedavg.training.client_models import AfterEpochs, Client, ClientModels
    from perfedavg.training.local_training import LocalTraining


@dataclass(frozen=True)
class PFedMe(Method):
    """Clients step along the gradients of their envelopes, which K steps of their optimizer approximate."""

    name: ClassVar[str] = "pfedme"
    title: ClassVar[str] = "pFedMe"
    pfedme_lambda: float = setting(15.0, "weight of the pull of theta to w", above=0, search="0.3x..3x:log")
    pfedme_eta: float = setting(
        0.005, "learning rate of w; that of theta is the clients'", above=0, search="0.1x..10x:log"
    )
    pfedme_steps: int = setting(5, "steps of theta on each batch", at_least=1)
    pfedme_beta: float = setting(1.0, "weight of the clients' mean in the next global model", above=0, search="1..4")

    def problem_with(self, client_optimizer: OptimizerConfig) -> str | None:
        return problem_with_pull(client_optimizer, self.pfedme_lambda)

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        from perfedavg.training.client_models import pull_to
        from perfedavg.training.optimizers import Optimizer

        models.load(start, len(clients))
        w = models.parameters.clone()
        pull = pull_to(w, self.pfedme_lambda)
        optimizer = Optimizer(training.optimizer, models.parameters)
        steps = models.steps(clients, training)
        for batch in steps:
            local = w[: len(batch.sizes)]
            losses = [models.take_step(batch, optimizer, pull) for _ in range(self.pfedme_steps)]
            steps.note(losses[0])
            local.lerp_(models.parameters[: len(local)], self.pfedme_eta * self.pfedme_lambda)
        updates = models.parameters - start  # the change of theta's buffers, which are those of w too
        # Mixed here, because the mean of beta * (w_k - w) is beta * (their mean - w).
        updates[:, : models.num_weights] = (self.pfedme_beta * (w - start))[:, : models.num_weights]
        return updates, steps.losses

    def personalize(
        self,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs,
    ) -> None:
        from perfedavg.training.client_models import pull_to

        models.train(start, clients, training, pull_to(start, self.pfedme_lambda), after_epochs)

    def round_cost(self, count_steps: Callable[[int], float], num_examples: int) -> float:
        return self.pfedme_steps * super().round_cost(count_steps, num_examples)

    def bytes_per_client(self, bytes_of_step: Callable[[int], int], training: LocalTraining, num_examples: int) -> int:
        """w and the pull are there beside theta and its step."""
        return 2 * super().bytes_per_client(bytes_of_step, training, num_examples)
