"""How many clients are trained at once: on GPUs so many that all of them have work; on CPUs whatever their number."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import digits_dataset, make_config
from torch import nn

from models import build_model
from perfedavg.engine.executor import LocalExecutor
from perfedavg.methods import METHODS
from perfedavg.settings import OptimizerConfig, PhaseConfig
from perfedavg.training.client_batching import (
    TINY_MODEL_CLIENTS,
    choose_group_size,
    default_num_slots,
    num_groups,
    say_idle_slots,
)
from perfedavg.training.compute import ComputeDevice

CPU = ComputeDevice("cpu", 0)
AUTO = make_config(cohort_size=16, client_batching=None)


def gpu(memory_bytes: int) -> ComputeDevice:
    return ComputeDevice("cuda", memory_bytes)


def settled(model: nn.Module, *devices: ComputeDevice) -> int:
    batching = choose_group_size(AUTO, model, digits_dataset(20), devices).client_batching
    assert batching is not None
    return batching


def test_what_the_user_says_stands() -> None:
    config = make_config(client_batching=3)
    for device in (CPU, gpu(0)):
        assert choose_group_size(config, nn.Linear(1, 1), digits_dataset(20), [device]) == config


def test_a_cpu_trains_only_tiny_models_together() -> None:
    model = build_model("mnist_cnn", (1, 28, 28), 10)
    assert settled(model, CPU) == 1
    assert settled(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), CPU) == TINY_MODEL_CLIENTS
    assert settled(model, gpu(10**12), CPU) == 1, "one worker on a CPU is one too many"


def test_a_gpu_gets_its_share_as_far_as_it_fits_the_smallest() -> None:
    """Were a group the whole round, one GPU would train it and all others would idle, in every round."""
    model = build_model("mnist_cnn", (1, 28, 28), 10)
    assert [settled(model, *[gpu(10**12)] * number) for number in (1, 2, 4, 5, 16, 20)] == [16, 8, 4, 4, 1, 1]
    for number in (1, 2, 4, 8, 16):
        groups = num_groups(AUTO.cohort_size, settled(model, *[gpu(10**12)] * number))
        assert groups == number, "each has a group"
    few = settled(model, gpu(100 * 2**20))
    assert 1 < few < AUTO.cohort_size
    assert settled(model, gpu(10**12), gpu(100 * 2**20)) == few
    assert settled(model, *[gpu(100 * 2**20)] * 2) == few, "what fits is less than a share"
    assert settled(model, gpu(1)) == 1, "even where none fits, one is tried"


def test_a_model_that_cannot_be_trained_together_is_trained_one_by_one() -> None:
    """Else a GPU would refuse Shakespeare, and say that a flag which the user has not given is wrong."""
    assert settled(build_model("lstm", (80,), 80), gpu(10**12)) == 1


class Counting(nn.Module):
    """Moves a buffer, for which there is no rule in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)
        self.register_buffer("mean", torch.zeros(784))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(0.1 * inputs.detach().flatten(1).mean(0))
        outputs: torch.Tensor = self.linear(inputs.flatten(1) - self.mean)
        return outputs


@pytest.mark.parametrize(
    ("model", "obstacle"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10)), "BatchNorm1d mixes the examples"),
        (
            nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784, track_running_stats=False), nn.Linear(784, 10)),
            "BatchNorm1d mixes the examples of a batch, so it cannot be trained many at once",
        ),
        (Counting(), "would mutate a captured Tensor"),
    ],
)
def test_auto_says_why_it_trains_one_by_one(
    model: nn.Module, obstacle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused only where a number is asked for."""
    for device in (CPU, gpu(10**12)):
        assert settled(model, device) == 1
        line = capsys.readouterr().err
        assert line.startswith("--client_batching auto trains one client at a time: ")
        assert obstacle in line
        assert "use --client_batching" not in line
    assert settled(build_model("mlp", (1, 28, 28), 10), CPU) == 1
    assert capsys.readouterr().err == "", "too large for groups anyway"


def test_groups_side_by_side_on_a_gpu_share_clients_and_memory() -> None:
    """With --threads, a process has several groups on its GPU at once."""
    model = build_model("mnist_cnn", (1, 28, 28), 10)
    assert settled(model, ComputeDevice("cuda", 10**12, 4)) == 4
    few = settled(model, gpu(100 * 2**20))
    assert settled(model, ComputeDevice("cuda", 100 * 2**20, 2)) <= few / 2 + 1


def test_what_a_query_takes_counts() -> None:
    """FOMAML differentiates on its whole query part at once, which is many times a batch."""
    model, memory = build_model("mnist_cnn", (1, 28, 28), 10), gpu(200 * 2**20)
    sizes = [
        choose_group_size(
            make_config(cohort_size=16, client_batching=None, batch_size=1, fine_tune=fine_tune(method)),
            model,
            digits_dataset(20),
            [memory],
        ).client_batching
        for method in ("reptile", "fomaml", "maml")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < sizes[0], "else a GPU runs out of memory when the phase begins"


def fine_tune(method: str) -> PhaseConfig:
    sgd = OptimizerConfig("sgd", 0.1)
    return PhaseConfig(2, 1, sgd, sgd, num_local_steps=1, method=METHODS[method]())


@pytest.mark.parametrize("cohort_size", [2, 3, 5, 8, 10, 16])
def test_a_round_of_a_tiny_model_gives_work_to_several(cohort_size: int) -> None:
    """Two at least; with 20 clients four. How many there are is not asked, so the model does not depend on it."""
    config = make_config(cohort_size=cohort_size, client_batching=None)
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    sizes = {
        choose_group_size(config, tiny, digits_dataset(20), [CPU] * number).client_batching for number in (1, 2, 7)
    }
    (size,) = sizes
    assert size is not None
    assert num_groups(cohort_size, size) >= max(2, cohort_size // 5)


def test_slots_without_work_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody may idle silently: a round's groups may be fewer than those who could train them."""
    config = make_config(cohort_size=16, client_batching=8)
    say_idle_slots(config, 2)
    assert capsys.readouterr().err == ""
    say_idle_slots(config, 5)
    said = "16 client(s) are trained in 2 group(s) of up to 8 clients, so that 3 of 5 training slots have no work"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("client_batching", "num_workers", "fix"),
    [
        (None, 5, "raise it to 5"),
        (1, 5, "raise it to 5"),
        (2, 3, "makes 2 group(s) of --client_batching 2, fewer than the 3 workers"),
        (4, 2, "lower --client_batching"),
    ],
)
def test_workers_that_would_never_work_are_refused(client_batching: int | None, num_workers: int, fix: str) -> None:
    config = make_config(cohort_size=4, client_batching=client_batching)
    with pytest.raises(ValueError, match=re.escape(fix)):
        config.check_num_workers(num_workers)
    config.check_num_workers(num_workers - 1)


def test_an_executor_asks_for_a_number_and_for_a_model_that_can_be_stacked() -> None:
    with pytest.raises(ValueError, match="has not been settled"):
        LocalExecutor(AUTO, nn.Linear(1, 1), digits_dataset(20))
    with pytest.raises(ValueError, match=r"LSTM cannot be trained many at once, .*; use --client_batching 1"):
        LocalExecutor(make_config(client_batching=2), build_model("lstm", (80,), 80), digits_dataset(20))


def test_a_gpu_trains_one_group_at_a_time_and_a_cpu_one_client_a_core() -> None:
    alone, together = make_config(client_batching=1), make_config(client_batching=4)
    assert [default_num_slots(alone, "cpu", cores) for cores in (0, 1, 8)] == [1, 1, 8]
    assert [default_num_slots(together, kind, 8) for kind in ("cpu", "cuda")] == [8, 1]
