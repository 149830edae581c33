"""Clients with their raw examples, before these are cut or turned into tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfedavg.seeding import Purpose, data_stream

Examples = tuple[NDArray[Any], NDArray[Any]]
"""Inputs and labels of so many examples.

Inputs are uint8: tokens (num_examples, length) or images with 0 for black, (num_examples, height, width) or
(num_examples, channels, height, width); or float32, (num_examples, ...), which are taken as they are.
Labels are classes, (num_examples,) int64 or, of a class at each of several places, (num_examples, num_places); or
targets (num_examples, num_targets) float32.
"""


class RawClients(ABC):
    """Clients 0 .. num_clients - 1. Safe to read from several threads.

    num_classes: labels are below it; where they are targets, how many each example has.
    has_targets: whether labels are targets of a regression.
    class_names: what label i stands for, or None where that is not known.
    names: what each client is called, or None where clients have numbers only.
    is_ordered: whether examples stand in an order, as those of a text do, in which they are to be cut.
    overlap: examples of a client at most this many places apart share text, as neighbouring windows do; 0 for none.
    train_counts: how many of each client's examples, the first ones, are its training part, where the data set is
        published with that split; None where the examples are yet to be cut.
    about: what was made of the user's files, in a line; empty for nothing.
    """

    num_clients: int
    num_classes: int
    has_targets: bool = False
    class_names: Sequence[str] | None = None
    names: Sequence[str] | None = None
    is_ordered: bool = False
    overlap: int = 0
    train_counts: Sequence[int] | None = None
    about: str = ""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of all examples and of who has them; equal clients, equal digest."""

    @abstractmethod
    def num_examples(self, client: int) -> int:
        """How many examples a client has, without reading them."""

    @abstractmethod
    def smaller_than(self, minimum: int) -> Sequence[int]:
        """The clients with fewer examples than that, ascending."""

    @abstractmethod
    def examples(self, client: int) -> Examples:
        """A client's examples, in an order that is always the same."""


class ConsecutiveClients(RawClients):
    """Clients whose examples lie one behind the other: client i has those from offsets[i] to offsets[i + 1]."""

    def __init__(self, offsets: NDArray[np.int64]) -> None:
        self._offsets = offsets
        self.num_clients = len(offsets) - 1

    def num_examples(self, client: int) -> int:
        return int(self._offsets[client + 1] - self._offsets[client])

    def smaller_than(self, minimum: int) -> Sequence[int]:
        return [int(client) for client in np.flatnonzero(np.diff(self._offsets) < minimum)]

    def _places(self, client: int) -> slice:
        return slice(self._offsets[client], self._offsets[client + 1])


class DrawnClients(RawClients):
    """The clients of another data set in an order that follows from the seed, and so does who of them is unseen."""

    def __init__(self, clients: RawClients, seed: int) -> None:
        self._clients, self._seed = clients, seed
        self._order = np.random.default_rng(data_stream(seed, Purpose.CLIENT_ORDER, 0)).permutation(clients.num_clients)
        self.num_clients, self.num_classes = clients.num_clients, clients.num_classes
        self.has_targets, self.class_names = clients.has_targets, clients.class_names
        self.is_ordered, self.overlap, self.about = clients.is_ordered, clients.overlap, clients.about
        names, counts = clients.names, clients.train_counts
        self.names = None if names is None else [names[client] for client in self._order.tolist()]
        self.train_counts = None if counts is None else [counts[client] for client in self._order.tolist()]

    @property
    def fingerprint(self) -> str:
        return f"{self._clients.fingerprint}, in the order of seed {self._seed}"

    def num_examples(self, client: int) -> int:
        return self._clients.num_examples(int(self._order[client]))

    def smaller_than(self, minimum: int) -> Sequence[int]:
        small = np.isin(self._order, list(self._clients.smaller_than(minimum)))
        return [int(client) for client in np.flatnonzero(small)]

    def examples(self, client: int) -> Examples:
        return self._clients.examples(int(self._order[client]))
