"""Per-FedAvg (Fallah et al. 2020, arXiv 2002.07948, algorithm 1): FedAvg whose local steps are steps of MAML.

A round's client takes tau local steps, its epochs or --local_steps, each with three batches of its own, D, D' and D'':

    adapted <- w - alpha * grad f(w; D)
    w       <- w - beta * (I - alpha * H) grad f(adapted; D')                        H = the Hessian of f(w; D'')

First-order (fo) leaves H out. Hessian-free (hf) takes a difference of gradients for H u, where u is the gradient there:

    H u ~ (grad f(w + delta * u; D'') - grad f(w - delta * u; D'')) / (2 * delta)

The server goes to the plain mean of the clients' w. With tau = 1 and batches of all examples, fo is FOMAML of
one inner step whose server has the rate beta. alpha is --local_lr. Nothing is kept: clients that trained and unseen
ones alike adapt the global model by plain steps at alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.fields import setting
from perfedavg.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.settings import OptimizerConfig
    from perfedavg.training.client_models import Batch, Client, ClientModels
    from perfedavg.training.local_training import LocalTraining

VARIANTS = ("fo", "hf")


@dataclass(frozen=True)
class PerFedAvg(Method):
    """Clients train w so that it is good after one step on their data, and send how far they got."""

    name: ClassVar[str] = "per_fedavg"
    title: ClassVar[str] = "Per-FedAvg"
    per_fedavg_beta: float = setting(
        0.03, "learning rate of the steps through an adapted model", above=0, search="0.1x..10x:log"
    )
    per_fedavg_variant: str = setting(
        "fo", "without second derivatives (fo), or with differences of gradients (hf)", choices=VARIANTS
    )
    per_fedavg_delta: float = setting(
        1e-3,
        "how far apart these are, in gradients, to each side",
        above=0,
        only_with={"per_fedavg_variant": ("hf",)},
    )

    @property
    def needs_float32(self) -> bool:
        """A difference of gradients that are almost equal would be all rounding."""
        return self.per_fedavg_variant == "hf"

    def problem_with(self, client_optimizer: OptimizerConfig) -> str | None:
        if client_optimizer.name == "sgd":
            return None
        return "it knows the derivatives of plain steps only; use sgd, or the method fomaml"

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        from perfedavg.training.optimizers import Optimizer

        models.load(start, len(clients))
        adapting, alpha = Optimizer(training.optimizer, models.parameters), training.optimizer.learning_rate
        passes = range(3 if self.per_fedavg_variant == "hf" else 2)
        steps = [models.steps([client.in_pass(number) for client in clients], training) for number in passes]
        for adapts, measures, *differences in zip(*steps, strict=True):
            weights = models.parameters[: len(adapts.sizes), : models.num_weights]
            w = weights.clone()
            models.take_step(adapts, adapting)
            gradients, losses = models.differentiate(measures)
            steps[1].note(losses)
            u = gradients[:, : models.num_weights]
            for batch in differences:
                u = u - alpha * self._hessian_product(models, w, u, batch)
            weights.copy_(w).sub_(u, alpha=self.per_fedavg_beta)
            models.refresh()
        return models.parameters - start, steps[1].losses

    def _hessian_product(self, models: ClientModels, w: Tensor, u: Tensor, batch: Batch) -> Tensor:
        """H u, (clients, num_weights), H being of each client's loss on its batch at w."""
        sides = []
        for distance in (self.per_fedavg_delta, -self.per_fedavg_delta):
            models.parameters[: len(w), : models.num_weights] = w + distance * u
            models.refresh()
            gradients, _ = models.differentiate(batch)
            sides.append(gradients[:, : models.num_weights])
        return (sides[0] - sides[1]) / (2 * self.per_fedavg_delta)

    def round_cost(self, count_steps: Callable[[int], float], num_examples: int) -> float:
        """A step takes two gradients, and two more for their difference."""
        return (4 if self.per_fedavg_variant == "hf" else 2) * super().round_cost(count_steps, num_examples)

    def bytes_per_client(self, bytes_of_step: Callable[[int], int], training: LocalTraining, num_examples: int) -> int:
        """w, its gradient and those on both sides of it are there beside the adapted model and its step."""
        return 2 * super().bytes_per_client(bytes_of_step, training, num_examples)
