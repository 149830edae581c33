"""A FedAvg round as a plain PyTorch loop: DataLoader, a copy of the model for each client, one process, one thread.

python benchmarks/rivals/plain_loop.py WORKLOAD.npz ROUNDS WORKERS       (started by benchmarks/round.py)
"""

from __future__ import annotations

import copy
import sys

import torch
from rival import Clock, read_workload, report, train
from torch import Tensor


def main() -> None:
    workload, num_rounds = read_workload(sys.argv[1]), int(sys.argv[2])
    model = workload.new_model()
    clock = Clock()
    for _ in range(num_rounds):
        clock.start_round()
        states: list[dict[str, Tensor]] = []
        for client in range(workload.num_clients):
            local = copy.deepcopy(model)
            train(local, workload.client_loader(client), workload)
            states.append(local.state_dict())
        sizes = [len(labels) for labels in workload.labels]
        weights = [size / sum(sizes) for size in sizes]
        with torch.no_grad():
            model.load_state_dict(
                {
                    name: torch.stack([w * state[name] for w, state in zip(weights, states, strict=True)]).sum(0)
                    for name in states[0]
                }
            )
        clock.end_round()
    report(clock, model, workload, 0.0, "one process")


if __name__ == "__main__":
    main()
