"""What the algorithm asks of a data set. `datasets.FederatedDataset` is one; a user's own class may be another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class ClientData(Protocol):
    """One client's examples, cut into the part it trains or adapts on and the part it is scored on.

    train_inputs, test_inputs: (num_examples, ...) float32.  train_labels, test_labels: (num_examples,) int64.
    """

    @property
    def train_inputs(self) -> Tensor: ...
    @property
    def train_labels(self) -> Tensor: ...
    @property
    def test_inputs(self) -> Tensor: ...
    @property
    def test_labels(self) -> Tensor: ...


class ClientDirectory(Protocol):
    """Who the clients are and how much each has, which is all that a server needs to know.

    train_client_ids, unseen_client_ids: disjoint; whole numbers, 0 or more.
    fingerprint: digest of all examples and of their distribution over clients; equal data, equal digest.
    """

    @property
    def train_client_ids(self) -> Sequence[int]: ...
    @property
    def unseen_client_ids(self) -> Sequence[int]: ...
    @property
    def fingerprint(self) -> str: ...
    def num_train_examples(self, client_id: int) -> int:
        """Size of a client's training part, 1 or more, without reading it."""
        ...


class FederatedDataset(ClientDirectory, Protocol):
    """Clients and their data. Safe to read from several threads.

    It may also bring its own model, as a method `build_model()`, and its own loss, as a function
    `loss_function(outputs, labels)` that is the mean over a batch. Labels that are not whole numbers are targets of a
    regression.
    """

    def client_data(self, client_id: int) -> ClientData:
        """A client's examples, on the CPU."""
        ...
