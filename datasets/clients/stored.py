"""Clients in a cache on disk, which all processes of a machine share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.clients.raw import ConsecutiveClients, Examples
from datasets.sources.image_files import are_blank
from datasets.storage import built_once, tell

CACHE_FORMAT = 6
"""Raised with every change of the files that `stored_clients` writes, so that older ones are built anew."""


@dataclass(frozen=True)
class NamedClient:
    """One client on its way into the cache.

    name: unlike any other client's.
    inputs: (num_examples, ...), as `RawClients.examples` gives them, alike for all clients; num_examples may be 0.
    labels: as `RawClients.examples` gives them.
    num_train: size of its training part, which comes first, where the data set is published with that split.
    """

    name: str
    inputs: NDArray[Any]
    labels: NDArray[Any]
    num_train: int | None = None


@dataclass(frozen=True)
class NewClients:
    """All clients of a data set on their way into the cache.

    clients: in their order; read only where the cache is built. Whatever it raises leaves no cache behind.
    class_names: label i stands for the i-th; None where labels are targets of a regression.
    overlap, is_ordered: see RawClients.
    about: what was made of the files, in a line for the user; empty for nothing.
    """

    clients: Iterable[NamedClient]
    class_names: Sequence[str] | None
    overlap: int = 0
    is_ordered: bool = False
    about: str = ""


class StoredClients(ConsecutiveClients):
    """Clients in one folder of plain files, of which inputs and labels are mapped and not loaded."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        super().__init__(np.array(meta["offsets"], dtype=np.int64))
        names: list[str] | None = meta["class_names"]
        self.class_names = None if names is None else tuple(names)
        self.num_classes = meta["label_shape"][0] if names is None else len(names)
        self.has_targets = names is None
        self.names: list[str] = meta["names"]
        self._fingerprint: str = meta["fingerprint"]
        self.overlap = meta["overlap"]
        self.is_ordered = meta["is_ordered"]
        self.train_counts = meta["train_counts"]
        self.about: str = meta["about"]
        self.blank_clients: list[str] = meta["blank_clients"]
        total = int(self._offsets[-1])
        self._inputs = _mapped(folder / "inputs", meta["input_type"], (total, *meta["input_shape"]))
        self._labels = _mapped(folder / "labels", meta["label_type"], (total, *meta["label_shape"]))

    @property
    def holds_features(self) -> bool:
        """Whether an input is a row of numbers, each of which means something else."""
        return self._inputs.ndim == 2 and self._inputs.dtype.kind == "f"

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def examples(self, client: int) -> Examples:
        own = self._places(client)
        return np.asarray(self._inputs[own]), np.asarray(self._labels[own])


def _mapped(file: Path, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if 0 in shape:  # nothing of it can be mapped, as of examples without features
        return np.zeros(shape, dtype=kind)
    return np.memmap(file, dtype=kind, mode="r", shape=shape)


def stored_clients(cache: Path, name: str, sources: Iterable[Path], read: Callable[[], NewClients]) -> StoredClients:
    """The clients that a function reads from files, from the cache where it holds them already.

    cache, name, sources: see `built_once`.
    Raises ValueError where there is no client with an example, and what `built_once` and `read` raise.
    """
    stored = built_once(
        cache, name, sources, lambda folder: _write_clients(folder, read()), StoredClients, CACHE_FORMAT
    )
    if stored.blank_clients:
        tell(
            f"{name}: each image of {len(stored.blank_clients)} client(s), such as {stored.blank_clients[0]}, has one "
            "and the same grey all over"
        )
    return stored


def _write_clients(folder: Path, new: NewClients) -> None:
    names: list[str] = []
    offsets = [0]
    train_counts: list[int | None] = []
    blank_clients: list[str] = []
    alike: tuple[Any, ...] = ()
    digest = hashlib.blake2b(digest_size=16)
    with open(folder / "inputs", "wb") as inputs_file, open(folder / "labels", "wb") as labels_file:
        for client in new.clients:
            inputs, labels = _little_endian(client.inputs), _little_endian(client.labels)
            kinds = (inputs.dtype.str, inputs.shape[1:], labels.dtype.str, labels.shape[1:])
            alike = alike or kinds
            assert kinds == alike, client.name
            assert len(inputs) == len(labels), client.name
            names.append(client.name)
            offsets.append(offsets[-1] + len(labels))
            train_counts.append(client.num_train)
            if inputs.dtype == np.uint8 and inputs.ndim >= 3 and len(inputs) and are_blank(inputs):
                blank_clients.append(client.name)
            for array, file in ((inputs, inputs_file), (labels, labels_file)):
                content = np.ascontiguousarray(array).data
                digest.update(content)
                file.write(content)
    if not offsets[-1]:
        raise ValueError("there is no client with an example")
    published = None not in train_counts
    digest.update(json.dumps([names, offsets, train_counts] if published else [names, offsets]).encode())
    input_type, input_shape, label_type, label_shape = alike
    meta: dict[str, Any] = {
        "names": names,
        "offsets": offsets,
        "input_type": input_type,
        "input_shape": input_shape,
        "label_type": label_type,
        "label_shape": label_shape,
        "class_names": None if new.class_names is None else list(new.class_names),
        "overlap": new.overlap,
        "is_ordered": new.is_ordered,
        "train_counts": train_counts if published else None,
        "about": new.about,
        "blank_clients": blank_clients,
        "fingerprint": digest.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    if new.about:
        tell(new.about)


def _little_endian(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)
