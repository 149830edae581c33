"""A FedAvg round with BlazeFL's own FedAvg, in each of its three ways to run clients.

python benchmarks/rivals/blazefl_processes.py WORKLOAD.npz ROUNDS WORKERS MODE       (started by benchmarks/round.py)

MODE: `serial` (one thread), `threads`, or `processes` (tensors in shared memory, BlazeFL's faster way for processes).
The handler and the trainers are those of `blazefl.contrib`. BlazeFL starts its processes anew in every round; here they
are forked, the cheapest way, from a process that has already imported what torch's optimizers import when first used,
which otherwise each of them would import again (a round of four clients then takes three times as long).
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.multiprocessing
from blazefl.contrib import (  # type: ignore[import-not-found]
    FedAvgBaseClientTrainer,
    FedAvgBaseServerHandler,
    FedAvgProcessPoolClientTrainer,
    FedAvgThreadPoolClientTrainer,
)
from blazefl.core import IPCMode  # type: ignore[import-not-found]
from rival import Clock, Workload, read_workload, report
from torch import nn

BYTES_NOTES = {"serial": "one process", "threads": "one process", "processes": "parameters lie in shared memory"}


@dataclass(frozen=True)
class Clients:
    """BlazeFL's PartitionedDataset and ModelSelector. Holds a path only, because it is sent along with every client."""

    path: str

    def select_model(self, model_name: str) -> nn.Module:
        return read_workload(self.path).new_model()

    def get_dataset(self, type_: str, cid: int | None) -> Any:
        return read_workload(self.path).client_dataset(cid or 0)

    def set_dataset(self, type_: str, cid: int | None, dataset: Any) -> None:
        pass

    def get_dataloader(self, type_: str, cid: int | None, batch_size: int | None, generator: Any = None) -> Any:
        return read_workload(self.path).client_loader(cid or 0, generator)


def main() -> None:
    path, num_rounds, num_workers, mode = sys.argv[1:]
    torch.multiprocessing.set_start_method("fork")
    if mode == "processes":
        importlib.import_module("torch._dynamo")
    workload = read_workload(path)
    with tempfile.TemporaryDirectory() as folder:
        clients = Clients(path)
        handler = FedAvgBaseServerHandler(
            clients, workload.model, clients, int(num_rounds), workload.num_clients, 1.0, "cpu", workload.batch_size, 0
        )
        trainer = new_trainer(mode, workload, clients, int(num_workers), Path(folder))
        clock = Clock()
        while not handler.if_stop():
            clock.start_round()
            cohort = handler.sample_clients()
            trainer.local_process(handler.downlink_package(), cohort)
            for package in trainer.uplink_package():
                handler.load(package)
            clock.end_round()
    report(clock, handler.model, workload, None if mode == "processes" else 0.0, BYTES_NOTES[mode])


def new_trainer(mode: str, workload: Workload, clients: Clients, num_workers: int, folder: Path) -> Any:
    settings: dict[str, Any] = {
        "model_selector": clients,
        "model_name": workload.model,
        "dataset": clients,
        "device": "cpu",
        "num_clients": workload.num_clients,
        "epochs": workload.local_epochs,
        "batch_size": workload.batch_size,
        "lr": workload.local_lr,
        "seed": 0,
    }
    if mode == "serial":
        return FedAvgBaseClientTrainer(**settings)
    if mode == "threads":
        return FedAvgThreadPoolClientTrainer(**settings, num_parallels=num_workers)
    return FedAvgProcessPoolClientTrainer(
        **settings,
        num_parallels=num_workers,
        share_dir=folder / "share",
        state_dir=folder / "state",
        ipc_mode=IPCMode.SHARED_MEMORY,
    )


if __name__ == "__main__":
    main()
