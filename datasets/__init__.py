"""Data sets, partitions, and the `SplitDataset` that they become."""

from __future__ import annotations

from compat import import_fedlab

import_fedlab("fedlab.utils.dataset.functional")

from datasets.clients.partition import Partition  # noqa: E402
from datasets.clients.partitioned import ImageSplits, PartitionedClients  # noqa: E402
from datasets.clients.split import SplitDataset  # noqa: E402
from datasets.registry import DatasetRequest, load_federated_dataset  # noqa: E402

__all__ = [
    "DatasetRequest",
    "ImageSplits",
    "Partition",
    "PartitionedClients",
    "SplitDataset",
    "load_federated_dataset",
]
