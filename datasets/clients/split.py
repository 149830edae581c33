"""A data set whose clients are split into training and unseen ones, and each client's examples into two parts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from datasets.clients.raw import RawClients
from perfedavg.contracts import ClientData
from perfedavg.seeding import Purpose, data_stream

TEST_FRACTION = Fraction(1, 5)
"""Share of a client's examples that it is scored on, where nothing else is asked for; it trains or adapts on the rest.
"""


class SplitDataset:
    """Clients 0 .. num_train - 1 train; the next num_unseen, which may be 0, are unseen; any others are not used.

    Each client's examples are shuffled by (seed, client) before they are cut, so that both parts have the same label
    mix. Examples that stand in an order keep it. So do those that overlap, and those of them at the cut that
    share text with the training part are dropped; otherwise a client would be scored on text that it trained on. Where
    the data set is published with a split of its own, that is the cut. Clients too small to have an example in each
    part are left out.

    local_split: `shuffled`, as above; or `tail`, which sorts a client's examples by label before they are cut, as the
        code behind the published figures does. The test part then has its last labels only, often a single one.
    note: what has to be said with every result.
    test_fraction: share of a client's examples that it is scored on, above 0 and below 1.
    """

    def __init__(
        self,
        name: str,
        clients: RawClients,
        num_train: int,
        num_unseen: int,
        seed: int,
        local_split: str = "shuffled",
        note: str = "",
        test_fraction: Fraction = TEST_FRACTION,
    ) -> None:
        """Raises ValueError where no training client remains, or none of the unseen clients."""
        self.name = name
        self.note = note
        self.num_classes = clients.num_classes
        self.class_names = clients.class_names
        self.about = clients.about
        if clients.has_targets:
            self.loss_function = F.mse_loss
        self._clients = clients
        self._seed = seed
        self._local_split = local_split
        self._test_fraction = test_fraction
        smallest = _smallest_client(clients.overlap, test_fraction)
        used = num_train + num_unseen
        left_out = {client for client in _too_small(clients, smallest) if client < used}
        self.num_left_out = len(left_out)
        self.train_client_ids = _without(range(num_train), left_out)
        self.unseen_client_ids = _without(range(num_train, used), left_out)
        if num_train < 1:
            raise ValueError(
                f"--unseen_fraction leaves {num_train} of {used} clients of {name} to train and {num_unseen} to be "
                "scored, and somebody must train; change it"
            )
        if not (self.train_client_ids and (self.unseen_client_ids or not num_unseen)):
            lack = f"fewer than {smallest} examples"
            if clients.train_counts is not None:
                lack = "no example in one of the parts of their published split"
            raise ValueError(
                f"{len(left_out)} of {used} clients of {name} have {lack}, which leaves {len(self.train_client_ids)} "
                f"to train and {len(self.unseen_client_ids)} to be scored; use fewer clients (--client_num_in_total) "
                "or another --partition"
            )

    def client_name(self, client_id: int) -> str | None:
        names = self._clients.names
        return None if names is None else names[client_id]

    def num_train_examples(self, client_id: int) -> int:
        if self._clients.train_counts is not None:
            return self._clients.train_counts[client_id]
        return count_train(self._clients.num_examples(client_id), self._test_fraction)

    def client_data(self, client_id: int) -> ClientData:
        raw, labels = self._clients.examples(client_id)
        published, overlap = self._clients.train_counts, self._clients.overlap
        order: NDArray[np.int64] = np.arange(len(labels))
        if self._local_split == "tail":
            order = np.argsort(labels, kind="stable")
        elif not (overlap or self._clients.is_ordered) and published is None:
            generator = np.random.default_rng(data_stream(self._seed, Purpose.LOCAL_CUT, client_id))
            order = generator.permutation(len(labels))
        if published is not None:
            return cut_examples(raw[order], labels[order], published[client_id])
        num_train = count_train(len(labels), self._test_fraction)
        return cut_examples(raw[order], labels[order], num_train, overlap)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all examples, of who has them, who trains, and how each client's are cut."""
        counts = (len(self.train_client_ids), len(self.unseen_client_ids))
        parts: tuple[object, ...] = (self._clients.fingerprint, *counts, self._seed)
        if self._local_split != "shuffled":
            parts += (self._local_split,)
        if self._test_fraction != TEST_FRACTION:
            parts += (str(self._test_fraction),)
        return hashlib.blake2b(str(parts).encode(), digest_size=16).hexdigest()


def cut_examples(raw: NDArray[Any], labels: NDArray[Any], num_train: int, num_dropped: int = 0) -> ClientData:
    """The first num_train examples to train on; all others, but for the next num_dropped, to be scored on.

    raw, labels: see `RawClients.examples`.
    """
    values, targets = torch.from_numpy(raw), torch.from_numpy(labels)
    if values.is_floating_point():
        inputs: Tensor = values
    elif values.ndim == 2:
        inputs = values.to(torch.int64)
    else:
        images = values.unsqueeze(1) if values.ndim == 3 else values
        inputs = images.to(torch.float32).div_(255)
    test = num_train + num_dropped
    return ClientData(inputs[:num_train], targets[:num_train], inputs[test:], targets[test:])


def count_train(num_examples: int, test_fraction: Fraction = TEST_FRACTION) -> int:
    """A client's examples without the share to be scored on, rounded down, but at least one on each side of the cut."""
    share = 1 - test_fraction
    return min(max(num_examples * share.numerator // share.denominator, 1), num_examples - 1)


def _too_small(clients: RawClients, smallest: int) -> Sequence[int]:
    """The clients without an example in each part."""
    if clients.train_counts is None:
        return clients.smaller_than(smallest)
    return [client for client, count in enumerate(clients.train_counts) if not 0 < count < clients.num_examples(client)]


def _smallest_client(overlap: int, test_fraction: Fraction) -> int:
    """The fewest examples at which both parts have one: the share to be scored on, rounded up, must exceed what is
    dropped."""
    return max(overlap + 2, int(overlap / test_fraction) + 1)


def _without(client_ids: range, left_out: set[int]) -> Sequence[int]:
    """The range itself where nothing is left out, because it may be long."""
    return client_ids if not left_out else [client_id for client_id in client_ids if client_id not in left_out]
