"""A worker's side: a FedLab client manager that answers the server, and the trainer that does the work."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from fedlab.core.client.manager import PassiveClientManager
from fedlab.core.client.trainer import SerialClientTrainer
from fedlab.core.network_manager import NetworkManager
from torch import Tensor, nn

from multi_process.messages import (
    ClientsScored,
    ClientsTrained,
    Configure,
    Failed,
    Finish,
    Join,
    Message,
    Ready,
    ScoreClients,
    TrainClients,
)
from multi_process.network import TypedNetwork
from perfedavg.client_data import FederatedDataset
from perfedavg.config import ExperimentConfig, Phase
from perfedavg.console import say
from perfedavg.executor import CohortTask, LocalExecutor, ScoringTask

SetUp = Callable[[ExperimentConfig], tuple[nn.Module, FederatedDataset]]
"""Builds the model and reads the data set that a configuration names."""


class PersonalizationTrainer(SerialClientTrainer):
    """FedLab's serial trainer: simulates many clients in one process, by means of a `LocalExecutor`."""

    def __init__(
        self,
        config: ExperimentConfig,
        model: nn.Module,
        dataset: FederatedDataset,
        device: torch.device,
        num_lanes: int,
    ) -> None:
        num_clients = len(dataset.train_client_ids) + len(dataset.unseen_client_ids)
        super().__init__(model, num_clients, cuda=False)
        self.dataset = dataset
        self._executor = LocalExecutor(config, self._model, dataset, device, num_lanes)
        self._answer: Message | None = None

    def local_process(self, payload: TrainClients | ScoreClients, id_list: list[int]) -> None:
        """Do what the server asks for with the clients of the list."""
        self._answer = (
            self._train(payload, id_list) if isinstance(payload, TrainClients) else self._score(payload, id_list)
        )

    @property
    def uplink_package(self) -> Message:
        """The answer to the last `local_process`."""
        assert self._answer is not None, "there is work before there is an answer"
        return self._answer

    def _train(self, work: TrainClients, client_ids: list[int]) -> ClientsTrained:
        task = CohortTask(Phase(work.phase), work.round_number, tuple(client_ids), work.capacity)
        update = self._executor.train(task, work.parameters)
        return ClientsTrained(
            weight=update.sum.weight,
            capacity=update.sum.capacity,
            client_ids=_whole_numbers([report.client_id for report in update.reports]),
            num_examples=_whole_numbers([report.num_examples for report in update.reports]),
            losses=torch.tensor([report.loss for report in update.reports], dtype=torch.float64),
            total=update.sum.total,
        )

    def _score(self, work: ScoreClients, client_ids: list[int]) -> ClientsScored:
        scores = self._executor.score(
            ScoringTask(Phase(work.phase), work.round_number, tuple(client_ids)), work.parameters
        )
        counts = [[score.client_id, score.num_train_examples, score.num_test_examples] for score in scores]
        measures = [
            [score.initial_loss, score.initial_accuracy, score.personalized_loss, score.personalized_accuracy]
            for score in scores
        ]
        return ClientsScored(_whole_numbers(counts), torch.tensor(measures, dtype=torch.float64))


class WorkerManager(PassiveClientManager):
    """FedLab's passive client manager: joins, takes over the server's configuration, and does what it is asked for.

    set_up: turns the configuration into model and data, once it is known.
    threads: clients side by side that the user asked for, or None for this worker's share of the machine.
    """

    def __init__(self, network: TypedNetwork, set_up: SetUp, device: torch.device, threads: int | None) -> None:
        super().__init__(network, trainer=None)
        self._network: TypedNetwork = network
        self._set_up = set_up
        self._device = device
        self._threads = threads
        self._trainer: PersonalizationTrainer | None = None

    def run(self) -> None:
        """Join, work, leave. Where this worker fails, the server is told why before the error goes on its way."""
        NetworkManager.setup(self)  # not ClientManager's, which reports a number of clients before it knows them
        try:
            self._configure()
            self.main_loop()
        except ConnectionError:
            raise  # there is nobody left to tell
        except Exception as error:
            with contextlib.suppress(ConnectionError):
                self._network.send_message(Failed(" ".join(str(error).split()) or type(error).__name__), rank=0)
            raise
        self.shutdown()

    def main_loop(self) -> None:
        assert self._trainer is not None, "the worker is configured before it works"
        while not isinstance(request := self._network.receive_message(rank=0), Finish):
            if not isinstance(request, TrainClients | ScoreClients):
                raise ValueError(f"the server sent {type(request).__name__} where work was expected")
            self._trainer.local_process(request, request.client_ids.tolist())
            self.synchronize()

    def synchronize(self) -> None:
        """Send the answer up."""
        assert self._trainer is not None, "the worker is configured before it works"
        self._network.send_message(self._trainer.uplink_package, rank=0)

    def _configure(self) -> None:
        self._network.send_message(Join(machine_identity(), len(os.sched_getaffinity(0)), self._threads), rank=0)
        answer = self._network.receive_message(rank=0)
        if not isinstance(answer, Configure):
            raise ValueError(f"the server sent {type(answer).__name__} where the configuration was expected")
        config = ExperimentConfig.from_dict(answer.experiment)
        model, dataset = self._set_up(config)
        self._trainer = PersonalizationTrainer(config, model, dataset, self._device, answer.num_lanes)
        say(
            f"worker {self._network.rank}: joined {self._network.address[0]}:{self._network.address[1]}, "
            f"{config.dataset} on {self._device}, training {answer.num_lanes} client(s) side by side"
        )
        self._network.send_message(Ready(dataset.fingerprint, str(self._device)), rank=0)


def machine_identity() -> str:
    """The same for all processes of one machine (containers included), and different on every other machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _whole_numbers(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
