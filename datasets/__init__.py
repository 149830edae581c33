"""Data sets: where examples come from (`sources`), which client has which (`clients`), and the names of all of them."""

from datasets.registry import DatasetRequest, load_federated_dataset

__all__ = ["DatasetRequest", "load_federated_dataset"]
