"""A FedAvg round in Flower's simulation: its FedAvg strategy, its Ray backend with WORKERS actors of one core.

python benchmarks/rivals/flower_simulation.py WORKLOAD.npz ROUNDS WORKERS       (started by benchmarks/round.py)

Bytes are those of the arrays in the messages to and from the clients; Ray hands them over in shared memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict  # type: ignore[import-not-found]
from flwr.clientapp import ClientApp  # type: ignore[import-not-found]
from flwr.serverapp import Grid, ServerApp  # type: ignore[import-not-found]
from flwr.serverapp.strategy import FedAvg  # type: ignore[import-not-found]
from flwr.simulation import run_simulation  # type: ignore[import-not-found]
from rival import Clock, read_workload, report, train


class TimedFedAvg(FedAvg):
    """Flower's FedAvg of all clients, with a clock, and a count of the arrays' bytes."""

    def __init__(self, num_clients: int) -> None:
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=num_clients, min_available_nodes=num_clients
        )
        self.clock = Clock()
        self.num_bytes = 0

    def configure_train(self, *args: Any) -> Iterable[Message]:
        self.clock.start_round()
        return self._counted(super().configure_train(*args))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        result = super().aggregate_train(server_round, self._counted(replies))
        self.clock.end_round()
        return result

    def _counted(self, messages: Iterable[Message]) -> list[Message]:
        messages = list(messages)
        for message in messages:
            if message.has_error():
                raise ValueError(f"a client failed: {message.error.reason}")
            self.num_bytes += sum(len(array.data) for array in message.content["arrays"].values())
        return messages


def train_client(path: str, message: Message, context: Context) -> Message:
    workload = read_workload(path)
    model = workload.new_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    train(model, workload.client_loader(client), workload)
    metrics = MetricRecord({"num-examples": len(workload.labels[client])})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


def main() -> None:
    path, num_rounds, num_workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    workload = read_workload(path)
    strategy = TimedFedAvg(workload.num_clients)
    client_app, server_app = ClientApp(), ServerApp()
    final = workload.new_model()

    def serve(grid: Grid, context: Context) -> None:
        initial = ArrayRecord(workload.new_model().state_dict())
        result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=num_rounds)
        final.load_state_dict(result.arrays.to_torch_state_dict())

    client_app.train()(lambda message, context: train_client(path, message, context))
    server_app.main()(serve)
    run_simulation(
        server_app,
        client_app,
        num_supernodes=workload.num_clients,
        backend_config={
            "init_args": {"num_cpus": num_workers, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    note = "the arrays in its messages, handed over in shared memory"
    report(strategy.clock, final, workload, strategy.num_bytes / num_rounds, note)


if __name__ == "__main__":
    main()
