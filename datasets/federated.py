"""A data set dealt out to clients, each with a part to train on and a part to be scored on."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.partition import label_shards

TRAIN_PERCENT = 80
"""Share of the clients that train, and of each client's examples that it trains or adapts on."""

PARTITION_STREAM, LOCAL_SPLIT_STREAM = 101, 102
"""First part of the spawn keys that seed the partition and the local cuts; the algorithm's own are below 100."""

FINGERPRINT_CHUNK = 10_000


@dataclass(frozen=True)
class ImageSplits:
    """A data set's splits. Images (num_examples, 28, 28) uint8; labels (num_examples,) int64, below num_classes."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    num_classes: int


@dataclass(frozen=True)
class ClientData:
    """One client's examples. Inputs (num_examples, 1, 28, 28) float32 in 0..1; labels (num_examples,) int64."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Directory:
    """Who the clients are and how much each has, without the examples.

    num_train: (num_clients,) sizes of the clients' training parts.  fingerprint: see FederatedDataset.
    """

    train_client_ids: range
    unseen_client_ids: range
    num_train: NDArray[np.int64]
    fingerprint: str

    def num_train_examples(self, client_id: int) -> int:
        return int(self.num_train[client_id])


class FederatedDataset:
    """Label-sorted shards, two a client. Clients 0.. train and share the train split; the rest are unseen and share
    the test split.

    Each client's examples are put in an order that follows from (seed, client id) before they are cut 80/20, so that
    both parts have the same label mix; without it a client's test part would hold only the label sorted last.
    """

    def __init__(self, name: str, splits: ImageSplits, num_clients: int, seed: int) -> None:
        """Raises ValueError where a split has too few examples to give each of its clients both parts."""
        self.name = name
        self.num_classes = splits.num_classes
        self._splits = splits
        self._seed = seed
        num_train = num_clients * TRAIN_PERCENT // 100
        self.train_client_ids = range(num_train)
        self.unseen_client_ids = range(num_train, num_clients)
        self._indices: list[NDArray[np.int64]] = []
        for labels, client_ids in (
            (splits.train_labels, self.train_client_ids),
            (splits.test_labels, self.unseen_client_ids),
        ):
            if len(labels) < 4 * len(client_ids):
                raise ValueError(
                    f"--client_num_in_total {num_clients} leaves fewer than 4 of {name}'s {len(labels)} examples for "
                    f"each of {len(client_ids)} clients; lower it to "
                    f"{_largest_num_clients(len(splits.train_labels), len(splits.test_labels))} or less"
                )
            stream = _stream(seed, PARTITION_STREAM, client_ids.start)
            self._indices += label_shards(labels, len(client_ids), stream)

    def num_train_examples(self, client_id: int) -> int:
        return _num_train(len(self._indices[client_id]))

    def client_data(self, client_id: int) -> ClientData:
        unseen = client_id in self.unseen_client_ids
        images = self._splits.test_images if unseen else self._splits.train_images
        labels = self._splits.test_labels if unseen else self._splits.train_labels
        order = np.random.default_rng(_stream(self._seed, LOCAL_SPLIT_STREAM, client_id))
        indices = order.permutation(self._indices[client_id])
        inputs = torch.from_numpy(images[indices]).unsqueeze(1).to(torch.float32).div_(255)
        targets = torch.from_numpy(labels[indices])
        cut = self.num_train_examples(client_id)
        return ClientData(inputs[:cut], targets[:cut], inputs[cut:], targets[cut:])

    def directory(self) -> Directory:
        num_train = np.array([self.num_train_examples(client_id) for client_id in range(len(self._indices))])
        return Directory(self.train_client_ids, self.unseen_client_ids, num_train, self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all examples, of their distribution over clients and of their cut: equal data, equal digest."""
        digest = hashlib.blake2b(digest_size=16)
        splits = self._splits
        for array in (splits.train_images, splits.train_labels, splits.test_images, splits.test_labels):
            digest.update(str((array.shape, array.dtype.str)).encode())
            for start in range(0, len(array), FINGERPRINT_CHUNK):  # a copy of a chunk, never of all
                digest.update(array[start : start + FINGERPRINT_CHUNK].tobytes())
                _forget_pages(array)
        for indices in self._indices:
            digest.update(indices.tobytes())
        digest.update(str(self._seed).encode())
        return digest.hexdigest()


def _num_train(num_examples: int) -> int:
    """80 % of a client's examples, rounded down, but at least one example on each side of the cut."""
    return min(max(num_examples * TRAIN_PERCENT // 100, 1), num_examples - 1)


def _forget_pages(array: NDArray[Any]) -> None:
    """Take the pages of a mapped file out of this process's memory; they come back when they are used."""
    mapped = getattr(array, "_mmap", None)  # of a numpy.memmap and its views
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def _largest_num_clients(num_train_examples: int, num_test_examples: int) -> int:
    """The largest multiple of 5 at which every client still gets 4 examples, two a shard."""
    return 5 * min(num_train_examples // 4 // 4, num_test_examples // 4)


def _stream(seed: int, stream: int, client_id: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(stream, client_id))
