"""What each entry point of a run can be told: the experiment, and how it is run, which does not change its result.

The bases of an entry point's class stand in reverse: the fields of the last one come first in --help.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from datasets.registry import DATA_SETS
from launch import paths
from perfedavg.fields import MISSING, check, part, setting
from perfedavg.own_files import dataset_name
from perfedavg.settings import UNREAD, ClientsConfig, Compute, ExperimentConfig

BACKENDS = ("auto", "gloo", "tcp", "nccl")
_DATA_SETS = ", ".join(DATA_SETS)
LONGEST_WAIT = 2_000_000
"""Seconds. Sockets count milliseconds in 32 bits, which is 24 days."""
NAMED_BY_DATASET = Path()
"""A plot's file whose name follows from the data set."""
LAUNCHER_RANK, LAUNCHER_SIZE = "RANK", "WORLD_SIZE"
LAUNCHER_ADDRESS, LAUNCHER_PORT = "MASTER_ADDR", "MASTER_PORT"
"""Variables by which torchrun, Kubernetes' operators and other launchers tell processes of each other."""


def _seconds(default: int, help: str) -> Any:
    return setting(default, f"{help}, seconds", at_least=1, at_most=LONGEST_WAIT)


@dataclass(frozen=True, kw_only=True)
class Checked:
    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Experiment(Checked):
    heading = "experiment"
    experiment: ExperimentConfig = part(ExperimentConfig, defaults={"dataset": "emnist"}, of=_DATA_SETS)
    initial_model: Path | None = setting(
        None,
        "start from the model of this finished run; with --rounds 0 only phase 2 is run",
        parse=paths.path,
        metavar="RUN",
        absent="random weights",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_model is not None and self.experiment.initial_model is None:
            object.__setattr__(self, "experiment", replace(self.experiment, initial_model=UNREAD))


@dataclass(frozen=True, kw_only=True)
class RunFolderSettings:
    heading = "output"
    run_dir: Path | None = setting(
        None, "new folder of this run", parse=paths.path, metavar="FOLDER", absent="runs/<date-time>-<dataset>"
    )
    resume: Path | None = setting(
        None,
        "go on with the run in this folder, whose flags need not be repeated",
        parse=paths.path,
        metavar="RUN",
        absent="start a new run",
    )
    checkpoint_every: int = setting(10, "rounds between two checkpoints", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Data:
    heading = "data"
    data_root: Path = setting(
        paths.DEFAULT_DATA_ROOT,
        "folder of the data sets, into which missing ones are downloaded",
        parse=paths.folder,
        metavar="FOLDER",
        environment="PERFEDAVG_DATA",
        absent="datasets/data",
    )


@dataclass(frozen=True, kw_only=True)
class Connection:
    heading = "network"
    port: int = setting(
        3002, "the server's TCP port", at_least=1, at_most=65535, metavar="PORT", environment=LAUNCHER_PORT
    )
    ethernet: str | None = setting(None, "network interface for tensors", absent="the one between server and worker")
    backend: str = setting(
        "auto",
        "what carries tensors: gloo, on ports of its own; tcp, over --port; nccl, between GPUs. auto is gloo where the "
        "two sides reach each other by it, and else tcp; a worker's auto is the server's",
        choices=BACKENDS,
    )
    token_file: Path | None = setting(
        None, "file with the secret of server and workers", parse=paths.file, metavar="FILE", absent="PERFEDAVG_TOKEN"
    )
    keys: Path | None = setting(
        None,
        "folder of keys, which make_keys.py makes: everything is encrypted",
        parse=paths.path,
        metavar="FOLDER",
        absent="plain text",
    )

    @property
    def needs_more_ports(self) -> bool:
        """Whether gloo's own ports have to be open too."""
        return self.backend in ("gloo", "nccl")


@dataclass(frozen=True, kw_only=True)
class Network(Connection):
    heading = "network"
    ip: str = setting("127.0.0.1", "the server's address: host name or IPv4", environment=LAUNCHER_ADDRESS)


@dataclass(frozen=True, kw_only=True)
class JoinTimeout:
    heading = "joining"
    join_timeout_seconds: int = _seconds(600, "how long to wait for them to join")


@dataclass(frozen=True, kw_only=True)
class ServerJoining(JoinTimeout):
    heading = "joining"
    world_size: int = setting(
        3, "processes to start with: the server and its workers", at_least=1, environment=LAUNCHER_SIZE
    )


@dataclass(frozen=True, kw_only=True)
class Faults:
    heading = "faults"
    worker_timeout_seconds: int = _seconds(30, "silence after which a worker is declared dead")
    worker_wait_seconds: int = _seconds(300, "how long to go on without any worker, before the run is saved and ends")


@dataclass(frozen=True, kw_only=True)
class WorkerJoining:
    heading = "joining"
    rank: int = setting(MISSING, "this worker's own number, 1 or more", at_least=0, environment=LAUNCHER_RANK)
    world_size: int | None = setting(
        None, "checked against the server's", at_least=0, absent="not checked", environment=LAUNCHER_SIZE
    )
    join_timeout_seconds: int = _seconds(20, "how long to try to reach the server")
    server_wait_seconds: int = _seconds(300, "how long to wait for a server that was lost to come back")


@dataclass(frozen=True, kw_only=True)
class LocalLaunch:
    heading = "processes on this machine"
    workers: int = setting(2, "worker processes to start", at_least=1)
    port: int | None = setting(
        None, "TCP port of the server", at_least=1, at_most=65535, metavar="PORT", absent="a free one"
    )
    backend: str = setting("auto", "what carries tensors", choices=BACKENDS)


@dataclass(frozen=True, kw_only=True)
class Hosts:
    heading = "hosts"
    hosts: Path | None = setting(
        None,
        "file with the hosts of the workers, one a line, as ssh takes them: node1 slots=2 device=cuda:0",
        parse=paths.file,
        metavar="FILE",
        absent="none, for --check of this machine alone",
    )
    check: bool = setting(False, "only say what will work and what will not, and how to mend it")
    ip: str | None = setting(
        None, "this machine's address, as the hosts reach it", absent="the one from which the hosts see ssh come"
    )


@dataclass(frozen=True, kw_only=True)
class Server(Faults, ServerJoining, Network, Data, RunFolderSettings, Experiment):
    """Start the FedLab parameter server (rank 0).

    It waits for --world_size - 1 workers, sends them the configuration, and runs the experiment with them.
    """

    script: ClassVar[str] = "server.py"


@dataclass(frozen=True, kw_only=True)
class Worker(WorkerJoining, Network, Compute, Data, Checked):
    """Start a worker. It gets the experiment's configuration from the server."""

    script: ClassVar[str] = "client_worker.py"


@dataclass(frozen=True, kw_only=True)
class ServerOrWorker(Faults, ServerJoining, Network, Compute, Data, RunFolderSettings, Experiment):
    """Be the server where RANK is 0 in the environment, and otherwise the worker of that rank.

    For torchrun and other launchers, which start the same script with the same flags for every rank.
    """

    script: ClassVar[str] = "server_or_worker.py"


@dataclass(frozen=True, kw_only=True)
class SingleProcess(Compute, Data, RunFolderSettings, Experiment):
    """Run the experiment in this process, without a network. The model is the same as with workers."""

    script: ClassVar[str] = "single_process.py"


@dataclass(frozen=True, kw_only=True)
class QuickStart(LocalLaunch, Faults, Compute, Data, RunFolderSettings, Experiment):
    """Start a server and workers on this machine, and show the result."""

    program: ClassVar[str] = "sh quick_start.sh"
    script: ClassVar[str] = "quick_start.py"
    experiment: ExperimentConfig = part(ExperimentConfig, defaults={"dataset": "digits"}, of=_DATA_SETS)


@dataclass(frozen=True, kw_only=True)
class Cluster(Faults, JoinTimeout, Connection, Compute, Hosts, Data, RunFolderSettings, Experiment):
    """Start a server on this machine and workers on hosts that ssh reaches, and show the result."""

    script: ClassVar[str] = "cluster.py"


@dataclass(frozen=True, kw_only=True)
class Describe(Data, ClientsConfig, Checked):
    """Describe a data set as it is dealt out to clients."""

    program: ClassVar[str] = "python -m datasets.describe"
    heading = "clients"
    dataset: str = setting(
        "digits",
        f"{_DATA_SETS}; of your own: a folder of images or a .csv, .parquet or .npz file by its path, or "
        "package.module:factory",
        metavar="NAME",
        parse=dataset_name,
    )
    plot: Path | None = setting(
        None,
        "write the label mix and examples as a PNG, to NAME.png unless a file is named",
        parse=lambda text: paths.file(text) if text else NAMED_BY_DATASET,
        metavar="FILE",
        implied="",
        absent="no plot",
        title="output",
    )


ENTRY_POINTS: dict[str, type] = {
    "server": Server,
    "worker": Worker,
    "server_or_worker": ServerOrWorker,
    "single": SingleProcess,
    "quick_start": QuickStart,
    "cluster": Cluster,
    "describe": Describe,
}
