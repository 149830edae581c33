"""Methods: what a client does in a round. One file each, with its paper and its settings; known here by name."""

from __future__ import annotations

from perfedavg.methods.apfl import APFL
from perfedavg.methods.base import Method
from perfedavg.methods.ditto import Ditto
from perfedavg.methods.fedavg import FedAvg
from perfedavg.methods.fedprox import FedProx
from perfedavg.methods.fomaml import FOMAML
from perfedavg.methods.maml import MAML
from perfedavg.methods.per_fedavg import PerFedAvg
from perfedavg.methods.personal_layers.fedbabu import FedBABU
from perfedavg.methods.personal_layers.fedbn import FedBN
from perfedavg.methods.personal_layers.fedper import FedPer
from perfedavg.methods.personal_layers.fedrep import FedRep
from perfedavg.methods.personal_layers.lg_fedavg import LGFedAvg
from perfedavg.methods.pfedme import PFedMe
from perfedavg.methods.reptile import Reptile
from perfedavg.own_kinds import OpenKinds

__all__ = ["FOMAML", "MAML", "METHODS", "FedAvg", "FedBABU", "FedBN", "FedPer", "FedProx", "FedRep", "LGFedAvg"]
__all__ += ["APFL", "Ditto", "Method", "PFedMe", "PerFedAvg", "Reptile"]

_OWN = (FedAvg, FedProx, Reptile, FOMAML, MAML)
_PERSONAL_LAYERS = (FedPer, FedRep, FedBABU, LGFedAvg, FedBN)
_SECOND_MODELS = (Ditto, PFedMe, APFL, PerFedAvg)
METHODS = OpenKinds(
    {method.name: method for method in (*_OWN, *_PERSONAL_LAYERS, *_SECOND_MODELS)},
    Method,
    "method",
    needed="update",
)
