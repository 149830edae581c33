"""Every data set is one entry here: how it is read, the models that fit it, its defaults, and what else to know of it.

Entry points read the entries for --help, so heavy modules are imported only when data are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfedavg.fields import unknown
from perfedavg.own_files import ARRAYS, TABLES, UNTOLD, OwnFiles, is_path, shown_dataset

if TYPE_CHECKING:
    from datasets.clients.partitioned import ImageSplits
    from datasets.clients.raw import RawClients
    from datasets.own.rows import Rows
    from perfedavg.contracts import FederatedDataset

MOST_DEALT_CLIENTS = 10_000_000
"""Examples are dealt out to at most so many clients; the indices of more would fill the memory."""


@dataclass(frozen=True)
class DatasetRequest:
    """Which data, dealt out how.

    name: a data set's, the path of a user's own file or folder, or `package.module:factory` for a user's own code.
    num_clients: training and unseen clients together, or None for all that natural clients are.
    num_unseen: from the number of clients to the number of those that never train, which may be 0.
    partition: see `Partition.parse`; None for data with natural clients.
    local_split, local_test_fraction: see `SplitDataset`.
    own_files: how a user's own files are read.
    may_download: whether data that are not there are fetched.
    """

    name: str
    num_clients: int | None
    num_unseen: Callable[[int], int]
    partition: str | None
    seed: int
    local_split: str = "shuffled"
    own_files: OwnFiles = UNTOLD
    local_test_fraction: str = "0.2"
    may_download: bool = True


_CUTS = {name: getattr(DatasetRequest, name) for name in ("local_split", "local_test_fraction")}
"""How a client's examples are cut where nothing else is asked for."""


@dataclass(frozen=True)
class DataSet:
    """What is to be known of a data set before it is read.

    load: reads it for a request, from a folder.
    models: from each value of --model that may fit to a model's name (see `models`); the first is the default. With
        `auto`, the data set brings a model, or one is taken that fits its inputs.
    defaults: of settings, where they are not those of `ExperimentConfig`, by their fields.
    meaningless: from the name of a setting to the reason why only its default goes with this data set.
    own_files: the settings of OwnFiles that it reads; of the others, only the defaults go with it.
    note: what has to be said with every result; empty for nothing.
    loss_name: what the loss is called in tables.
    """

    load: Callable[[DatasetRequest, Path], FederatedDataset]
    models: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    meaningless: Mapping[str, str] = field(default_factory=dict)
    own_files: frozenset[str] = frozenset()
    note: str = ""
    loss_name: str = "loss"


def load_federated_dataset(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    """Raises ValueError where the data cannot be had, is damaged, or has too little for so many clients.

    Of these, MissingDataError where they would have to be downloaded and may not.
    """
    data_set = find(request.name)
    if is_path(request.name):
        find_path(request.name, data_root)
    for setting, default in (("partition", None), *_CUTS.items()):
        if setting in data_set.meaningless and getattr(request, setting) != default:
            raise meaningless(request.name, setting, getattr(request, setting))
    for own in fields(OwnFiles):
        value = getattr(request.own_files, own.name)
        if own.name not in data_set.own_files and value != own.default:
            raise ValueError(
                f"--{own.name} {str(value).lower() if isinstance(value, bool) else value} has no meaning for "
                f"{shown_dataset(request.name)}, which is no {_readers_of(own.name)}; leave it out"
            )
    return data_set.load(request, data_root)


def _readers_of(setting: str) -> str:
    """The kinds of a user's files that a setting is for."""
    return "folder of images" if setting in _IMAGE_SETTINGS else "table or .npz file"


def find(name: str) -> DataSet:
    """The entry of a data set. Raises ValueError where there is none."""
    if is_path(name):
        ending = os.path.splitext(name)[1].lower()
        return USERS_TABLE if ending in TABLES else USERS_ARRAYS if ending in ARRAYS else DATA_SETS["folder"]
    if ":" in name:
        return USERS_OWN
    if name not in DATA_SETS:
        if os.path.isdir(name):
            raise ValueError(f"--dataset {name} is no data set; to read the folder here, name its path, ./{name}")
        raise ValueError(
            f"--dataset {name} {unknown(name, DATA_SETS)}, the path of a folder of images or of a file that ends in "
            f"{', '.join((*TABLES, *ARRAYS))}, or package.module:factory"
        )
    return DATA_SETS[name]


def meaningless(name: str, setting: str, value: object) -> ValueError:
    """What to raise for a setting that a data set gives no meaning."""
    reason = find(name).meaningless[setting]
    return ValueError(f"--{setting} {value} has no meaning for {name}: {reason}; leave it out")


def _load_mnist_family(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.sources.mnist_family import load_images

    return _dealt(request, lambda: load_images(request.name, data_root, request.may_download))


def _load_digits(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.sources.digits import load_digits_images

    num_train, num_unseen = _counts(request)
    return _dealt(request, lambda: load_digits_images(Fraction(num_unseen, num_train + num_unseen)))


def _load_femnist(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.sources.leaf import load_femnist

    return _split(request, load_femnist(data_root))


def _load_shakespeare(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.sources.leaf import load_shakespeare

    return _split(request, load_shakespeare(data_root))


def _load_plays(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.clients.raw import DrawnClients
    from datasets.sources.plays import load_plays

    return _split(request, DrawnClients(load_plays(data_root, request.may_download), request.seed))


def _load_folder(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.own.image_folder import load_image_folder

    folder = find_path(request.name, data_root) if is_path(request.name) else data_root
    return _split(request, load_image_folder(folder, request.own_files))


def _load_table(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.own.tables import read_table

    return _load_rows(request, data_root, read_table)


def _load_arrays(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.own.arrays import read_arrays

    return _load_rows(request, data_root, read_arrays)


def _load_rows(request: DatasetRequest, data_root: Path, read: Callable[[Path, OwnFiles], Rows]) -> FederatedDataset:
    from datasets.clients.raw import DrawnClients
    from datasets.clients.standardized import StandardizedView
    from datasets.own.rows import stored_rows

    file = find_path(request.name, data_root)
    clients = stored_rows(file, request.own_files, read)
    dataset = _split(request, DrawnClients(clients, request.seed))
    return StandardizedView(dataset) if request.own_files.standardize and clients.holds_features else dataset


def find_path(name: str, data_root: Path) -> Path:
    """The file or folder that a data set's name stands for: as it is named or, on another machine, in the data root.

    Raises ValueError where it is in neither place.
    """
    named = Path(name)
    found = next((path for path in (named, data_root / named.name) if path.exists()), None)
    if found is None:
        raise ValueError(
            f"--dataset {name} is not there, nor is {named.name} in --data_root {data_root}; name a file or folder "
            "that is"
        )
    is_folder = find(name) is DATA_SETS["folder"]
    if is_folder and not found.is_dir():
        raise ValueError(
            f"--dataset {found} is neither a folder of images nor a file that ends in {', '.join((*TABLES, *ARRAYS))}; "
            "rename it, or write it as one of these"
        )
    if not is_folder and found.is_dir():
        raise ValueError(f"--dataset {found} is a folder; rename it, or name a file")
    return found


def _load_synthetic_writers(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.sources.synthetic_writers import SyntheticWriters

    return _split(request, SyntheticWriters(sum(_counts(request)), request.seed))


def _load_sine(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.sources.sine import SineTasks

    return SineTasks(*_counts(request), request.seed)


def _load_own(request: DatasetRequest, data_root: Path) -> FederatedDataset:
    from datasets.sources.own import load_own

    return load_own(request.name, data_root, request.num_clients, request.seed)


def _counts(request: DatasetRequest) -> tuple[int, int]:
    """The numbers of training and of unseen clients, for data that may be dealt out to any number."""
    if request.num_clients is None:
        raise ValueError(f"--client_num_in_total is needed for {request.name}, which has no natural clients")
    num_unseen = request.num_unseen(request.num_clients)
    return request.num_clients - num_unseen, num_unseen


def _dealt(request: DatasetRequest, load: Callable[[], ImageSplits]) -> FederatedDataset:
    """Examples without owners, dealt out to clients."""
    from datasets.clients.partition import Partition
    from datasets.clients.partitioned import PartitionedClients

    num_train, num_unseen = _counts(request)
    if num_train + num_unseen > MOST_DEALT_CLIENTS:
        raise ValueError(
            f"--client_num_in_total {request.num_clients} is more than the {MOST_DEALT_CLIENTS} clients to whom "
            f"{request.name} can be dealt out; lower it"
        )
    partition = Partition.parse(request.partition or "shards")
    return _split(request, PartitionedClients(load(), partition, num_train, num_unseen, request.seed))


def _split(request: DatasetRequest, clients: RawClients) -> FederatedDataset:
    """Clients split into training and unseen ones, and the examples of each into two parts."""
    from datasets.clients.split import SplitDataset

    name = shown_dataset(request.name)
    num_clients = clients.num_clients if request.num_clients is None else request.num_clients
    if num_clients > clients.num_clients:
        raise ValueError(
            f"--client_num_in_total {num_clients} exceeds the {clients.num_clients} clients of {name}; "
            f"lower it to {clients.num_clients} or less"
        )
    for setting, default in _CUTS.items():
        if clients.train_counts is not None and getattr(request, setting) != default:
            raise ValueError(
                f"--{setting} {getattr(request, setting)} has no meaning for {name}: its files hold a split of each "
                "client's examples; leave it out"
            )
    if clients.has_targets and request.local_split != DatasetRequest.local_split:
        raise ValueError(
            f"--local_split {request.local_split} has no meaning for {name}: its labels are numbers, and no classes to "
            "sort by; leave it out"
        )
    num_unseen = request.num_unseen(num_clients)
    num_train = num_clients - num_unseen
    note = find(request.name).note
    test_fraction = Fraction(request.local_test_fraction)
    return SplitDataset(name, clients, num_train, num_unseen, request.seed, request.local_split, note, test_fraction)


_OF_IMAGES = {
    name: name for name in ("mlp", "mnist_cnn", "emnist_cnn", "two_conv_cnn", "resnet8", "resnet8_gn", "vit_tiny")
}
_FOR_62_CLASSES = {"cnn": "emnist_cnn", **_OF_IMAGES}
_FOR_10_CLASSES = {"cnn": "mnist_cnn", **_OF_IMAGES}
_OWN_CLIENTS = {"partition": "its clients are its own"}
_IMAGE_SETTINGS = frozenset({"image_size", "image_color"})
_ROW_SETTINGS = frozenset(own.name for own in fields(OwnFiles)) - _IMAGE_SETTINGS
_NATURAL: dict[str, Any] = {"num_clients": None, "partition": None}
_QUICK = {
    "num_clients": 50,
    "cohort_size": 10,
    "eval_every": 5,
    "fedavg.num_rounds": 40,
    "fine_tune.num_rounds": 20,
    "fine_tune.server_optimizer.name": "adam",
    "fine_tune.server_schedule": "constant",
}
"""Few rounds, in which Adam gets further."""

_EMNIST = DataSet(_load_mnist_family, _FOR_62_CLASSES)
_MNIST = DataSet(_load_mnist_family, _FOR_10_CLASSES)

DATA_SETS = {
    "emnist": _EMNIST,
    "emnist_balanced": _EMNIST,
    "emnist_letters": _EMNIST,
    "emnist_digits": _EMNIST,
    "mnist": _MNIST,
    "fashion_mnist": _MNIST,
    "digits": DataSet(
        _load_digits,
        _FOR_10_CLASSES,
        {**_QUICK, "unseen_fraction": "0.4", "local_test_fraction": "0.5"},  # so that 360 of 1,797 images are scored on
    ),
    "femnist": DataSet(
        _load_femnist,
        _FOR_62_CLASSES,
        {**_NATURAL, "unseen_fraction": "9/34"},  # 2,500 of 3,400 writers train
        _OWN_CLIENTS,
    ),
    "shakespeare": DataSet(
        _load_shakespeare,
        {"lstm": "lstm"},
        {
            **_NATURAL,
            "fedavg.client_optimizer.learning_rate": 0.8,
            "fine_tune.client_optimizer.learning_rate": 0.8,
        },
        {**_OWN_CLIENTS, "local_split": "its examples overlap and stay in order"},
    ),
    "plays": DataSet(
        _load_plays,
        {
            "lstm": "lstm_each_step",
            "lstm_each_step": "lstm_each_step",
            "char_conv": "char_conv",
            "char_transformer": "char_transformer",
        },
        {
            **_NATURAL,
            "fedavg.client_optimizer.learning_rate": 0.8,
            "fine_tune.client_optimizer.learning_rate": 0.8,
        },
        {**_OWN_CLIENTS, "local_split": "its examples stay in the order of the play"},
    ),
    "synthetic_writers": DataSet(
        _load_synthetic_writers,
        _FOR_62_CLASSES,
        {"partition": None},
        _OWN_CLIENTS,
        note="synthetic, rendered from fonts: no result on it is a result on FEMNIST",
    ),
    "folder": DataSet(_load_folder, {"auto": "auto", **_FOR_62_CLASSES}, _NATURAL, _OWN_CLIENTS, _IMAGE_SETTINGS),
    "sine": DataSet(
        _load_sine,
        {"mlp": "sine_mlp", "sine_mlp": "sine_mlp"},
        {"num_clients": 30_600, "unseen_fraction": "1/51", "partition": None},
        {
            **_OWN_CLIENTS,
            "local_split": "its targets are no classes",
            "local_test_fraction": "its test parts are whole tasks",
            "validation": "its tasks follow from --seed, so try another",
        },
        loss_name="MSE",
    ),
}
USERS_OWN = DataSet(
    _load_own,
    {"auto": "auto", **_FOR_62_CLASSES, "lstm": "lstm", "sine_mlp": "sine_mlp"},
    _NATURAL,
    {
        **_OWN_CLIENTS,
        **dict.fromkeys(("local_split", "local_test_fraction"), "it cuts its clients' data itself"),
        "unseen_fraction": "it says itself which clients are unseen",
    },
)
"""For a data set given as package.module:factory."""
_FEW_ROUNDS = {**_QUICK, **_NATURAL, "cohort_size": 5}
USERS_TABLE = DataSet(_load_table, {"mlp": "mlp", "sine_mlp": "sine_mlp"}, _FEW_ROUNDS, _OWN_CLIENTS, _ROW_SETTINGS)
"""For a data set given as the path of a CSV or parquet file."""
USERS_ARRAYS = DataSet(
    _load_arrays,
    {"auto": "auto", **_FOR_62_CLASSES, "sine_mlp": "sine_mlp"},
    _FEW_ROUNDS,
    _OWN_CLIENTS,
    _ROW_SETTINGS,
)
"""For a data set given as the path of an .npz file."""
