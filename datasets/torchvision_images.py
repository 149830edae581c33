"""MNIST and EMNIST: downloaded through torchvision on first use, checked on every use, mapped from its files."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from torchvision.datasets import EMNIST, MNIST

from datasets.federated import ImageSplits
from datasets.idx import map_idx

IMAGE_SHAPE = (28, 28)


@dataclass(frozen=True)
class Source:
    """A data set that torchvision downloads.

    name: ours.  folder: torchvision's, below the data root.  train_prefix, test_prefix: beginnings of the file names.
    download: fetches the files into a data root.
    """

    name: str
    folder: str
    train_prefix: str
    test_prefix: str
    num_classes: int
    download: Callable[[str], object]


MNIST_SOURCE = Source("mnist", "MNIST", "train", "t10k", 10, lambda root: MNIST(root, download=True))
EMNIST_SOURCE = Source(
    "emnist",
    "EMNIST",
    "emnist-byclass-train",
    "emnist-byclass-test",
    62,
    lambda root: EMNIST(root, split="byclass", download=True),
)


def load_mnist_images(data_root: Path) -> ImageSplits:
    """60,000 training and 10,000 test digits (LeCun et al. 1998)."""
    return _load(MNIST_SOURCE, data_root)


def load_emnist_images(data_root: Path) -> ImageSplits:
    """EMNIST byclass: 697,932 training and 116,323 test characters of 62 classes (Cohen et al. 2017).

    The published files hold each image transposed; here they stand upright.
    """
    splits = _load(EMNIST_SOURCE, data_root)
    return ImageSplits(
        splits.train_images.transpose(0, 2, 1),
        splits.train_labels,
        splits.test_images.transpose(0, 2, 1),
        splits.test_labels,
        splits.num_classes,
    )


def _load(source: Source, data_root: Path) -> ImageSplits:
    _download_if_missing(source, data_root)
    raw = data_root / source.folder / "raw"
    try:
        train = _read_split(raw, source.train_prefix, source.num_classes)
        test = _read_split(raw, source.test_prefix, source.num_classes)
    except ValueError as error:
        raise ValueError(f"{error}; replace it, or delete {raw} to download {source.name} anew") from error
    return ImageSplits(*train, *test, source.num_classes)


def _read_split(raw: Path, prefix: str, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images_path, labels_path = raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"
    images, labels = map_idx(images_path, 3), map_idx(labels_path, 1).astype(np.int64)
    if images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"{images_path} is damaged: its images are {images.shape[1:]}, not {IMAGE_SHAPE}")
    if len(images) != len(labels):
        raise ValueError(f"{labels_path} is damaged: it has {len(labels)} labels for {len(images)} images")
    if labels.max() >= num_classes:
        first = int(np.argmax(labels >= num_classes))
        raise ValueError(f"{labels_path} is damaged: label {first} is {labels[first]}, not below {num_classes}")
    return images, labels


def _download_if_missing(source: Source, data_root: Path) -> None:
    """Download into a folder beside the final one and rename it, so that nothing half-written is taken for data."""
    folder = data_root / source.folder
    if (folder / "raw").is_dir():
        return
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        with FileLock(data_root / f".{source.folder}.lock"):
            if (folder / "raw").is_dir():  # another process was faster
                return
            print(f"downloading {source.name} to {data_root}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=f".{source.folder}-", dir=data_root) as incoming:
                with contextlib.redirect_stdout(sys.stderr):
                    source.download(incoming)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(Path(incoming) / source.folder, folder)
    except Exception as error:  # torchvision raises RuntimeError, URLError, OSError, zipfile and gzip errors here
        raise ValueError(
            f"{source.name} is not in {data_root} and could not be downloaded ({_last_line(error)}); put its unpacked "
            f"IDX files into {folder / 'raw'}, name another folder with --data_root or PERFEDAVG_DATA, or use "
            "--dataset digits, which needs no download"
        ) from error


def _last_line(error: Exception) -> str:
    """The end of what an error says, without the paths and mirrors before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
