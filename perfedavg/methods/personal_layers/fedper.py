"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): base layers are shared, personalization layers stay.

In a round, client k trains both together from (w_shared, w_k), keeps w_k, and sends the change of w_shared:

    w_shared <- sum_k n_k / n * w_shared,k        w_k is the client's own.

An unseen client has no w_k: it begins with the initial one, and trains all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from perfedavg.methods.personal_layers.base import PersonalLayers


@dataclass(frozen=True)
class FedPer(PersonalLayers):
    """Personal layers that train together with the shared ones. With none it is FedAvg, to the bit."""

    name: ClassVar[str] = "fedper"
