"""Data sets, partitions, and the `FederatedDataset` that everything else reads."""

from __future__ import annotations

from compat import import_fedlab

import_fedlab("fedlab.utils.dataset.functional")

from datasets.clients.split import FederatedDataset  # noqa: E402
from datasets.clients.partition import Partition  # noqa: E402
from datasets.clients.partitioned import ImageSplits, PartitionedClients  # noqa: E402
from datasets.registry import DatasetRequest, load_federated_dataset  # noqa: E402

__all__ = [
    "DatasetRequest",
    "FederatedDataset",
    "ImageSplits",
    "Partition",
    "PartitionedClients",
    "load_federated_dataset",
]
