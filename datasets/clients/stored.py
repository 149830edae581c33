"""Clients with their raw examples, and a cache of them on disk that all processes of a machine share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datasets.sources.image_files import are_blank
from datasets.storage import built_once, tell

CACHE_FORMAT = 4
"""Raised with every change of the files that `cached_clients` writes, so that older ones are built anew."""


class Clients(Protocol):
    """Clients 0 .. num_clients - 1 with their raw examples, before they are cut or turned into tensors.

    num_classes: labels are below it.  class_names: what they stand for, label i the i-th, or None where not known.
    names: what the clients are called, one each, or None where they have numbers only.
    fingerprint: digest of all examples and of who has them; equal clients, equal digest.
    overlap: examples of a client that are no more than so many places apart share some of their text, as neighbouring
        windows do; 0 where examples are independent.
    train_counts: for each client, how many of its examples, the first ones, are its training part, where the data set
        is published with that split; None where the examples are yet to be cut.
    Safe to read from several threads.
    """

    @property
    def num_clients(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def class_names(self) -> Sequence[str] | None: ...
    @property
    def names(self) -> Sequence[str] | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def overlap(self) -> int: ...
    @property
    def train_counts(self) -> Sequence[int] | None: ...
    def num_examples(self, client: int) -> int:
        """How many examples a client has, without reading them."""
        ...

    def smaller_than(self, minimum: int) -> Sequence[int]:
        """The clients with fewer examples than that, ascending."""
        ...

    def examples(self, client: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Inputs (num_examples, ...) and labels (num_examples,), in an order that is always the same.

        Inputs are images (num_examples, 28, 28) with 0 for black, or tokens (num_examples, length).
        """
        ...


@dataclass(frozen=True)
class NamedClient:
    """One client on its way into the cache.

    inputs: (num_examples, ...) uint8.  labels: (num_examples,) int64.  num_examples may be 0.
    num_train: size of its training part, which comes first, where the data set is published with that split.
    """

    name: str
    inputs: NDArray[np.uint8]
    labels: NDArray[np.int64]
    num_train: int | None = None


class StoredClients:
    """Clients in one folder of plain files, of which inputs and labels are mapped and not loaded."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.names: list[str] = meta["names"]
        self.num_clients = len(self.names)
        self.num_classes: int = meta["num_classes"]
        self.class_names = tuple(class_names)
        self.fingerprint: str = meta["fingerprint"]
        self.overlap: int = meta["overlap"]
        self.train_counts: list[int] | None = meta["train_counts"]
        self.blank_clients: list[str] = meta["blank_clients"]
        self._offsets = np.array(meta["offsets"], dtype=np.int64)
        total = int(self._offsets[-1])
        input_shape = (total, *meta["input_shape"])
        self._inputs = np.memmap(folder / "inputs", dtype=np.uint8, mode="r", shape=input_shape)
        self._labels = np.memmap(folder / "labels", dtype="<i8", mode="r", shape=(total,))

    def num_examples(self, client: int) -> int:
        return int(self._offsets[client + 1] - self._offsets[client])

    def smaller_than(self, minimum: int) -> Sequence[int]:
        return [int(client) for client in np.flatnonzero(np.diff(self._offsets) < minimum)]

    def examples(self, client: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        own = slice(self._offsets[client], self._offsets[client + 1])
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
    class_names: label i stands for the i-th.  overlap: see Clients.
    Raises ValueError where there is no client with an example, two have the same name, or a label is out of range, and
    what `built_once` raises.
    """
    stored = built_once(
        cache,
        name,
        sources,
        lambda folder: _write_clients(folder, clients, len(class_names), overlap),
        lambda folder: StoredClients(folder, class_names),
        CACHE_FORMAT,
    )
    if stored.blank_clients:
        tell(
            f"{name}: each image of {len(stored.blank_clients)} client(s), such as {stored.blank_clients[0]}, has one "
            "and the same grey all over"
        )
    return stored


def _write_clients(folder: Path, clients: Iterator[NamedClient], num_classes: int, overlap: int) -> None:
    names: list[str] = []
    offsets = [0]
    train_counts: list[int | None] = []
    blank_clients: list[str] = []
    input_shape: tuple[int, ...] | None = None
    digest = hashlib.blake2b(digest_size=16)
    with open(folder / "inputs", "wb") as inputs_file, open(folder / "labels", "wb") as labels_file:
        for client in clients:
            input_shape = client.inputs.shape[1:] if input_shape is None else input_shape
            _check_client(client, input_shape, num_classes)
            names.append(client.name)
            offsets.append(offsets[-1] + len(client.labels))
            train_counts.append(client.num_train)
            if client.inputs.ndim == 3 and len(client.inputs) and are_blank(client.inputs):
                blank_clients.append(client.name)
            for array, file in ((client.inputs, inputs_file), (client.labels.astype("<i8"), labels_file)):
                content = np.ascontiguousarray(array).tobytes()
                digest.update(content)
                file.write(content)
    if not offsets[-1] or input_shape is None:
        raise ValueError("there is no client with an example")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"client {twice!r} comes twice")
    published = None not in train_counts
    digest.update(json.dumps([names, offsets, train_counts] if published else [names, offsets]).encode())
    meta: dict[str, Any] = {
        "names": names,
        "offsets": offsets,
        "input_shape": list(input_shape),
        "num_classes": num_classes,
        "overlap": overlap,
        "train_counts": train_counts if published else None,
        "blank_clients": blank_clients,
        "fingerprint": digest.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _check_client(client: NamedClient, input_shape: tuple[int, ...], num_classes: int) -> None:
    if client.inputs.dtype != np.uint8 or client.inputs.shape[1:] != input_shape:
        raise ValueError(f"client {client.name!r} has inputs {client.inputs.shape[1:]}, others {input_shape}")
    if len(client.inputs) != len(client.labels):
        raise ValueError(f"client {client.name!r} has {len(client.inputs)} inputs but {len(client.labels)} labels")
    bad = np.flatnonzero((client.labels < 0) | (client.labels >= num_classes))
    if len(bad):
        raise ValueError(
            f"client {client.name!r}: label {bad[0]} is {client.labels[bad[0]]}, not in 0..{num_classes - 1}"
        )
