"""The server's side: a FedLab server manager that is an executor, and a handler that merges what workers send."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from fedlab.core.network_manager import NetworkManager
from fedlab.core.server.handler import ServerHandler
from fedlab.core.server.manager import ServerManager
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
from perfedavg.client_data import ClientDirectory
from perfedavg.config import ExperimentConfig
from perfedavg.console import say
from perfedavg.exact_sum import ExactSum
from perfedavg.executor import ClientReport, CohortTask, CohortUpdate, Executor, ScoringTask
from perfedavg.scores import ClientScore

Answer = TypeVar("Answer", bound=Message)


class CohortHandler(ServerHandler):
    """FedLab's parameter server: holds the global model of a round and merges the workers' parts of its sum.

    The round loop and the server optimizer are the experiment's (`perfedavg.experiment`), the same with and without
    a network; so this handler hands out parameters and adds, and decides nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, cuda=False)
        self.num_clients = 0  # FedLab's managers set it
        self._missing: set[int] = set()
        self._update: CohortUpdate | None = None

    def begin(self, task: CohortTask, parameters: Tensor) -> None:
        """Start a round: forget the last one, take over its model."""
        self.set_model(parameters)
        self._missing = set(task.client_ids)
        self._update = CohortUpdate(ExactSum.zeros(parameters.numel(), task.capacity), [])

    @property
    def downlink_package(self) -> list[Tensor]:
        return [self.model_parameters]

    @property
    def if_stop(self) -> bool:
        """Whether every client of the round has reported."""
        return not self._missing

    def load(self, payload: ClientsTrained) -> bool:
        """Merge a worker's part. True when the round is complete. Raises ValueError for clients not asked for."""
        client_ids = payload.client_ids.tolist()
        if not self._missing.issuperset(client_ids):
            raise ValueError(f"clients {sorted(set(client_ids) - self._missing)} were reported, but not missing")
        reports = zip(client_ids, payload.num_examples.tolist(), payload.losses.tolist(), strict=True)
        self.cohort_update.merge(
            CohortUpdate(
                ExactSum(payload.total, payload.weight, payload.capacity),
                [ClientReport(client_id, num_examples, loss) for client_id, num_examples, loss in reports],
            )
        )
        self._missing.difference_update(client_ids)
        return self.if_stop

    @property
    def cohort_update(self) -> CohortUpdate:
        assert self._update is not None, "a round has begun"
        return self._update

    def setup_optim(self) -> None:
        raise NotImplementedError("the server optimizer is the experiment's; see perfedavg.optimizers")

    def global_update(self, buffer: object) -> None:
        raise NotImplementedError("the server step is the experiment's; see perfedavg.experiment")

    def evaluate(self) -> None:
        raise NotImplementedError("unseen clients are scored by the workers; see perfedavg.executor")


class WorkerPoolManager(ServerManager):
    """FedLab's server manager as an `Executor`: hands each round's clients to the workers and collects the answers.

    experiment: is called once all workers are ready, with this manager as the executor.
    """

    def __init__(
        self,
        network: TypedNetwork,
        handler: CohortHandler,
        config: ExperimentConfig,
        clients: ClientDirectory,
        experiment: Callable[[Executor], None],
    ) -> None:
        super().__init__(network, handler, mode="GLOBAL")
        self._network: TypedNetwork = network
        self._handler: CohortHandler = handler
        self._experiment_config = config
        self._clients = clients
        self._experiment = experiment
        self._answers: queue.SimpleQueue[tuple[int, Message | Exception]] = queue.SimpleQueue()
        self._links: list[_Link] = []

    def setup(self) -> None:
        """Let the workers join, configure each, and check that all read the same data as the server."""
        NetworkManager.setup(self)  # not ServerManager's, which maps each client to a worker once and for all
        ranks = range(1, self._network.world_size)
        self._links = [_Link(self._network, rank, self._answers) for rank in ranks]
        joined = dict(self._collect(ranks, Join))
        for rank, join in joined.items():
            on_same_machine = sum(other.machine == join.machine for other in joined.values())
            num_lanes = join.threads or max(1, join.num_cores // on_same_machine)
            self._links[rank - 1].ask(Configure(self._experiment_config.to_dict(), num_lanes))
            say(f"server: worker {rank} joined, training {num_lanes} client(s) side by side")
        for rank, ready in self._collect(ranks, Ready):
            if ready.fingerprint != self._clients.fingerprint:
                raise ValueError(
                    f"worker {rank} reads other data than the server (fingerprint {ready.fingerprint}, not "
                    f"{self._clients.fingerprint}); give both the same files with --data_root"
                )
        self._handler.num_clients = len(self._clients.train_client_ids) + len(self._clients.unseen_client_ids)

    def main_loop(self) -> None:
        self._experiment(self)

    def shutdown(self) -> None:
        """Let the workers end, and close the network."""
        for link in self._links:
            link.tell(Finish())
        super().shutdown()

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        self._handler.begin(task, parameters)
        (global_parameters,) = self._handler.downlink_package

        def work(ids: Tensor) -> Message:
            return TrainClients(int(task.phase), task.round_number, task.capacity, ids, global_parameters)

        for answer in self._hand_out(task.client_ids, work, ClientsTrained):
            self._handler.load(answer)
        assert self._handler.if_stop, "every client was handed out and reported"
        return self._handler.cohort_update

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        def work(ids: Tensor) -> Message:
            return ScoreClients(int(task.phase), task.round_number, ids, parameters)

        scores = []
        for answer in self._hand_out(task.client_ids, work, ClientsScored):
            rows = zip(answer.counts.tolist(), answer.measures.tolist(), strict=True)
            scores += [ClientScore(*counts, *measures) for counts, measures in rows]
        return scores

    def _hand_out(
        self, client_ids: Sequence[int], work: Callable[[Tensor], Message], kind: type[Answer]
    ) -> list[Answer]:
        """Give each worker its share of the clients, and collect the answers."""
        shares = self._share_out(client_ids)
        for rank, share in shares:
            self._links[rank - 1].ask(work(torch.tensor(share, dtype=torch.int64)))
        return [answer for _, answer in self._collect([rank for rank, _ in shares], kind)]

    def _share_out(self, client_ids: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Each client to the worker with the least to do, the largest clients first (Graham 1969); (rank, ids)."""
        shares: list[list[int]] = [[] for _ in self._links]
        loads = [0] * len(self._links)
        for client_id in sorted(client_ids, key=lambda client_id: -self._clients.num_train_examples(client_id)):
            least = loads.index(min(loads))
            shares[least].append(client_id)
            loads[least] += self._clients.num_train_examples(client_id)
        return [(rank, share) for rank, share in enumerate(shares, start=1) if share]

    def _collect(self, ranks: Sequence[int], kind: type[Answer]) -> list[tuple[int, Answer]]:
        """One answer from each of the ranks, as they come. Raises where a worker failed, is gone, or says another."""
        answers = []
        for _ in ranks:
            rank, answer = self._answers.get()
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, Failed):
                raise ValueError(f"worker {rank}: {answer.reason}")
            if not isinstance(answer, kind):
                raise ValueError(f"worker {rank} sent {type(answer).__name__} where {kind.__name__} was expected")
            answers.append((rank, answer))
        return answers


class _Link:
    """The conversation with one worker, in a thread of its own, so that no worker waits for another's transfer.

    A link begins by receiving the worker's Join; from then on each `ask` gets one answer.
    """

    def __init__(
        self, network: TypedNetwork, rank: int, answers: queue.SimpleQueue[tuple[int, Message | Exception]]
    ) -> None:
        self._network = network
        self._rank = rank
        self._answers = answers
        self._outgoing: queue.SimpleQueue[tuple[Message, bool]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._talk, name=f"worker {rank}", daemon=True)
        self._thread.start()

    def ask(self, message: Message) -> None:
        """Send, and put the answer (or what went wrong) into the queue of answers."""
        self._outgoing.put((message, True))

    def tell(self, last_message: Message) -> None:
        """Send a message that has no answer, and end the conversation."""
        self._outgoing.put((last_message, False))
        self._thread.join()

    def _talk(self) -> None:
        try:
            self._answers.put((self._rank, self._network.receive_message(self._rank)))
            while True:
                message, expects_answer = self._outgoing.get()
                self._network.send_message(message, self._rank)
                if not expects_answer:
                    return
                self._answers.put((self._rank, self._network.receive_message(self._rank)))
        except Exception as error:  # whatever it is, the experiment's thread must hear of it
            self._answers.put((self._rank, error))
