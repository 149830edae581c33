"""How examples without natural owners are dealt out to clients.

A scheme maps labels to a list with, for every client, the indices of its examples: nothing is lost and nothing dealt
twice. FedLab's functions are used where they keep to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compat import import_fedlab

import_fedlab("fedlab.utils.dataset.functional")

from fedlab.utils.dataset.functional import (  # noqa: E402
    homo_partition,
    label_skew_quantity_based_partition,
    shards_partition,
)

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Labels:
    """values: (num_examples,), each in 0 .. num_classes - 1."""

    values: Indices
    num_classes: int

    def __len__(self) -> int:
        return len(self.values)


def label_shards(labels: Labels, num_clients: int, per_client: float) -> list[Indices]:
    """Sort by label, cut into shards, deal `per_client` of them to each client (McMahan et al. 2017).

    Sizes of shards differ by one at most. FedLab's `shards_partition` deals the shards, but not the examples
    themselves: it drops those that do not fill a shard, and sorts by an algorithm whose order among equal labels
    depends on the processor. Where there are more shards than examples, a shard is one example or none.
    """
    by_label = np.argsort(labels.values, kind="stable")
    shards_each = min(int(per_client), max(1, len(labels)))  # more than all examples is no more
    num_shards = shards_each * num_clients
    if num_shards > len(labels):
        generator = np.random.default_rng(np.random.randint(2**63 - 1))  # the old one would list all shards
        owners = generator.choice(num_shards, len(labels), replace=False) // shards_each
        sizes = np.bincount(owners, minlength=num_clients)
        return np.split(by_label[np.argsort(owners, kind="stable")], np.cumsum(sizes)[:-1])
    shards = np.array_split(by_label, num_shards)
    dealt = shards_partition(np.arange(num_shards), num_clients, num_shards)
    return [np.concatenate([shards[shard] for shard in dealt[client]]) for client in range(num_clients)]


def iid(labels: Labels, num_clients: int, _: float) -> list[Indices]:
    """Equal numbers (they differ by one at most), drawn at random from all examples."""
    sizes = np.full(num_clients, len(labels) // num_clients)
    sizes[: len(labels) % num_clients] += 1
    return _as_list(homo_partition(sizes, len(labels)))


def label_dirichlet(labels: Labels, num_clients: int, alpha: float) -> list[Indices]:
    """Deal each class out in shares drawn from Dirichlet(alpha) over the clients (Hsu et al. 2019).

    The smaller alpha, the fewer classes a client has. FedLab's `hetero_dir_partition` draws again until no client is
    small, which for thousands of clients never happens; here clients may come out small or empty. An alpha beyond what
    floats hold gives its limit: each class to one client at random where it is small, equal shares where it is large.
    """
    parts: list[list[Indices]] = [[np.empty(0, dtype=np.int64)] for _ in range(num_clients)]
    for label in range(labels.num_classes):
        members = np.random.permutation(np.flatnonzero(labels.values == label))
        with np.errstate(invalid="ignore"):
            shares = np.random.dirichlet(np.full(num_clients, alpha))
        if not math.isclose(shares.sum(), 1.0):
            shares = _one_at_random(num_clients) if alpha < 1 else np.full(num_clients, 1 / num_clients)
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for own, part in zip(parts, np.split(members, cuts), strict=True):
            own.append(part)
    return [np.concatenate(own) for own in parts]


def quantity_skew(labels: Labels, num_clients: int, sigma: float) -> list[Indices]:
    """Like `iid`, with sizes from a log-normal distribution whose logarithm has the standard deviation sigma.

    FedLab's `lognormal_unbalance_split`, but that a sigma beyond what floats hold gives its limit: one client has all.
    """
    mean = np.log(max(1, len(labels) // num_clients))
    weights = np.random.lognormal(mean, sigma, num_clients)
    with np.errstate(over="ignore"):
        total = weights.sum()
    shares = weights / total if 0 < total < math.inf else _one_at_random(num_clients)
    sizes = (shares * len(labels)).astype(np.int64)
    excess = sizes.sum() - len(labels)
    if excess:  # what rounding leaves over is the first client's
        sizes[np.flatnonzero(sizes > excess)[0]] -= excess
    return _as_list(homo_partition(sizes, len(labels)))


def labels_per_client(labels: Labels, num_clients: int, count: float) -> list[Indices]:
    """Each client has `count` classes, and each class is shared equally by those who have it (Li et al. 2022).

    Raises ValueError where there are fewer clients than classes, because a class would then belong to nobody.
    """
    num_classes = labels.num_classes
    if count > num_classes or num_clients < num_classes:
        raise ValueError(
            f"--partition labels:{int(count)} needs at least as many clients as the {num_classes} classes, among those "
            f"that train and among unseen ones (here it has {num_clients}), and at most {num_classes} labels a client"
        )
    return _as_list(label_skew_quantity_based_partition(labels.values, num_clients, num_classes, int(count)))


def label_groups(labels: Labels, num_clients: int, count: float) -> list[Indices]:
    """Cut the classes in their order into groups of `count`, the clients into as many, and share each class out equally
    among the clients of its group.

    Clients of a group have the same classes, those of different groups have none in common. It is how benchmarks of
    personalized methods deal out (Zhang et al. 2023, PFLlib, arXiv 2312.04992), but for their unequal amounts.
    Raises ValueError where there are fewer clients than groups.
    """
    num_groups = -(-labels.num_classes // int(count))
    if num_clients < num_groups:
        raise ValueError(
            f"--partition groups:{int(count)} needs at least as many clients as the {num_groups} groups that it makes "
            f"of {labels.num_classes} classes, among those that train and among unseen ones (here it has {num_clients})"
        )
    parts: list[list[Indices]] = [[] for _ in range(num_clients)]
    for group, members in enumerate(np.array_split(np.arange(num_clients), num_groups)):
        for label in range(group * int(count), min((group + 1) * int(count), labels.num_classes)):
            examples = np.random.permutation(np.flatnonzero(labels.values == label))
            for client, part in zip(members.tolist(), np.array_split(examples, len(members)), strict=True):
                parts[client].append(part)
    return [np.concatenate(own) for own in parts]


@dataclass(frozen=True)
class Scheme:
    """A way to deal: deal(labels, num_clients, number) gives the indices of each client's examples.

    letter: what stands for the number in messages; empty for a scheme without one.  whole: whether it must be whole.
    """

    deal: Callable[[Labels, int, float], list[Indices]]
    letter: str = ""
    default: float = 0.0
    whole: bool = False


SCHEMES = {
    "shards": Scheme(label_shards, "N", 2, whole=True),
    "iid": Scheme(iid),
    "dirichlet": Scheme(label_dirichlet, "ALPHA", 0.5),
    "quantity": Scheme(quantity_skew, "SIGMA", 1.0),
    "labels": Scheme(labels_per_client, "N", 2, whole=True),
    "groups": Scheme(label_groups, "N", 2, whole=True),
    "noise": Scheme(iid, "SIGMA", 0.2),
}
"""For the noise itself see `partitioned.PartitionedClients`."""


@dataclass(frozen=True)
class Partition:
    """A scheme and its number."""

    name: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Partition:
        """From `name` or `name:number`. Raises ValueError where it is neither."""
        name, _, number = text.partition(":")
        scheme = SCHEMES.get(name)
        if scheme is None or (number and not scheme.letter):
            usage = ", ".join(f"{name}:{known.letter}".rstrip(":") for name, known in SCHEMES.items())
            raise ValueError(f"--partition {text} is unknown; use {usage}")
        try:
            value = float(number or scheme.default)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (scheme.letter and value <= 0) or (scheme.whole and value % 1):
            kind = "a whole number from 1" if scheme.whole else "a number above 0"
            raise ValueError(f"--partition {text}: what follows the colon must be {kind}")
        return cls(name, value)

    def deal(self, labels: Labels, num_clients: int, stream: np.random.SeedSequence) -> list[Indices]:
        """The indices of each client's examples."""
        with _global_numpy_seed(stream):
            return SCHEMES[self.name].deal(labels, num_clients, self.value)


def _as_list(dealt: dict[int, Indices]) -> list[Indices]:
    return [np.asarray(dealt[client], dtype=np.int64) for client in range(len(dealt))]


def _one_at_random(num_clients: int) -> NDArray[np.float64]:
    """Shares of which one is the whole."""
    shares = np.zeros(num_clients)
    shares[np.random.randint(num_clients)] = 1.0
    return shares


@contextmanager
def _global_numpy_seed(stream: np.random.SeedSequence) -> Iterator[None]:
    """Seed numpy's global generator, and put it back as it was."""
    state = np.random.get_state()
    np.random.seed(stream.generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)
