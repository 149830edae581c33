"""How many clients are trained at once: chosen once, before any work, because it changes how sums are rounded.

A round's clients are cut into groups of that size, the largest first, and groups are handed out. With `auto`

- on GPUs, the round's clients are shared out evenly among all training slots, as far as memory allows. So the model
  depends, by rounding, on the number of GPUs and their memory at the run's start;
- where a process trains on a CPU, a group is one client, but a few for tiny models, whatever the number of processes;
- models that cannot be trained together, such as recurrent ones and those with BatchNorm, are trained one client at a
  time, which is said where they would have been.

The number is recorded in config.json: a run that is resumed keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from perfedavg.contracts import FederatedDataset, example_data
from perfedavg.settings import ExperimentConfig, Phase, flag
from perfedavg.terminal.console import say
from perfedavg.training.client_models import Batch
from perfedavg.training.compute import ComputeDevice
from perfedavg.training.flat_model import flatten
from perfedavg.training.local_training import local_training_of, loss_of
from perfedavg.training.memory import group_memory_bytes
from perfedavg.training.stacked_model import StackedModel

TINY_MODEL = 10_000
"""Parameters up to which a CPU trains clients together: there, what a step computes costs less than to start it."""
TINY_MODEL_CLIENTS = 5
"""The most of them in a group. Larger groups take less time each, but leave workers and threads without any."""
MEMORY_SHARE = 0.5
"""Of a GPU's memory for a group. The rest is for libraries' workspaces, the sum, and other processes."""
TRIED_EXAMPLES = 2
"""On which it is tried whether a model can be trained for several clients at once."""
SIZED_CLIENTS = 1000
"""Clients among which the largest is looked for. A data set may have a million."""


def choose_group_size(
    config: ExperimentConfig, model: nn.Module, dataset: FederatedDataset, devices: Sequence[ComputeDevice]
) -> ExperimentConfig:
    """The configuration with `client_batching` as a number. devices: one for each process that trains."""
    if config.client_batching is not None:
        return config
    is_gpu = all(device.kind == "cuda" for device in devices)
    num_parameters = flatten(model).numel()
    if not is_gpu and num_parameters > TINY_MODEL:
        return replace(config, client_batching=1)
    obstacle = _obstacle_to_groups(model, dataset, "meta" if is_gpu else "cpu")
    if obstacle is not None:
        say(f"{flag('client_batching')} auto trains one client at a time: {obstacle}")
        return replace(config, client_batching=1)
    if not is_gpu:
        return replace(config, client_batching=min(TINY_MODEL_CLIENTS, num_groups(config.cohort_size, 2)))
    share = num_groups(config.cohort_size, sum(device.num_slots for device in devices))
    bytes_a_client = _bytes_a_client(config, model, dataset)
    fitting = min(device.memory_bytes * MEMORY_SHARE / device.num_slots // bytes_a_client for device in devices)
    return replace(config, client_batching=max(1, min(share, int(fitting))))


def num_groups(num_clients: int, group_size: int) -> int:
    """Into how many groups so many clients are cut."""
    return math.ceil(num_clients / group_size)


def say_idle_slots(config: ExperimentConfig, num_slots: int) -> None:
    """Say it where a round has fewer groups than there are training slots, so that some have no work."""
    assert config.client_batching is not None, "it is settled"
    groups = num_groups(config.cohort_size, config.client_batching)
    if groups >= num_slots:
        return
    size = "1 client" if config.client_batching == 1 else f"up to {config.client_batching} clients"
    advice = "" if config.joint else f"; a higher {flag('cohort_size')} gives more of them work"
    say(
        f"a round's {config.cohort_size} client(s) are trained in {groups} group(s) of {size}, so that "
        f"{num_slots - groups} of {num_slots} training slots have no work{advice}"
    )


def default_num_slots(config: ExperimentConfig, device_kind: str, num_cores: int) -> int:
    """Training slots of a process (see `LocalExecutor`) that has so many cores for itself: one each.

    A GPU that trains groups gets one: they fill it, and each further slot would take a group's memory.
    """
    if device_kind == "cuda" and config.client_batching != 1:
        return 1
    return max(1, num_cores)


def _obstacle_to_groups(model: nn.Module, dataset: FederatedDataset, device: str) -> str | None:
    """Why clients cannot be trained together, as a step on a few examples shows; None where they can."""
    data = example_data(dataset)
    inputs, labels = (part[None, :TRIED_EXAMPLES].to(device) for part in (data.train_inputs, data.train_labels))
    size = labels.shape[1]
    try:
        stacked = StackedModel(model, 1, device, loss_function=loss_of(dataset))
        stacked.differentiate(Batch(inputs, labels, [size], torch.tensor([size], device=device), [size]))
    except Exception as error:  # whatever a user's model raises where its operations have no rule for groups
        return str(error).partition("\n")[0].partition(";")[0]
    return None


def _bytes_a_client(config: ExperimentConfig, model: nn.Module, dataset: FederatedDataset) -> int:
    """The most that a client of a group takes in any phase."""
    sized = dataset.train_client_ids[:SIZED_CLIENTS]
    largest = dataset.client_data(max(sized, key=dataset.num_train_examples))
    inputs, labels, loss_function = largest.train_inputs, largest.train_labels, loss_of(dataset)

    def bytes_in(phase: Phase) -> int:
        training = local_training_of(config, phase)

        def bytes_of_step(batch_size: int) -> int:
            return group_memory_bytes(model, inputs, labels, replace(training, batch_size=batch_size), loss_function)

        return config.phases[phase].method.bytes_per_client(bytes_of_step, training, len(labels))

    return max(map(bytes_in, config.phases))
