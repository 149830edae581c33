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

    It may also call its clients by names, in a method `client_name(client_id)` that returns a text or None (see
    `client_name`), and bring its own model, as a method `build_model()`, and its own loss, as a function
    `loss_function(outputs, labels)` that is the mean over a batch. Labels that are not whole numbers are targets of a
    regression.
    """

    def client_data(self, client_id: int) -> ClientData:
        """A client's examples, on the CPU."""
        ...


MAX_NAME_CHARS = 100


def client_name(clients: object, client_id: int) -> str | None:
    """What a data set calls a client, such as its folder or writer, by which a person finds its data again.

    None where the data set does not say. Names come from the data, so what cannot be printed in one line is replaced
    by `?`, and long ones are cut.
    """
    name_of = getattr(clients, "client_name", None)
    name = None if name_of is None else name_of(client_id)
    if name is None:
        return None
    shown = "".join(char if char.isprintable() else "?" for char in name)
    return shown if len(shown) <= MAX_NAME_CHARS else f"{shown[: MAX_NAME_CHARS - 3]}..."


def client_label(clients: object, client_id: int) -> str:
    """How a client is called in lines for people: `12 (anna)`, or its number alone."""
    name = client_name(clients, client_id)
    return str(client_id) if name is None else f"{client_id} ({name})"
