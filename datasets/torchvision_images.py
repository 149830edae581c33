"""MNIST and EMNIST through torchvision: downloaded on first use, checked on every use."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from torchvision.datasets import EMNIST, MNIST

from datasets.federated import ImageSplits

OpenSplit = Callable[[Path, bool, bool], Any]
"""(root, train, download) -> a torchvision data set with `data` and `targets`."""


def load_mnist_images(data_root: Path) -> ImageSplits:
    """60,000 training and 10,000 test digits (LeCun et al. 1998)."""

    def open_split(root: Path, train: bool, download: bool) -> MNIST:
        return MNIST(str(root), train=train, download=download)

    return _load("mnist", "MNIST", open_split, data_root, num_classes=10)


def load_emnist_images(data_root: Path) -> ImageSplits:
    """EMNIST byclass: 697,932 training and 116,323 test characters of 62 classes (Cohen et al. 2017).

    The published files hold each image transposed; here they stand upright.
    """

    def open_split(root: Path, train: bool, download: bool) -> EMNIST:
        return EMNIST(str(root), split="byclass", train=train, download=download)

    splits = _load("emnist", "EMNIST", open_split, data_root, num_classes=62)
    return replace(
        splits,
        train_images=splits.train_images.transpose(0, 2, 1),
        test_images=splits.test_images.transpose(0, 2, 1),
    )


def _load(name: str, folder: str, open_split: OpenSplit, data_root: Path, num_classes: int) -> ImageSplits:
    _download_if_missing(name, folder, open_split, data_root)
    train_images, train_labels = _read_split(name, folder, open_split, data_root, True, num_classes)
    test_images, test_labels = _read_split(name, folder, open_split, data_root, False, num_classes)
    return ImageSplits(train_images, train_labels, test_images, test_labels, num_classes)


def _download_if_missing(name: str, folder: str, open_split: OpenSplit, data_root: Path) -> None:
    """Download into a folder beside the final one and rename it, so that nothing half-written is taken for data."""
    if (data_root / folder / "raw").is_dir():
        return
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(data_root / f".{folder}.lock")
        with lock:
            if (data_root / folder / "raw").is_dir():  # another process was faster
                return
            print(f"downloading {name} to {data_root}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder}-", dir=data_root) as incoming:
                with contextlib.redirect_stdout(sys.stderr):
                    open_split(Path(incoming), True, True)
                shutil.rmtree(data_root / folder, ignore_errors=True)
                os.replace(Path(incoming) / folder, data_root / folder)
    except Exception as error:  # torchvision raises RuntimeError, URLError, OSError, zipfile and gzip errors here
        raise ValueError(
            f"{name} is not in {data_root} and could not be downloaded ({_last_line(error)}); put its unpacked IDX "
            f"files into {data_root / folder / 'raw'}, name another folder with --data_root or PERFEDAVG_DATA, or use "
            "--dataset digits, which needs no download"
        ) from error


def _read_split(
    name: str, folder: str, open_split: OpenSplit, data_root: Path, train: bool, num_classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    where = f"{name}'s {'training' if train else 'test'} files in {data_root / folder / 'raw'}"
    fix = "delete that folder to download them anew, or replace them"
    try:
        split = open_split(data_root, train, False)
        images, labels = split.data.numpy(), split.targets.numpy().astype(np.int64)
    except Exception as error:  # its IDX reader fails in many ways on a damaged file, with asserts too
        raise ValueError(f"{where} are missing or damaged ({_last_line(error)}); {fix}") from error
    if images.ndim != 3 or images.shape[1:] != (28, 28) or images.dtype != np.uint8:
        raise ValueError(f"{where} are damaged: images of shape {images.shape} and type {images.dtype}; {fix}")
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{where} are damaged: {len(images)} images but {len(labels)} labels; {fix}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{where} are damaged: labels {labels.min()}..{labels.max()}, not 0..{num_classes - 1}; {fix}")
    return images, labels


def _last_line(error: Exception) -> str:
    """The end of what an error says, without the paths and mirrors before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
