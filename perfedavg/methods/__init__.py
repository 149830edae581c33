"""Methods: what a client does in a round. One file each, with its paper and its settings; known here by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perfedavg.methods.base import Method
from perfedavg.methods.fedavg import FedAvg
from perfedavg.methods.fedprox import FedProx
from perfedavg.methods.fomaml import FOMAML
from perfedavg.methods.maml import MAML
from perfedavg.methods.reptile import Reptile

if TYPE_CHECKING:
    from perfedavg.settings import ExperimentConfig, Phase

METHODS: dict[str, type[Method]] = {method.name: method for method in (FedAvg, FedProx, Reptile, FOMAML, MAML)}


def method_of(config: ExperimentConfig, phase: Phase) -> Method:
    """What the clients of a phase do."""
    settings = config.phases[phase]
    if isinstance(settings.method, Method):
        return settings.method
    if phase == 1:
        return FedAvg()
    method = METHODS[settings.method]
    return method(support_fraction=settings.support_fraction) if issubclass(method, FOMAML) else method()
