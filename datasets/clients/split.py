"""Clients with a part to train on and a part to be scored on: what the algorithm reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.clients.stored import Clients
from datasets.streams import LOCAL_CUT_STREAM, stream

TRAIN_PERCENT = 80
"""Share of a client's examples that it trains or adapts on; it is scored on the rest."""


@dataclass(frozen=True)
class ClientData:
    """One client's examples. Labels (num_examples,) int64.

    Inputs: images (num_examples, 1, 28, 28) float32 in 0..1, or tokens (num_examples, length) int64.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


class FederatedDataset:
    """Clients 0 .. num_train - 1 train; the next num_unseen are unseen; any others are not used.

    Each client's examples are put in an order that follows from (seed, client) before they are cut 80/20, so that
    both parts have the same label mix; without it, the test part of a client with sorted labels would hold only the
    label sorted last. Examples that overlap keep their order, and those at the cut that share text with the training
    part are dropped; otherwise a client would be scored on text that it trained on. Where the data set is published
    with a split of its own, that is the cut, and the examples keep their order. Clients too small to have an example
    in each part are left out of both lists.

    local_split: `shuffled` is what was just said. `tail` sorts a client's examples by label before they are cut, as the
    code behind the published figures does: the test part then has its last labels only, often a single one.
    """

    def __init__(
        self, name: str, clients: Clients, num_train: int, num_unseen: int, seed: int, local_split: str = "shuffled"
    ) -> None:
        """Raises ValueError where no training client or no unseen client remains."""
        self.name = name
        self.num_classes = clients.num_classes
        self.class_names = clients.class_names
        self._clients = clients
        self._seed = seed
        self._local_split = local_split
        used = num_train + num_unseen
        left_out = {client for client in _too_small(clients) if client < used}
        self.num_left_out = len(left_out)
        self.train_client_ids = _without(range(num_train), left_out)
        self.unseen_client_ids = _without(range(num_train, used), left_out)
        if not (num_train > 0 and num_unseen > 0):
            raise ValueError(
                f"--unseen_fraction leaves {num_train} of {used} clients of {name} to train and {num_unseen} to be "
                "scored, and there must be one of each; change it"
            )
        if not (self.train_client_ids and self.unseen_client_ids):
            raise ValueError(
                f"{len(left_out)} of {used} clients of {name} have {_lack(clients)}, which leaves "
                f"{len(self.train_client_ids)} to train and {len(self.unseen_client_ids)} to be scored; "
                "use fewer clients (--client_num_in_total) or another --partition"
            )

    def client_name(self, client_id: int) -> str | None:
        """What natural clients are called in their data."""
        names = self._clients.names
        return None if names is None else names[client_id]

    def num_train_examples(self, client_id: int) -> int:
        if self._clients.train_counts is not None:
            return self._clients.train_counts[client_id]
        return count_train(self._clients.num_examples(client_id))

    def client_data(self, client_id: int) -> ClientData:
        raw, labels = self._clients.examples(client_id)
        published = self._clients.train_counts
        order: NDArray[np.int64] = np.arange(len(labels))
        if self._local_split == "tail":
            order = np.argsort(labels, kind="stable")
        elif not self._clients.overlap and published is None:
            order = np.random.default_rng(stream(self._seed, LOCAL_CUT_STREAM, client_id)).permutation(len(labels))
        inputs, targets = to_tensor(raw[order]), torch.from_numpy(labels[order].astype(np.int64, copy=False))
        cut = count_train(len(labels)) if published is None else published[client_id]
        resume = cut + self._clients.overlap if published is None else cut
        return ClientData(inputs[:cut], targets[:cut], inputs[resume:], targets[resume:])

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all examples, of who has them, who trains, and how each client's are cut."""
        parts: tuple[object, ...] = (
            self._clients.fingerprint,
            len(self.train_client_ids),
            len(self.unseen_client_ids),
            self._seed,
        )
        if self._local_split != "shuffled":
            parts += (self._local_split,)
        return hashlib.blake2b(str(parts).encode(), digest_size=16).hexdigest()


def to_tensor(raw: NDArray[np.uint8]) -> Tensor:
    """What a model takes, from images (num_examples, 28, 28) or tokens (num_examples, length)."""
    values = torch.from_numpy(raw)
    if values.ndim == 2:
        return values.to(torch.int64)  # tokens
    return values.unsqueeze(1).to(torch.float32).div_(255)


def count_train(num_examples: int, train_percent: int | Fraction = TRAIN_PERCENT) -> int:
    """So many percent of a client's examples, rounded down, but at least one example on each side of the cut."""
    return min(max(int(num_examples * train_percent // 100), 1), num_examples - 1)


def _too_small(clients: Clients) -> Sequence[int]:
    """The clients without an example in each part."""
    if clients.train_counts is None:
        return clients.smaller_than(_smallest_client(clients.overlap))
    return [client for client, count in enumerate(clients.train_counts) if not 0 < count < clients.num_examples(client)]


def _lack(clients: Clients) -> str:
    """What those clients have, for a message."""
    if clients.train_counts is None:
        return f"fewer than {_smallest_client(clients.overlap)} examples"
    return "no example in one of the parts of their published split"


def _smallest_client(overlap: int) -> int:
    """The fewest examples at which both parts have one: a fifth, rounded up, must exceed what is dropped."""
    return max(2, 5 * overlap + 1)


def _without(client_ids: range, left_out: set[int]) -> Sequence[int]:
    """The range itself where nothing is left out, because it may be long."""
    return client_ids if not left_out else [client_id for client_id in client_ids if client_id not in left_out]
