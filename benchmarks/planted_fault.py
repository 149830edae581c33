"""Run an entry point with a fault planted: at an exact point the process gets a signal from itself.

python benchmarks/planted_fault.py POINT PHASE ROUND SIGNAL NOTE server.py|client_worker.py|... [flags]

POINT: see POINTS.  PHASE: fedavg or fine_tune, and ROUND a round of it, in which the point is to be reached, or in the
first one after it that has the point (ignored by points before the first round).  SIGNAL: such as SIGKILL.  NOTE: file
that gets the time just before the signal.
Of the server's points, single_process.py reaches those of stepping, saving and keeping. quick_start.py and cluster.py
reach none themselves, but what they fork does: the first process to reach the point. planted_fault.py may be the entry
point too, with another fault.
The code that runs is the project's own; only the functions at the point are wrapped.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from perfedavg.settings import Phase  # noqa: E402
from perfedavg.terminal.entry_point import prepare_process  # noqa: E402


@dataclass
class Fault:
    """What is to happen, once. doing: the phase and round that the process is in; the wrapped functions keep it."""

    phase: Phase
    round_number: int
    signal: signal.Signals
    note: Path
    doing: tuple[Phase, int] | None = None

    @property
    def is_due(self) -> bool:
        return self.doing is not None and self.doing >= (self.phase, self.round_number)

    def strike_if_due(self) -> None:
        if self.is_due:
            self.strike()

    def strike(self) -> None:
        try:
            with open(self.note, "x") as note:
                note.write(str(time.time()))
        except FileExistsError:  # it has happened, here or in another process
            return
        os.kill(os.getpid(), self.signal)


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Let a function of a class or module do something before its own work, with the same arguments."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def follow_worker(fault: Fault) -> None:
    """Keep the context in a worker."""
    from multi_process.worker import PersonalizationTrainer

    def begin(trainer: object, payload: Any) -> None:
        fault.doing = Phase(payload.phase), payload.round_number

    before(PersonalizationTrainer, "begin", begin)


def follow_server(fault: Fault) -> None:
    """Keep the context in the server, or in the single process."""
    from multi_process.server import WorkerPool
    from perfedavg.engine.executor import LocalExecutor

    def begin(executor: object, task: Any, parameters: object) -> None:
        fault.doing = task.phase, task.round_number

    for executor in (WorkerPool, LocalExecutor):
        before(executor, "train", begin)
        before(executor, "score", begin)


def worker_joining(fault: Fault) -> None:
    """Admitted, but its process group is not formed yet."""
    from multi_process.transport.peer import Peer

    before(Peer, "connect", lambda *args: fault.strike())


def worker_loading(fault: Fault) -> None:
    """Joined, and about to read its data."""
    import utils

    before(utils, "get_datasets", lambda *args: fault.strike())


def worker_idle(fault: Fault) -> None:
    """Between two rounds: it has delivered the last one, and does not know of the next."""
    from multi_process.worker import PersonalizationTrainer

    follow_worker(fault)

    def begin(trainer: object, payload: Any) -> None:
        if fault.doing == (fault.phase, fault.round_number - 1):
            fault.strike()

    before(PersonalizationTrainer, "begin", begin)


def worker_training(fault: Fault) -> None:
    """With a client on its training slot."""
    from perfedavg.training.client_models import ClientModels

    follow_worker(fault)
    before(ClientModels, "train", lambda *args, **kwargs: fault.strike_if_due())


def worker_sending(fault: Fault) -> None:
    """In the middle of sending the round's sum: announced, header sent, the rest not.

    A process that stops itself goes on for a moment, so what it sends meanwhile must be what it would send anyway.
    """
    from multi_process.fedlab_adapter import MessageCode
    from multi_process.transport.process_group import GroupConnection
    from multi_process.transport.stream import StreamConnection
    from multi_process.transport.tensors import ConnectionInParts

    follow_worker(fault)
    is_sum = False

    def begin(pair: Any, package: Any) -> None:
        nonlocal is_sum
        is_sum = package.header[3] == MessageCode.GradientUpdate.value

    def strike(pair: Any, part: Any, is_content: bool = False) -> None:
        if is_sum and part.dtype is torch.int64:  # the slices, which follow the header
            fault.strike_if_due()

    before(ConnectionInParts, "send", begin)
    for connection in (GroupConnection, StreamConnection):
        before(connection, "_send", strike)


def worker_scoring(fault: Fault) -> None:
    """Personalizing an unseen client."""
    from perfedavg.engine.local_work import ClientScoring

    follow_worker(fault)
    before(ClientScoring, "_score", lambda *args: fault.strike_if_due())


def server_joining(fault: Fault) -> None:
    """Between two workers' joining."""
    from multi_process.server import WorkerPool

    before(WorkerPool, "_take_join", lambda *args: fault.strike())


def server_waiting(fault: Fault) -> None:
    """While its workers train: a client of the round has been reported, others have not."""
    from multi_process.messages import GroupTrained
    from multi_process.work_item import WorkItem

    follow_server(fault)

    def strike(item: object, worker: object, message: object) -> None:
        if isinstance(message, GroupTrained):
            fault.strike_if_due()

    before(WorkItem, "take_answer", strike)


def server_stepping(fault: Fault) -> None:
    """The round's mean update is known, the step is not taken."""
    from perfedavg.training.optimizers import ServerOptimizer

    follow_server(fault)
    before(ServerOptimizer, "step", lambda *args: fault.strike_if_due())


def server_scoring(fault: Fault) -> None:
    """While its workers score unseen clients."""
    from multi_process.messages import GroupScored
    from multi_process.work_item import WorkItem

    follow_server(fault)

    def strike(item: object, worker: object, message: object) -> None:
        if isinstance(message, GroupScored):
            fault.strike_if_due()

    before(WorkItem, "take_answer", strike)


def server_saving(fault: Fault) -> None:
    """A checkpoint is written, but not under its own name yet."""
    _server_writing(fault, "checkpoint")


def server_keeping(fault: Fault) -> None:
    """What a client keeps is written, but not under its own name yet."""
    _server_writing(fault, "client_states")


def _server_writing(fault: Fault, folder: str) -> None:
    follow_server(fault)

    def strike(partial: Path, path: Path) -> None:
        if path.parent.name == folder:
            fault.strike_if_due()

    before(os, "replace", strike)


POINTS: dict[str, Callable[[Fault], None]] = {
    "worker joining": worker_joining,
    "worker loading": worker_loading,
    "worker idle": worker_idle,
    "worker training": worker_training,
    "worker sending": worker_sending,
    "worker scoring": worker_scoring,
    "server joining": server_joining,
    "server waiting": server_waiting,
    "server stepping": server_stepping,
    "server scoring": server_scoring,
    "server saving": server_saving,
    "server keeping": server_keeping,
}


def main() -> None:
    prepare_process()
    point, phase, round_number, number, note, entry_point, *flags = sys.argv[1:]
    POINTS[point](Fault(Phase.of_field(phase), int(round_number), signal.Signals[number], Path(note)))
    sys.argv = [entry_point, *flags]
    runpy.run_path(str(ROOT / entry_point), run_name="__main__")


if __name__ == "__main__":
    main()
