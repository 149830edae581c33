"""Other ways to take part in the same data: some training clients are scored instead, or all of them are one."""

from __future__ import annotations

import hashlib
import threading
from functools import cached_property

import torch

from perfedavg.contracts import ClientData, FederatedDataset


class View:
    """A data set of which some things are seen otherwise; what else it has (names, a loss, a model) is its own."""

    def __init__(self, dataset: FederatedDataset) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> object:
        if name == "_dataset":  # asked for before there is one, by whoever copies a view
            raise AttributeError(name)
        return getattr(self._dataset, name)

    @property
    def num_classes(self) -> int:
        return self._dataset.num_classes

    @property
    def fingerprint(self) -> str:
        text = f"{type(self).__name__} {self._dataset.fingerprint}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def num_train_examples(self, client_id: int) -> int:
        return self._dataset.num_train_examples(client_id)


class ValidationView(View):
    """The last training clients are scored and do not train; the unseen clients are left alone.

    For choosing settings: what is chosen by its score on clients is no longer unseen there.
    """

    def __init__(self, dataset: FederatedDataset, num_scored: int) -> None:
        """Raises ValueError where no client would be left to train."""
        super().__init__(dataset)
        if num_scored < 1:
            raise ValueError(
                "--unseen_fraction 0 gives no validation clients, which are as large a share of the training clients; "
                "give a share above 0"
            )
        num_train = len(dataset.train_client_ids) - num_scored
        if num_train < 1:
            raise ValueError(
                f"--validation true holds {num_scored} of {len(dataset.train_client_ids)} training clients out, which "
                "leaves none to train; use more clients (--client_num_in_total)"
            )
        self.train_client_ids = dataset.train_client_ids[:num_train]
        self.unseen_client_ids = dataset.train_client_ids[num_train:]

    def client_data(self, client_id: int) -> ClientData:
        """Raises ValueError where the client is to be scored, and has nothing to be scored on."""
        data = self._dataset.client_data(client_id)
        if not len(data.test_labels) and client_id in self.unseen_client_ids:
            raise ValueError(f"--validation true scores training clients, and client {client_id} has no test part")
        return data


class JointView(View):
    """One training client that has the training parts of all of them: centralized training, as a federation of one."""

    def __init__(self, dataset: FederatedDataset) -> None:
        """Raises ValueError where nobody would be left to be scored."""
        super().__init__(dataset)
        if not len(dataset.unseen_client_ids):
            raise ValueError(
                "--joint true pools the training clients in one without a test part, and there are no unseen clients "
                "to be scored; give an --unseen_fraction above 0"
            )
        self.unseen_client_ids = dataset.unseen_client_ids
        self.train_client_ids = (dataset.train_client_ids[0],)
        self._lock = threading.Lock()
        self._pooled: ClientData | None = None

    def num_train_examples(self, client_id: int) -> int:
        return self._num_pooled if client_id in self.train_client_ids else super().num_train_examples(client_id)

    @cached_property
    def _num_pooled(self) -> int:
        return sum(map(self._dataset.num_train_examples, self._dataset.train_client_ids))

    def client_name(self, client_id: int) -> str | None:
        """The one training client has no name of its own."""
        name_of = getattr(self._dataset, "client_name", None)
        return None if name_of is None or client_id in self.train_client_ids else name_of(client_id)

    def has_test_part(self, client_id: int) -> bool:
        return False  # the one training client

    def client_data(self, client_id: int) -> ClientData:
        """Of the one training client, which has no test part, the examples are kept from the first call on."""
        if client_id not in self.train_client_ids:
            return self._dataset.client_data(client_id)
        with self._lock:
            if self._pooled is None:
                clients = [self._dataset.client_data(member) for member in self._dataset.train_client_ids]
                inputs = torch.cat([data.train_inputs for data in clients])
                labels = torch.cat([data.train_labels for data in clients])
                self._pooled = ClientData(inputs, labels, inputs[:0], labels[:0])
            return self._pooled
