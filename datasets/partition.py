"""How examples are dealt out to clients. Each function returns, for every client, the indices of its examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from fedlab.utils.dataset.functional import shards_partition
from numpy.typing import NDArray

SHARDS_PER_CLIENT = 2


def label_shards(
    labels: NDArray[np.int64], num_clients: int, stream: np.random.SeedSequence
) -> list[NDArray[np.int64]]:
    """Sort by label, cut into two shards a client, deal the shards out at random (McMahan et al. 2017).

    labels: (num_examples,). Nothing is lost and nothing dealt twice; sizes of shards differ by one at most.

    FedLab's `shards_partition` deals, but not the examples themselves: it drops those that do not fill a shard, and
    sorts by an algorithm whose order among equal labels depends on the processor.
    """
    num_shards = SHARDS_PER_CLIENT * num_clients
    shards = np.array_split(np.argsort(labels, kind="stable"), num_shards)
    with _global_numpy_seed(stream):
        dealt = shards_partition(np.arange(num_shards), num_clients, num_shards)
    return [np.concatenate([shards[shard] for shard in dealt[client]]) for client in range(num_clients)]


@contextmanager
def _global_numpy_seed(stream: np.random.SeedSequence) -> Iterator[None]:
    """Seed numpy's global generator, which FedLab's functions read, and put it back as it was."""
    state = np.random.get_state()
    np.random.seed(stream.generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)
