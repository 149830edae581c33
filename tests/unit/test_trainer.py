"""A worker's trainer: what a client's training came to is told once, whenever a sum is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Difference, QuadraticClients, make_config
from torch import Tensor

from multi_process.messages import GroupTrained, StartTraining
from multi_process.worker import PersonalizationTrainer
from perfedavg.methods import FedAvg


def test_a_sum_that_leaves_while_a_client_trains_takes_no_report_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the server would count a client twice, and send an honest worker away."""
    clients = QuadraticClients([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]], [3, 4, 5], num_unseen=1)
    config, model = make_config(num_clients=None, cohort_size=2), Difference([0.0, 0.0])

    def ignore(*told: Any) -> None:
        pass

    trainer = PersonalizationTrainer(config, model, clients, torch.device("cpu"), 1, ignore, ignore)  # type: ignore[arg-type]
    trainer.begin(StartTraining(1, 1, 7, torch.zeros(2, dtype=torch.float64)))
    sent: list[list[int]] = []

    def send() -> None:
        sent.append([_client_of(report) for report in trainer.uplink_package.reports])

    update = FedAvg.update

    def update_while_sums_leave(*arguments: Any) -> tuple[Tensor, list[float]]:
        send()
        return update(*arguments)

    monkeypatch.setattr(FedAvg, "update", update_while_sums_leave)
    assert trainer._train([0]) == GroupTrained(0)
    assert trainer._train([1]) == GroupTrained(1)
    send()
    assert sent == [[], [0], [1]]


def _client_of(report: Any) -> int:
    return int(report["client_id"] if isinstance(report, dict) else report.client_id)
