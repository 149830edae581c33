"""What the rivals of `round.py` share: their command line, the workload they read, and what they report.

A rival is a script `python RIVAL.py WORKLOAD.npz ROUNDS WORKERS [MODE]`, which trains all clients of the workload in
every round, on WORKERS threads or processes of one thread. At the end of a round it adds a line to the file that the
environment variable ROUNDS_FILE names. Its last line is JSON: see `report`. It may run in an environment of its own,
with torch and numpy but without this project's dependencies.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import parameters_to_vector, vector_to_parameters  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from models import build_model  # noqa: E402

torch.set_num_threads(1)  # of every process that imports this


@dataclass(frozen=True)
class Workload:
    """As `workload.write` describes it."""

    inputs: Tensor
    labels: Tensor
    parameters: Tensor
    model: str
    num_classes: int
    batch_size: int
    local_epochs: int
    local_lr: float

    @property
    def num_clients(self) -> int:
        return len(self.labels)

    def new_model(self) -> nn.Module:
        """With the initial parameters."""
        model = build_model(self.model, (1, 28, 28), self.num_classes)
        vector_to_parameters(self.parameters.clone(), model.parameters())
        return model

    def client_dataset(self, client: int) -> TensorDataset:
        return TensorDataset(self.inputs[client], self.labels[client])

    def client_loader(self, client: int, generator: torch.Generator | None = None) -> DataLoader[Any]:
        return DataLoader(self.client_dataset(client), self.batch_size, shuffle=True, generator=generator)


@lru_cache(maxsize=1)
def read_workload(path: str) -> Workload:
    """Read once in a process."""
    with np.load(path) as arrays:
        return Workload(
            torch.from_numpy(arrays["inputs"]),
            torch.from_numpy(arrays["labels"]),
            torch.from_numpy(arrays["parameters"]),
            str(arrays["model"]),
            int(arrays["num_classes"]),
            int(arrays["batch_size"]),
            int(arrays["local_epochs"]),
            float(arrays["local_lr"]),
        )


def train(model: nn.Module, loader: DataLoader[Any], workload: Workload) -> None:
    """The local steps of a client, in place, as a tutorial of PyTorch writes them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.local_lr)
    criterion = nn.CrossEntropyLoss()
    model.train()
    for _ in range(workload.local_epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()


@dataclass
class Clock:
    """Unix times, in seconds. began: of the first round.  ended: of each round, its new global model being there."""

    began: float = 0.0
    ended: list[float] = field(default_factory=list)

    def start_round(self) -> None:
        if not self.ended:
            self.began = time.time()

    def end_round(self) -> None:
        self.ended.append(time.time())
        with open(os.environ.get("ROUNDS_FILE", os.devnull), "a") as file:
            file.write(f"{self.ended[-1]}\n")


def report(clock: Clock, final: nn.Module, workload: Workload, round_bytes: float | None, bytes_note: str) -> None:
    """Print the JSON that `round.py` reads.

    round_bytes: that a round moves between processes.  bytes_note: how they were counted, or why they are not known.
    Raises ValueError where the model did not move, or is not finite: then a rival was set up wrongly.
    """
    moved = (parameters_to_vector(final.parameters()) - workload.parameters).norm().item()
    if not 0 < moved < float("inf"):
        raise ValueError(f"the global model moved by {moved}, so this was no training")
    answer = {"began": clock.began, "ended": clock.ended, "round_bytes": round_bytes, "bytes_note": bytes_note}
    print(json.dumps({**answer, "moved": moved, "torch": torch.__version__}), flush=True)
