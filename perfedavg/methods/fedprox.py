"""FedProx (Li et al. 2020, arXiv 1812.06127): clients train on loss(w) + mu/2 * ||w - w_global||^2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.fields import setting
from perfedavg.methods.fedavg import FedAvg

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.training.client_models import Penalty


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose clients are pulled back towards the global model. mu = 0 is FedAvg, to the bit."""

    name: ClassVar[str] = "fedprox"
    mu: float = setting(
        0.01,
        "weight of the proximal term, which pulls clients to the global model",
        at_least=0,
        search="0.001..1:log",
    )

    def penalty(self, start: Tensor) -> Penalty | None:
        """The gradient of the proximal term: mu * (w - w_global)."""
        from perfedavg.training.client_models import pull_to

        return pull_to(start, self.mu) if self.mu else None
