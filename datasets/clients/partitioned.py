"""A data set without natural owners, dealt out to clients."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.clients.partition import Labels, Partition
from datasets.clients.raw import ConsecutiveClients, Examples
from perfedavg.seeding import Purpose, data_stream

FINGERPRINT_CHUNK = 10_000


@dataclass(frozen=True)
class ImageSplits:
    """A data set's splits. Images (num_examples, 28, 28) uint8; labels (num_examples,) int64, below num_classes.

    class_names: label i stands for the i-th, or None where that is not known.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    num_classes: int
    class_names: tuple[str, ...] | None = None

    def pick(self, indices: NDArray[np.int64]) -> Examples:
        """The examples of these numbers, which count those of the train split first, and those of the test split on.

        The splits may be mapped files, so only what is picked is read.
        """
        num_train = len(self.train_labels)
        in_test = indices >= num_train
        if not in_test.any():
            return self.train_images[indices], self.train_labels[indices]
        if in_test.all():
            return self.test_images[indices - num_train], self.test_labels[indices - num_train]
        images = np.empty((len(indices), *self.train_images.shape[1:]), dtype=np.uint8)
        labels = np.empty(len(indices), dtype=np.int64)
        for part in (in_test, ~in_test):
            images[part], labels[part] = self.pick(indices[part])
        return images, labels


class PartitionedClients(ConsecutiveClients):
    """Clients of which the first `num_train` share the train split, and the others the test split. Where there are no
    others, all share both.

    With the partition `noise:SIGMA`, client i of N adds Gaussian noise of standard deviation SIGMA * (i + 1) / N
    (in units of the full brightness) to each of its images (Li et al. 2022), always the same noise; i counts within
    the clients of its split.
    """

    def __init__(self, splits: ImageSplits, partition: Partition, num_train: int, num_unseen: int, seed: int) -> None:
        self._splits = splits
        self._seed = seed
        self._num_train, self._num_unseen = num_train, num_unseen
        self._noise = partition.value if partition.name == "noise" else 0.0
        self.num_classes = splits.num_classes
        self.class_names = splits.class_names
        shared = [(0, splits.train_labels, num_train), (num_train, splits.test_labels, num_unseen)]
        if not num_unseen:
            shared = [(0, np.concatenate([splits.train_labels, splits.test_labels]), num_train)]
        dealt: list[NDArray[np.int64]] = []
        for first, values, count in shared:
            labels = Labels(values, splits.num_classes)
            dealt += partition.deal(labels, count, data_stream(seed, Purpose.PARTITION, first))
        super().__init__(np.concatenate([[0], np.cumsum([len(indices) for indices in dealt])]))
        self._indices = np.concatenate(dealt)

    def examples(self, client: int) -> Examples:
        own, position, count = self._indices[self._places(client)], client, self._num_train
        if client >= self._num_train:
            own = own + len(self._splits.train_labels)
            position, count = client - self._num_train, self._num_unseen
        inputs, labels = self._splits.pick(own)
        if self._noise:
            inputs = self._with_noise(inputs, client, self._noise * (position + 1) / count)
        return inputs, labels

    def _with_noise(self, images: NDArray[np.uint8], client: int, deviation: float) -> NDArray[np.uint8]:
        generator = np.random.default_rng(data_stream(self._seed, Purpose.NOISE, client))
        noisy = images + generator.normal(0.0, 255 * deviation, images.shape)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()  # processors have instructions for it
        splits = self._splits
        for array in (splits.train_images, splits.train_labels, splits.test_images, splits.test_labels):
            digest.update(str((array.shape, array.strides, array.dtype.str)).encode())
            for start in range(0, len(array), FINGERPRINT_CHUNK):
                chunk = array[start : start + FINGERPRINT_CHUNK]
                digest.update(chunk.ravel(order="K").data)  # as it lies in memory, also where it is transposed
                _forget_pages(array)
        digest.update(self._indices.tobytes())
        digest.update(self._offsets.tobytes())
        digest.update(str((self._num_train, self._noise, self._seed)).encode())
        return digest.hexdigest()


def _forget_pages(array: NDArray[Any]) -> None:
    """Take the pages of a mapped file out of this process's memory; they come back when they are used."""
    mapped = getattr(array, "_mmap", None)  # of a numpy.memmap and its views
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)
