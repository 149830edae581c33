"""A worker's side: joins, takes over the server's configuration, and does what it is asked for."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from multi_process.boundary import check_start, clean_text
from multi_process.fedlab_adapter import ClientManager, SerialTrainer
from multi_process.messages import (
    AssignGroups,
    Configure,
    Failed,
    Finish,
    GroupScored,
    GroupTrained,
    Join,
    KeptStates,
    Message,
    PartialSum,
    Ready,
    RequestPartialSum,
    StartScoring,
    StartTraining,
)
from multi_process.transport.handshake import FinishedError
from multi_process.transport.peer import PeerLostError, RunEndedError
from multi_process.transport.worker_network import WorkerNetwork
from multi_process.travelling_states import TravellingStates
from perfedavg.contracts import FederatedDataset
from perfedavg.engine.client_states import max_batch_bytes
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.local_work import CohortTraining
from perfedavg.engine.tasks import CohortTask, ScoringTask
from perfedavg.machine.cores import usable_cores
from perfedavg.own_module import changed_sources
from perfedavg.settings import ExperimentConfig, Phase
from perfedavg.terminal.console import reason_of, say
from perfedavg.training.compute import describe_device, describe_kernels
from perfedavg.training.flat_model import flatten

FAREWELL_SECONDS = 5.0
"""For the server to hear why a worker leaves."""

BuildWorkload = Callable[[ExperimentConfig], tuple[nn.Module, FederatedDataset]]
"""Builds the model and reads the data set that a configuration names."""


class PersonalizationTrainer(SerialTrainer):
    """Trains and scores clients by means of a `LocalExecutor`.

    send: is given each answer as soon as there is one, in the thread of a slot.
    report_failure: is given what went wrong with a group of clients, and the first one's id.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: nn.Module,
        dataset: FederatedDataset,
        device: torch.device,
        num_slots: int,
        send: Callable[[Message], None],
        report_failure: Callable[[Exception, int], None],
    ) -> None:
        super().__init__(model, len(dataset.train_client_ids) + len(dataset.unseen_client_ids))
        self.dataset = dataset
        self.num_parameters = flatten(model).numel()
        self.config = config
        self._executor = LocalExecutor(config, model, dataset, device, num_slots)
        self.warnings = self._executor.warnings
        self._send = send
        self._report_failure = report_failure
        self._work: Callable[[Sequence[int]], Message] | None = None
        self._training: CohortTraining | None = None
        self._states = TravellingStates()
        self._futures: list[Future[None]] = []

    @property
    def has_begun(self) -> bool:
        """Whether it knows what clients are to do."""
        return self._work is not None

    @property
    def is_training(self) -> bool:
        return self._training is not None

    def begin(self, payload: StartTraining | StartScoring) -> None:
        """Take over the global model. What the clients of `local_process` do from now on is train, or be scored.

        Raises ValueError where it is not of the experiment.
        """
        self.abandon()
        check_start(payload.phase, payload.parameters, self.config.phases, self.num_parameters)
        phase, parameters = Phase(payload.phase), payload.parameters.clone()
        if isinstance(payload, StartTraining):
            task = CohortTask(phase, payload.round_number, (), payload.capacity, self._states)
            self._training = self._executor.begin_training(task, parameters)
            self._work = self._train
        else:
            scoring = ScoringTask(phase, payload.round_number, (), payload.num_curve_epochs, self._states)
            score = self._executor.begin_scoring(scoring, parameters).score
            self._work = lambda group: GroupScored(score(group))

    def take_states(self, payload: KeptStates) -> None:
        """What clients that come next kept from earlier rounds."""
        self._states.add(payload.states)

    def local_process(self, payload: AssignGroups, id_list: list[list[int]]) -> None:
        """Let the groups of the list train or be scored, each on the next free slot. Does not wait for them."""
        for group in id_list:
            if self._training is not None:
                self._training.expect(group)
            self._futures.append(self._executor.submit(self._process, group))

    @property
    def uplink_package(self) -> PartialSum:
        """The sum over the clients that were trained since the last one. None may be in training."""
        assert self._training is not None, "there is a round before there is a sum"
        taken = self._training.take_update()
        states = self._states.take()
        return PartialSum(taken.sum.weight, taken.sum.capacity, taken.reports, taken.sum.total, states)

    def abandon(self) -> None:
        """Forget the work that was begun. Waits for the clients that are on a slot."""
        for future in self._futures:
            future.cancel()
        wait(self._futures)
        self._futures.clear()
        self._training = self._work = None
        self._states = TravellingStates()

    def _process(self, group: Sequence[int]) -> None:
        assert self._work is not None, "work was begun before its clients came"
        try:
            answer = self._work(group)
        except Exception as error:  # whatever it is, the worker's main thread must hear of it
            self._report_failure(error, group[0])
        else:
            self._send(answer)

    def _train(self, group: Sequence[int]) -> Message:
        assert self._training is not None, "a round was begun"
        self._training.train(group)
        if batch := self._states.take_batch():
            self._send(KeptStates(batch))
        return GroupTrained(group[0])


class _ClientError(Exception):
    """What went wrong with a client, on its way from a slot to the main thread."""

    def __init__(self, error: Exception, client_id: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.client_id = client_id


class WorkerManager(ClientManager):
    """The life of a worker. A server that is lost is waited for, and joined again.

    build_workload: turns the configuration into model and data, once it is known.
    threads: clients side by side that the user asked for, or None for this worker's share of the machine.
    """

    def __init__(
        self, network: WorkerNetwork, build_workload: BuildWorkload, device: torch.device, threads: int | None
    ) -> None:
        super().__init__(network)
        self._network: WorkerNetwork = network
        self._build_workload = build_workload
        self._device = device
        self._threads = threads
        self._configured: Configure | None = None
        self._trainer: PersonalizationTrainer | None = None

    def run(self) -> None:
        """Join, work, leave."""
        while True:
            try:
                super().run()  # setup, main_loop, shutdown
                return
            except PeerLostError as error:
                say(f"worker {self._network.rank}: {error}; joining anew")
                if self._trainer is not None:
                    self._trainer.abandon()
            except FinishedError as over:  # it joined too late for any work
                say(f"worker {self._network.rank}: {over}")
                self.shutdown()
                return

    def main_loop(self) -> None:
        """Work until the run is over. Where this worker fails, the server is told why before the error is raised."""
        try:
            self._answer_requests(self._configure())
        except (PeerLostError, RunEndedError, FinishedError):
            raise  # the server knows
        except _ClientError as failed:
            self._send_failure(failed.error, failed.client_id)
            raise failed.error from None
        except Exception as error:
            self._send_failure(error, None)
            raise

    def _configure(self) -> PersonalizationTrainer:
        """Set up the model and data that the server names, unless they are there from before."""
        network, device = self._network, describe_device(self._device, self._threads)
        machine, num_cores, kernels = machine_identity(), usable_cores(), describe_kernels(self._device)
        self._send(Join(network.ticket, machine, num_cores, self._threads, device.kind, device.memory_bytes, kernels))
        answer = network.peer.receive()
        if not isinstance(answer, Configure) or answer.ticket != network.ticket:
            raise ValueError("what speaks on the tensors' connection is not the server")
        configured = replace(answer, ticket="")  # which is new each time
        if self._trainer is None or configured != self._configured:
            config = ExperimentConfig.from_dict(answer.experiment)
            model, dataset = self._build_workload(config)
            changed = ", ".join(changed_sources(answer.sources))
            if changed:
                raise ValueError(
                    f"the code of {clean_text(changed)} is not the server's; give both the same files, and start the "
                    "worker again"
                )
            self._trainer = PersonalizationTrainer(
                config, model, dataset, self._device, answer.num_slots, self._send, self._report_failure
            )
        self._configured = configured
        network.peer.num_parameters = self._trainer.num_parameters
        network.peer.max_states_bytes = max_batch_bytes(self._trainer.config, self._trainer.num_parameters)
        network.peer.num_in_hand = answer.num_slots + 1
        say(
            f"worker {network.rank}: joined {network.address[0]}:{network.address[1]}, "
            f"{clean_text(answer.experiment['dataset'])} on {self._device}, {answer.num_slots} client(s) side by side"
        )
        self._send(Ready(self._trainer.dataset.fingerprint, str(self._device), self._trainer.warnings))
        return self._trainer

    def _answer_requests(self, trainer: PersonalizationTrainer) -> None:
        while not isinstance(request := self._network.peer.receive(), Finish):
            match request:
                case StartTraining() | StartScoring():
                    trainer.begin(request)
                case KeptStates() if trainer.has_begun:
                    trainer.take_states(request)
                case AssignGroups() if trainer.has_begun:
                    trainer.local_process(request, request.groups)
                case RequestPartialSum() if trainer.is_training:
                    self._send(trainer.uplink_package)
                case _:
                    raise ValueError(f"the server sent {type(request).__name__} where work was expected")

    def _send(self, message: Message) -> None:
        """Send to the server. Where it is lost, the main thread hears of it when it next receives."""
        with contextlib.suppress(PeerLostError, RunEndedError, FinishedError):
            self._network.peer.send(message)

    def _report_failure(self, error: Exception, client_id: int) -> None:
        """A client could not be worked on: let the main thread raise the error."""
        self._network.peer.interrupt(_ClientError(error, client_id))

    def _send_failure(self, error: Exception, client_id: int | None) -> None:
        self._send(Failed(reason_of(error), client_id))
        self._network.peer.drain(FAREWELL_SECONDS)


def machine_identity() -> str:
    """The same for all processes of one machine (containers included), and different on every other machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
