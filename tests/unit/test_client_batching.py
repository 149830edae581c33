"""How many clients are trained at once must follow from the experiment and the devices, not from their number."""

from __future__ import annotations

import pytest
from helpers import digits_dataset, make_config
from torch import nn

from models import build_model
from perfedavg.client_batching import TINY_MODEL_CLIENTS, default_num_lanes, settle_client_batching
from perfedavg.compute import ComputeDevice
from perfedavg.executor import LocalExecutor

CPU = ComputeDevice("cpu", 0)
AUTO = make_config(cohort_size=16, client_batching=None)


def gpu(memory_bytes: int) -> ComputeDevice:
    return ComputeDevice("cuda", memory_bytes)


def settled(model: nn.Module, *devices: ComputeDevice) -> int:
    batching = settle_client_batching(AUTO, model, digits_dataset(20), devices).client_batching
    assert batching is not None
    return batching


def test_what_the_user_says_stands() -> None:
    config = make_config(client_batching=3)
    for device in (CPU, gpu(0)):
        assert settle_client_batching(config, nn.Linear(1, 1), digits_dataset(20), [device]) == config


def test_a_cpu_trains_only_tiny_models_together() -> None:
    assert settled(build_model("mnist_cnn", 10), CPU) == 1
    assert settled(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), CPU) == TINY_MODEL_CLIENTS
    assert settled(build_model("mnist_cnn", 10), gpu(10**12), CPU) == 1, "one worker on a CPU is one too many"


def test_a_gpu_gets_as_many_as_fit_the_smallest_whatever_their_number() -> None:
    model = build_model("mnist_cnn", 10)
    assert settled(model, gpu(10**12)) == AUTO.cohort_size
    few = settled(model, gpu(100 * 2**20))
    assert 1 < few < AUTO.cohort_size
    assert settled(model, gpu(10**12), gpu(100 * 2**20)) == few
    assert settled(model, *[gpu(100 * 2**20)] * 4) == few
    assert settled(model, gpu(1)) == 1, "even where none fits, one is tried"


def test_an_executor_asks_for_a_number_and_for_a_model_that_can_be_stacked() -> None:
    with pytest.raises(ValueError, match="has not been settled"):
        LocalExecutor(AUTO, nn.Linear(1, 1), digits_dataset(20))
    with pytest.raises(ValueError, match="LSTM cannot be trained many at once, nor by maml; use --client_batching 1"):
        LocalExecutor(make_config(client_batching=2), build_model("lstm", 80), digits_dataset(20))


def test_a_gpu_trains_one_group_at_a_time_and_a_cpu_one_client_a_core() -> None:
    alone, together = make_config(client_batching=1), make_config(client_batching=4)
    assert [default_num_lanes(alone, "cpu", cores) for cores in (0, 1, 8)] == [1, 1, 8]
    assert [default_num_lanes(together, kind, 8) for kind in ("cpu", "cuda")] == [8, 1]
