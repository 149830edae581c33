"""The cut of a client's training part into support, on which it adapts, and query, on which that is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from perfedavg.seeding import torch_seeds
from perfedavg.training.client_models import Client, Query


def cut_clients(clients: Sequence[Client], support_fraction: float) -> tuple[list[Client], list[Query]]:
    """`cut_client` for each."""
    cuts = [cut_client(client, support_fraction) for client in clients]
    return [support for support, _ in cuts], [query for _, query in cuts]


def cut_client(client: Client, support_fraction: float) -> tuple[Client, Query]:
    """Cut a client's examples at random, which follows from its seeds.

    support_fraction: above 0, at most 1; 1 makes all of them both. Each part has at least one example; a single
    example is both.
    """
    cut_seed, query_seed = torch_seeds(client.seeds, 4)[2:]  # the first two are the batch order's and the dropout's
    inputs, labels = client.inputs, client.labels
    num_examples = len(labels)
    if support_fraction == 1 or num_examples == 1:
        return Client(inputs, labels, client.seeds), Query(inputs, labels, query_seed)
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(cut_seed)).to(labels.device)
    cut = min(max(round(num_examples * support_fraction), 1), num_examples - 1)
    support, query = order[:cut], order[cut:]
    return Client(inputs[support], labels[support], client.seeds), Query(inputs[query], labels[query], query_seed)
