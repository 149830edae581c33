"""From the name of a data set to its clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets.clients.partition import Partition
from datasets.clients.partitioned import PartitionedClients
from datasets.clients.raw import RawClients
from datasets.clients.split import SplitDataset
from datasets.clients.stored import StoredClients
from datasets.sources.digits import load_digits_images
from datasets.sources.image_folder import load_image_folder
from datasets.sources.leaf import load_femnist, load_shakespeare
from datasets.sources.mnist_family import SOURCES, load_images
from datasets.sources.own import load_own
from datasets.sources.sine import SineTasks
from datasets.sources.synthetic_writers import SyntheticWriters
from perfedavg.contracts import FederatedDataset

NATURAL: dict[str, Callable[[Path], StoredClients]] = {
    "femnist": load_femnist,
    "shakespeare": load_shakespeare,
    "folder": load_image_folder,
}
"""Data sets whose examples come with their owners."""

MOST_DEALT_CLIENTS = 10_000_000
"""To whom examples are dealt out; the indices of more would fill the memory, and each would be left out as empty."""


@dataclass(frozen=True)
class DatasetRequest:
    """Which data, dealt out how.

    name: a data set's, or `package.module:factory` for a user's own.
    num_clients: training and unseen clients together, or None for all that natural clients are.
    num_unseen: from the number of clients to the number of those that never train.
    partition: see `Partition.parse`; None for data with natural clients.
    local_split: see `SplitDataset`.
    """

    name: str
    num_clients: int | None
    num_unseen: Callable[[int], int]
    partition: str | None
    seed: int
    local_split: str = "shuffled"


def load_federated_dataset(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    """Raises ValueError where the data cannot be had, is damaged, or has too little for so many clients."""
    if ":" in request.name:
        _refuse_local_split(request, "it cuts its clients' data itself")
        _refuse_partition(request)
        return load_own(request.name, data_root, request.num_clients, request.seed)
    if request.name == "sine":
        _refuse_local_split(request, "its targets are no classes")
        return _load_sine(request)
    clients = _load_clients(request, data_root)
    num_clients = clients.num_clients if request.num_clients is None else request.num_clients
    if num_clients > clients.num_clients:
        raise ValueError(
            f"--client_num_in_total {num_clients} exceeds the {clients.num_clients} clients of {request.name}; "
            f"lower it to {clients.num_clients} or less"
        )
    num_unseen = request.num_unseen(num_clients)
    num_train = num_clients - num_unseen
    if clients.train_counts is not None:
        _refuse_local_split(request, "its files hold LEAF's own split of each client's examples")
    if clients.overlap:
        _refuse_local_split(request, "its examples overlap and stay in order")
    return SplitDataset(request.name, clients, num_train, num_unseen, request.seed, request.local_split)


def _load_clients(request: DatasetRequest, data_root: Path) -> RawClients:
    if request.name in NATURAL:
        _refuse_partition(request)
        return NATURAL[request.name](data_root)
    num_clients = _asked_for(request)
    if request.name == "synthetic_writers":
        _refuse_partition(request)
        return SyntheticWriters(num_clients, request.seed)
    if num_clients > MOST_DEALT_CLIENTS:
        raise ValueError(
            f"--client_num_in_total {num_clients} is more than the {MOST_DEALT_CLIENTS} clients to whom {request.name} "
            "can be dealt out; lower it"
        )
    partition = Partition.parse(request.partition or "shards")
    num_unseen = request.num_unseen(num_clients)
    if request.name == "digits":
        splits = load_digits_images()
    elif request.name in SOURCES:
        splits = load_images(request.name, data_root)
    else:
        names = ", ".join((*SOURCES, "digits", "synthetic_writers", *NATURAL, "sine"))
        raise ValueError(f"--dataset {request.name} is unknown; use one of {names}, or package.module:factory")
    return PartitionedClients(splits, partition, num_clients - num_unseen, num_unseen, request.seed)


def _load_sine(request: DatasetRequest) -> SineTasks:
    _refuse_partition(request)
    num_clients = _asked_for(request)
    num_unseen = request.num_unseen(num_clients)
    return SineTasks(num_clients - num_unseen, num_unseen, request.seed)


def _asked_for(request: DatasetRequest) -> int:
    """The number of clients of data that may be dealt out to any."""
    if request.num_clients is None:
        raise ValueError(f"--client_num_in_total is needed for {request.name}, which has no natural clients")
    return request.num_clients


def _refuse_local_split(request: DatasetRequest, reason: str) -> None:
    if request.local_split != "shuffled":
        raise ValueError(
            f"--local_split {request.local_split} has no meaning for {request.name}: {reason}; leave it out"
        )


def _refuse_partition(request: DatasetRequest) -> None:
    if request.partition is not None:
        raise ValueError(f"--partition {request.partition} has no meaning for {request.name}: its clients are its own")
