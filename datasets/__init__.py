"""Data sets, partitions, and the `FederatedDataset` that everything else reads."""

from __future__ import annotations

from pathlib import Path

from compat import prepare_fedlab

prepare_fedlab()

from datasets.digits import load_digits_images  # noqa: E402
from datasets.federated import FederatedDataset, ImageSplits  # noqa: E402
from datasets.torchvision_images import load_emnist_images, load_mnist_images  # noqa: E402

NAMES = ("emnist", "mnist", "digits")


def load_federated_dataset(name: str, data_root: Path, num_clients: int, seed: int) -> FederatedDataset:
    """A data set dealt out to clients: 80 % of them train on its train split, 20 % are unseen and share its test split.

    name: one of NAMES.  data_root: folder of the data files, into which missing ones are downloaded.
    Raises ValueError where the data cannot be had, is damaged, or is too small for so many clients.
    """
    return FederatedDataset(name, _load_images(name, data_root), num_clients, seed)


def _load_images(name: str, data_root: Path) -> ImageSplits:
    if name == "digits":
        return load_digits_images()
    if name == "mnist":
        return load_mnist_images(data_root)
    if name == "emnist":
        return load_emnist_images(data_root)
    raise ValueError(f"--dataset {name} is unknown; use one of {', '.join(NAMES)}")
