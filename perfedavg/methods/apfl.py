"""APFL (Deng et al. 2020, arXiv 2003.13461, algorithm 1): each client mixes the global model with one of its own.

Beside FedAvg's local model w, a client trains its own v, which it keeps. What it predicts with is their mixture, of the
parameters, not of the outputs. In each local step, both gradients on the same batch and before either step:

    mixture = alpha * v + (1 - alpha) * w
    w <- w - rate * grad f(w)                                   FedAvg's, to the bit
    v <- v - rate * alpha * grad f(mixture)                     alpha by the chain rule

alpha is the same for all, or each client's own, which then adapts in the first step of a round (within 0 .. 1):

    alpha <- alpha - rate * <v - w, grad f(mixture)>            the derivative of f(mixture)

The paper averages the clients' w plainly; here they have FedAvg's weights, so that alpha = 0 is FedAvg.

v begins at the w of the client's first round. An unseen client begins with v = w too, and adapts by the same steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.fields import setting
from perfedavg.methods.fedavg import FedAvg

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.training.client_models import AfterEpochs, Client, ClientModels
    from perfedavg.training.local_training import LocalTraining


@dataclass(frozen=True)
class APFL(FedAvg):
    """FedAvg whose clients are scored with mixtures. alpha = 0 is FedAvg, to the bit; alpha = 1 is local training."""

    name: ClassVar[str] = "apfl"
    keeps_state: ClassVar[bool] = True
    goes_on: ClassVar[bool] = False
    apfl_alpha: float = setting(
        0.5, "share of the client's own model in the mixture", at_least=0, at_most=1, search="0.1..0.9"
    )
    apfl_adaptive: bool = setting(False, "whether that is only where each client's share begins, which then adapts")

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        v, alpha, losses = self._train(models, start, clients, training)
        for client, own, share in zip(clients, v, alpha, strict=True):
            client.state["model"] = own
            if self.apfl_adaptive:
                client.state["alpha"] = share
        return models.parameters - start, losses

    def personalize(
        self,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs,
    ) -> None:
        self._train(models, start, clients, training, after_epochs)

    def _train(
        self,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs | None = None,
    ) -> tuple[Tensor, Tensor, list[float]]:
        """v, (clients, num_parameters), alpha, (clients, 1), and the losses of w, which the models then are.

        after_epochs: is told of the mixtures, but before the first step of w.
        """
        from perfedavg.training.client_models import kept_rows
        from perfedavg.training.optimizers import Optimizer

        v = kept_rows(clients, "model", start)
        alpha = kept_rows(clients, "alpha", start.new_tensor([self.apfl_alpha]))

        @contextlib.contextmanager
        def mixed(num_clients: int) -> Iterator[Tensor]:
            """Meanwhile the models of the first clients are their mixtures. Yields their w."""
            rows = models.parameters[:num_clients]
            w = rows.clone()
            rows.lerp_(v[:num_clients], alpha[:num_clients])
            models.refresh()
            yield w
            rows.copy_(w)
            models.refresh()

        def score_mixtures(ended: dict[int, int]) -> None:
            assert after_epochs is not None
            with mixed(max(ended) + 1) if 0 not in ended.values() else contextlib.nullcontext():
                after_epochs(ended)

        models.load(start, len(clients))
        steps = models.steps(clients, training, None if after_epochs is None else score_mixtures)
        step_of_w, step_of_v = Optimizer(training.optimizer, models.parameters), Optimizer(training.optimizer, v)
        adapts = self.apfl_adaptive
        for batch in steps:
            num_clients = len(batch.sizes)
            with mixed(num_clients) as w, models.repeating_dropout():
                gradients, _ = models.differentiate(batch)
                v[:num_clients, models.num_weights :] = models.parameters[:num_clients, models.num_weights :]
            slopes = ((v[:num_clients] - w) * gradients).sum(dim=1, keepdim=True) if adapts else None
            step_of_v.narrow(num_clients)
            step_of_v.step(gradients.mul_(alpha[:num_clients]))
            if slopes is not None:
                alpha.sub_(slopes, alpha=training.optimizer.learning_rate).clamp_(0, 1)
                adapts = False
            steps.note(models.take_step(batch, step_of_w))
        return v, alpha, steps.losses

    def round_cost(self, count_steps: Callable[[int], float], num_examples: int) -> float:
        return 2 * super().round_cost(count_steps, num_examples)

    def bytes_per_client(self, bytes_of_step: Callable[[int], int], training: LocalTraining, num_examples: int) -> int:
        """v, the gradients at the mixture and v's optimizer are there beside w and its step."""
        return 2 * super().bytes_per_client(bytes_of_step, training, num_examples)
