"""Clients with their raw examples, before these are cut or turned into tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Examples = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Inputs, images (num_examples, 28, 28) with 0 for black or tokens (num_examples, length); labels (num_examples,)."""


class RawClients(ABC):
    """Clients 0 .. num_clients - 1. Safe to read from several threads.

    num_classes: labels are below it.
    class_names: what label i stands for, or None where that is not known.
    names: what each client is called, or None where clients have numbers only.
    overlap: examples of a client at most this many places apart share text, as neighbouring windows do; 0 for none.
    train_counts: how many of each client's examples, the first ones, are its training part, where the data set is
        published with that split; None where the examples are yet to be cut.
    """

    num_clients: int
    num_classes: int
    class_names: Sequence[str] | None = None
    names: Sequence[str] | None = None
    overlap: int = 0
    train_counts: Sequence[int] | None = None

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
