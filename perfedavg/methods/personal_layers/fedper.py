"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): base layers are shared, personalization layers stay.

In a round, client k goes on from the shared layers w_shared and its own w_k, and trains both together:

    (w_shared', w_k) = local training from (w_shared, w_k) on client k
    w_shared <- sum over k of n_k / n * w_shared'

An unseen client begins with the initial w_k, and personalizes by training both, as one that trained does from its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from perfedavg.methods.personal_layers.base import PersonalLayers


@dataclass(frozen=True)
class FedPer(PersonalLayers):
    """The last layer stays with the client, and trains with the others. Without any it is FedAvg, to the bit."""

    name: ClassVar[str] = "fedper"
