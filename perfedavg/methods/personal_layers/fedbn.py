"""FedBN (Li et al. 2021, arXiv 2102.07623): normalization layers are each client's own.

Client k keeps the weights, biases and running statistics of its normalization layers, w_k, and shares the rest:

    (w_shared', w_k) = local training from (w_shared, w_k) on client k
    w_shared <- sum over k of n_k / n * w_shared'

The mean of the clients' normalization layers is in the global model too, because a client that has no w_k needs some to
begin with: an unseen one, and any in its first round.
An unseen client personalizes by training all layers, as one that trained does with its own w_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.methods.personal_layers.base import OwnLayers

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.training.layout import Layout


@dataclass(frozen=True)
class FedBN(OwnLayers):
    """Clients keep their normalization layers. A model without any is FedAvg's, to the bit."""

    name: ClassVar[str] = "fedbn"

    def personal(self, layout: Layout) -> tuple[str, ...]:
        return layout.normalization

    def sent(self, layout: Layout, change: Tensor) -> Tensor:
        return change
