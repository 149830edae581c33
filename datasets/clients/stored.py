"""Clients in a cache on disk, which all processes of a machine share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.clients.raw import ConsecutiveClients, Examples
from datasets.sources.image_files import are_blank
from datasets.storage import built_once, tell

CACHE_FORMAT = 4
"""Raised with every change of the files that `cached_clients` writes, so that older ones are built anew."""


@dataclass(frozen=True)
class NamedClient:
    """One client on its way into the cache.

    name: unlike any other client's.  inputs: (num_examples, ...) uint8, alike for all clients; num_examples may be 0.
    labels: (num_examples,) int64, below the number of classes.
    num_train: size of its training part, which comes first, where the data set is published with that split.
    """

    name: str
    inputs: NDArray[np.uint8]
    labels: NDArray[np.int64]
    num_train: int | None = None


class StoredClients(ConsecutiveClients):
    """Clients in one folder of plain files, of which inputs and labels are mapped and not loaded."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        super().__init__(np.array(meta["offsets"], dtype=np.int64))
        self.class_names = tuple(class_names)
        self.names: list[str] = meta["names"]
        self.num_classes = len(class_names)
        self._fingerprint: str = meta["fingerprint"]
        self.overlap = meta["overlap"]
        self.train_counts = meta["train_counts"]
        self.blank_clients: list[str] = meta["blank_clients"]
        total = int(self._offsets[-1])
        shape = (total, *meta["input_shape"])
        self._inputs = np.memmap(folder / "inputs", dtype=np.uint8, mode="r", shape=shape)
        self._labels = np.memmap(folder / "labels", dtype="<i8", mode="r", shape=(total,))

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def examples(self, client: int) -> Examples:
        own = self._places(client)
        return np.asarray(self._inputs[own]), np.asarray(self._labels[own])


def cached_clients(
    cache: Path,
    name: str,
    sources: Iterable[Path],
    clients: Iterator[NamedClient],
    class_names: Sequence[str],
    overlap: int = 0,
) -> StoredClients:
    """The clients that an iterator yields, from the cache where it holds them already.

    cache, name, sources: see `built_once`.
    clients: is exhausted only where the cache is built. Whatever it raises leaves no cache behind.
    class_names: label i stands for the i-th.  overlap: see RawClients.
    Raises ValueError where there is no client with an example, and what `built_once` raises.
    """
    stored = built_once(
        cache,
        name,
        sources,
        lambda folder: _write_clients(folder, clients, overlap),
        lambda folder: StoredClients(folder, class_names),
        CACHE_FORMAT,
    )
    if stored.blank_clients:
        tell(
            f"{name}: each image of {len(stored.blank_clients)} client(s), such as {stored.blank_clients[0]}, has one "
            "and the same grey all over"
        )
    return stored


def _write_clients(folder: Path, clients: Iterator[NamedClient], overlap: int) -> None:
    names: list[str] = []
    offsets = [0]
    train_counts: list[int | None] = []
    blank_clients: list[str] = []
    input_shape: tuple[int, ...] = ()
    digest = hashlib.blake2b(digest_size=16)
    with open(folder / "inputs", "wb") as inputs_file, open(folder / "labels", "wb") as labels_file:
        for client in clients:
            input_shape = input_shape or client.inputs.shape[1:]
            assert client.inputs.dtype == np.uint8, client.name
            assert client.inputs.shape[1:] == input_shape, client.name
            assert len(client.inputs) == len(client.labels), client.name
            names.append(client.name)
            offsets.append(offsets[-1] + len(client.labels))
            train_counts.append(client.num_train)
            if client.inputs.ndim == 3 and len(client.inputs) and are_blank(client.inputs):
                blank_clients.append(client.name)
            for array, file in ((client.inputs, inputs_file), (client.labels.astype("<i8"), labels_file)):
                content = np.ascontiguousarray(array).tobytes()
                digest.update(content)
                file.write(content)
    if not offsets[-1]:
        raise ValueError("there is no client with an example")
    published = None not in train_counts
    digest.update(json.dumps([names, offsets, train_counts] if published else [names, offsets]).encode())
    meta: dict[str, Any] = {
        "names": names,
        "offsets": offsets,
        "input_shape": input_shape,
        "overlap": overlap,
        "train_counts": train_counts if published else None,
        "blank_clients": blank_clients,
        "fingerprint": digest.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
