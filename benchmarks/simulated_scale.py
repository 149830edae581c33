"""A round of many workers and clients, simulated: the server's own schedule, on a clock that the simulation moves.

python benchmarks/simulated_scale.py [--clients N] [--workers N ...] [--parameters N] [--gigabits X ...] [--fan_in N]

`multi_process/work_item.py` hands out clients of unequal sizes to workers that are told apart by nothing but when they
answer. What it does not have here has a cost: a client takes a worker its examples' time; bytes take the sender's and
the receiver's line their time, one message after the other; and the server, as one core, takes its time for a client,
for each byte, and for the round. The costs are those that docs/performance.md has measured (`benchmarks/scale.py`, and
`benchmarks/round.py` for a client), and can be given anew. With --fan_in, so many workers at most are served by a node:
the server, or a node in between, which passes the model on and merges sums, as exact sums can be merged in any order.

Prints a Markdown table: seconds of a round; the ideal, in which the workers do nothing but train and share the work
evenly; the share of the round in which the server's core and its line are busy; and the processor time that the
schedule itself took, which is measured here and not simulated.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from figures import figure  # noqa: E402

from multi_process import work_item  # noqa: E402
from multi_process.messages import (  # noqa: E402
    AssignGroups,
    GroupTrained,
    Message,
    PartialSum,
    RequestPartialSum,
    StartTraining,
)
from multi_process.pace import Pace  # noqa: E402
from multi_process.work_item import Worker, WorkItem  # noqa: E402
from perfedavg.engine.tasks import ClientReport  # noqa: E402

MODEL_BYTES, SUM_BYTES = 4, 8
"""Of a parameter, as it goes to a worker and comes back."""
MEAN_EXAMPLES, SPREAD = 200, 0.5
"""Of a client's training part, log-normal."""
LATENCY_SECONDS = 0.0002


@dataclass(frozen=True)
class Costs:
    """Measured. client_s: what a client of the mean size takes a worker.

    server_s_per_client, server_s_per_mb, server_s_per_mparam: of the server's core, for a client of a round, for each
    megabyte that it sends or receives, and for the round, a million parameters.
    """

    client_s: float = 0.57
    server_s_per_client: float = 0.0005
    server_s_per_mb: float = 0.0007
    server_s_per_mparam: float = 0.036


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Resource:
    """A core, or one direction of a line: does one thing after the other. busy_s: for how long it has done anything."""

    def __init__(self) -> None:
        self.free_at = self.busy_s = 0.0

    def use(self, at: float, seconds: float) -> float:
        """Returns when something is done that takes so many seconds and could begin then."""
        self.free_at = max(self.free_at, at) + seconds
        self.busy_s += seconds
        return self.free_at


@dataclass(eq=False)
class Node:
    """Who passes on models and merges sums: the server, or a node between it and its workers.

    num_children: workers or nodes that it serves.  sums: those of them that are there, until all are.
    """

    parent: Node | None = None
    core: Resource = field(default_factory=Resource)
    line_out: Resource = field(default_factory=Resource)
    line_in: Resource = field(default_factory=Resource)
    has_model_at: float | None = None
    num_children: int = 0
    sums: list[tuple[float, Callable[[float], None]]] = field(default_factory=list)


class Simulation:
    """One round. gigabits: a second, of every line, in each direction.  fan_in: None for a server that serves all."""

    def __init__(
        self, num_workers: int, num_clients: int, num_parameters: int, gigabits: float, fan_in: int | None, costs: Costs
    ) -> None:
        self.clock = Clock()
        self.costs = costs
        self._bytes_per_second = gigabits * 1e9 / 8
        self._model_bytes, self._sum_bytes = MODEL_BYTES * num_parameters, SUM_BYTES * num_parameters
        self._num_parameters = num_parameters
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        generator = np.random.default_rng(0)
        sizes = generator.lognormal(math.log(MEAN_EXAMPLES) - SPREAD**2 / 2, SPREAD, num_clients).clip(1)
        self.sizes = sorted((int(size) for size in sizes), reverse=True)
        self.server = Node()
        self.workers = [
            SimulatedWorker(self, rank, node) for rank, node in enumerate(self._nodes(num_workers, fan_in), 1)
        ]
        self.schedule_s = 0.0

    def _nodes(self, num_workers: int, fan_in: int | None) -> list[Node]:
        """For each worker, the node that serves it. Nodes are added, level by level, until none serves too many."""

        def above(num_children: int, parent_of: Callable[[int], Node]) -> list[Node]:
            nodes = [parent_of(number) for number in range(num_children)]
            for node in nodes:
                node.num_children += 1
            return nodes

        if fan_in is None or num_workers <= fan_in:
            return above(num_workers, lambda number: self.server)
        num_between = -(-num_workers // fan_in)
        between = [Node(parent) for parent in self._nodes(num_between, fan_in)]
        return above(num_workers, lambda number: between[number % num_between])

    def run(self) -> float:
        """Returns the seconds of the round."""
        item = self._item()
        started = self.costs.server_s_per_mparam * self._num_parameters / 1e6
        self.server.has_model_at = self.server.core.use(0.0, started)
        self.clock.now = started
        self._hand_out(item)
        while not item.schedule.is_complete:
            at, _, act = heapq.heappop(self._events)
            self.clock.now = max(self.clock.now, at)
            act()
            self._hand_out(item)
        return self.clock.now

    def _item(self) -> WorkItem:
        start = StartTraining(1, 1, 1, torch.empty(0))
        groups: dict[int, tuple[int, ...]] = {client_id: (client_id,) for client_id in range(len(self.sizes))}
        pace = Pace()
        pace.seconds_per_example = {  # as after an earlier round
            worker.worker.number: self.costs.client_s / MEAN_EXAMPLES for worker in self.workers
        }
        states = cast(Any, NoStates())
        self.item = WorkItem(start, groups, self.sizes.__getitem__, states, lambda *_: None, pace, Pace(), {})
        return self.item

    def _hand_out(self, item: WorkItem) -> None:
        began = time.process_time()
        item.hand_out([worker.worker for worker in self.workers])
        self.schedule_s += time.process_time() - began

    def at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def answer(self, worker: SimulatedWorker, when: float, message: Message, server_s: float) -> None:
        """What a worker says is taken by the server's core when that is free."""
        done = self.server.core.use(when, server_s)
        self.at(done, lambda: self.item.take_answer(worker.worker, message))

    def transfer(self, num_bytes: int, at: float, sender: Resource, receiver: Resource) -> float:
        """Returns when all has arrived."""
        seconds = num_bytes / self._bytes_per_second
        sent = sender.use(at, seconds)
        return max(sent, receiver.use(sent - seconds, seconds)) + LATENCY_SECONDS

    def cpu(self, num_bytes: int) -> float:
        return self.costs.server_s_per_mb * num_bytes / 1e6

    def model_at(self, node: Node) -> float:
        """When a node has the model, which it gets once."""
        if node.has_model_at is None:
            assert node.parent is not None, "the server has the model"
            node.has_model_at = self.deliver_model(node.parent, node.line_in)
        return node.has_model_at

    def deliver_model(self, node: Node, receiver: Resource) -> float:
        ready = node.core.use(max(self.model_at(node), self.clock.now), self.cpu(self._model_bytes))
        return self.transfer(self._model_bytes, ready, node.line_out, receiver)

    def deliver_sum(self, node: Node, at: float, sender: Resource, arrived: Callable[[float], None]) -> None:
        """Bring a sum to a node, which passes one on to its parent when all that it waits for are there."""
        came = self.transfer(self._sum_bytes, at, sender, node.line_in)
        merged = node.core.use(came, self.cpu(self._sum_bytes))
        if node.parent is None:
            arrived(merged)
            return
        node.sums.append((merged, arrived))
        if len(node.sums) == node.num_children:
            last = max(when for when, _ in node.sums)

            def arrived_above(when: float) -> None:
                for _, told in node.sums:
                    told(when)

            self.at(last, lambda: self.deliver_sum(cast(Node, node.parent), last, node.line_out, arrived_above))


class SimulatedWorker:
    """A worker with one slot, and the server's end of its link."""

    def __init__(self, simulation: Simulation, rank: int, node: Node) -> None:
        self._simulation = simulation
        self._node = node
        self._line_in, self._line_out, self._slot = Resource(), Resource(), Resource()
        self._done: list[int] = []
        connected = cast(Any, SimulatedConnection(self, rank))
        self.worker = Worker(connected, cast(Any, None), num_slots=1, is_ready=True)

    def send(self, message: Message) -> None:
        simulation = self._simulation
        match message:
            case StartTraining():
                self._slot.free_at = simulation.deliver_model(self._node, self._line_in)
            case AssignGroups():
                for (client_id,) in message.groups:
                    seconds = simulation.costs.client_s * simulation.sizes[client_id] / MEAN_EXAMPLES
                    done = self._slot.use(simulation.clock.now + LATENCY_SECONDS, seconds) + LATENCY_SECONDS
                    self._done.append(client_id)
                    self._say_at(done, GroupTrained(client_id), simulation.costs.server_s_per_client)
            case RequestPartialSum():
                reports = [ClientReport(client_id, simulation.sizes[client_id], 0.0, 0.0) for client_id in self._done]
                message = PartialSum(1, 1, reports, torch.empty(0, dtype=torch.int64))
                self._done = []
                asked = simulation.clock.now + LATENCY_SECONDS
                simulation.deliver_sum(self._node, asked, self._line_out, lambda when: self._say_at(when, message, 0.0))

    def _say_at(self, when: float, message: Message, server_s: float) -> None:
        self._simulation.at(when, lambda: self._simulation.answer(self, when, message, server_s))


@dataclass(frozen=True)
class SimulatedConnection:
    peer: SimulatedWorker
    rank: int

    @property
    def generation(self) -> int:
        return self.rank


class NoStates:
    def get(self, client_id: int) -> dict[str, torch.Tensor]:
        return {}


def main() -> None:
    args = parse_args()
    costs = Costs(args.client_s, args.server_s_per_client, args.server_s_per_mb, args.server_s_per_mparam)
    print("| workers | line | tree | seconds a round | ideal | server's core busy | its line busy | schedule |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|")
    summary = []
    for gigabits, num_workers, fan_in in itertools.product(args.gigabits, args.workers, (None, args.fan_in)):
        if fan_in is not None and num_workers <= fan_in:
            continue
        simulation = Simulation(num_workers, args.clients, args.parameters, gigabits, fan_in, costs)
        vars(work_item)["time"] = simulation.clock
        seconds = simulation.run()
        ideal = costs.client_s * sum(simulation.sizes) / MEAN_EXAMPLES / num_workers
        line = max(simulation.server.line_in.busy_s, simulation.server.line_out.busy_s) / seconds
        core, schedule_s = simulation.server.core.busy_s / seconds, simulation.schedule_s
        tree = "none" if fan_in is None else f"fan-in {fan_in}"
        print(
            f"| {num_workers:,} | {gigabits:g} Gbit/s | {tree} | {figure(seconds)} | {figure(ideal)} | {core:.0%} | "
            f"{line:.0%} | {figure(schedule_s)} s |",
            flush=True,
        )
        row = {"workers": num_workers, "gigabits": gigabits, "fan_in": fan_in, "seconds": seconds, "ideal_s": ideal}
        summary.append({**row, "core": core, "line": line, "schedule_s": schedule_s})
    settings = {"clients": args.clients, "parameters": args.parameters, "costs": vars(costs)}
    print(json.dumps({"benchmark": "simulated_scale", **settings, "rows": summary}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000, help="clients of a round (default: 1000)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 30, 100, 300, 1000], help="one slot each")
    parser.add_argument("--parameters", type=int, default=3_300_000, help="default: those of the EMNIST network")
    parser.add_argument("--gigabits", type=float, nargs="+", default=[1.0, 10.0], help="a second (default: 1 and 10)")
    parser.add_argument("--fan_in", type=int, default=10, help="of the tree (default: 10)")
    for name, value in vars(Costs()).items():
        parser.add_argument(f"--{name}", type=float, default=value, help=f"see Costs (default: {value:g})")
    args = parser.parse_args()
    if min(args.clients, args.parameters, args.fan_in - 1, *args.workers) < 1 or min(args.gigabits) <= 0:
        parser.error("numbers must be 1 or more, --fan_in 2 or more, and lines have some speed")
    if max(args.workers) > args.clients:
        parser.error(f"--workers {max(args.workers)} are more than the clients of a round, which no run may have")
    return args


if __name__ == "__main__":
    main()
