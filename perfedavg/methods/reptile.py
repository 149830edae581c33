"""Reptile (Nichol et al. 2018, arXiv 1803.02999), batched: the global model steps towards the mean of the clients'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from perfedavg.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Reptile(FedAvg):
    """FedAvg whose clients all have the same weight."""

    name: ClassVar[str] = "reptile"

    def weight(self, num_examples: int) -> int:
        return 1
