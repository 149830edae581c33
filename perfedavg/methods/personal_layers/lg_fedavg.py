"""LG-FedAvg (Liang et al. 2020, arXiv 2001.01523): local representations, and a global model on top of them.

FedPer the other way round: the first layers, w_k, are the client's own, and the last one, w_shared, is averaged.

    (w_shared', w_k) = local training from (w_shared, w_k) on client k
    w_shared <- sum over k of n_k / n * w_shared'

An unseen client begins with the initial representation under the shared last layer, and personalizes by training both.
The paper starts from a model that FedAvg has trained: `--initial_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perfedavg.methods.personal_layers.base import PersonalLayers

if TYPE_CHECKING:
    from perfedavg.training.layout import Layout


@dataclass(frozen=True)
class LGFedAvg(PersonalLayers):
    """All layers but the last one stay with the client."""

    name: ClassVar[str] = "lg_fedavg"
    title: ClassVar[str] = "LG-FedAvg"

    def personal_by_default(self, layout: Layout) -> tuple[str, ...]:
        return layout.others(layout.head)
