"""How many clients are trained at once: settled once, before any work, because it changes how sums are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from perfedavg.client_data import FederatedDataset
from perfedavg.compute import ComputeDevice
from perfedavg.config import ExperimentConfig, Phase
from perfedavg.group_training import group_memory_bytes
from perfedavg.local_training import local_training_of, loss_of

TINY_MODEL = 10_000
"""Parameters up to which a CPU trains clients faster together than one by one (`benchmarks/gpu.py --device cpu`)."""
TINY_MODEL_CLIENTS = 20
MEMORY_SHARE = 0.5
"""Of a GPU's memory for a group. The rest is for libraries' workspaces, the sum, and other processes."""
SIZED_CLIENTS = 1000
"""Clients among which the largest is looked for. A data set may have a million."""


def settle_client_batching(
    config: ExperimentConfig, model: nn.Module, dataset: FederatedDataset, devices: Sequence[ComputeDevice]
) -> ExperimentConfig:
    """The configuration with `client_batching` as a number: the user's, or else one that suits all of the devices.

    devices: those of all processes that train. Their number does not matter, so that it does not change the model.
    """
    if config.client_batching is not None:
        return config
    if all(device.kind == "cuda" for device in devices):
        fitting = (
            min(device.memory_bytes for device in devices) * MEMORY_SHARE // _bytes_a_client(config, model, dataset)
        )
        return replace(config, client_batching=max(1, min(config.cohort_size, int(fitting))))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return replace(config, client_batching=TINY_MODEL_CLIENTS if num_parameters <= TINY_MODEL else 1)


def default_num_lanes(config: ExperimentConfig, device_kind: str, num_cores: int) -> int:
    """Lanes of a process (see `LocalExecutor`) that has so many cores for itself: one each.

    A GPU that trains groups gets one: they fill it, and each further lane would take a group's memory.
    """
    if device_kind == "cuda" and config.client_batching != 1:
        return 1
    return max(1, num_cores)


def _bytes_a_client(config: ExperimentConfig, model: nn.Module, dataset: FederatedDataset) -> int:
    """The most that a client of a group takes in any phase."""
    sized = dataset.train_client_ids[:SIZED_CLIENTS]
    largest = dataset.client_data(max(sized, key=dataset.num_train_examples))
    inputs, labels, loss_function = largest.train_inputs, largest.train_labels, loss_of(dataset)

    def bytes_in(phase: Phase) -> int:
        training = local_training_of(config, phase)
        # What MAML differentiates through, it keeps.
        num_kept = 1 + training.count_steps(len(labels)) if config.phases[phase].method == "maml" else 1
        return num_kept * group_memory_bytes(model, inputs, labels, training, loss_function)

    return max(map(bytes_in, config.phases))
