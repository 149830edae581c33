"""Numbers at the edge of their flags: one line that says what is allowed, or a run that ends; never a traceback."""

from __future__ import annotations

import pytest
import torch
from helpers import digits_dataset, make_config

import personalize
import utils
from launch.flags import parse
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.tasks import CohortTask, ScoringTask
from perfedavg.settings import HIGHEST_RATE, OPTIMIZERS, OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.flat_model import flatten

HUGE = str(10**30)


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        *((flag, HUGE, " to 2147483647") for flag in ("--batch_size", "--rounds", "--local_epochs")),
        *(
            (flag, HUGE, " to 2147483647")
            for flag in ("--local_steps", "--personalization_epochs", "--personalization_curve")
        ),
        *((flag, HUGE, " to 2147483647") for flag in ("--eval_every", "--eval_clients")),
        ("--fine_tune_rounds", HUGE, " to 2147483647"),
        ("--fine_tune_local_epochs", HUGE, " to 2147483647"),
        ("--local_lr", "1e38", "at most 1e+30"),
        ("--server_lr", "1e308", "at most 1e+30"),
        ("--fine_tune_local_lr", "3e30", "at most 1e+30"),
        ("--fine_tune_server_lr", "1e39", "at most 1e+30"),
        ("--seed", str(2**63), "must be a whole number from 0"),
    ],
)
def test_settings_beyond_what_can_be_computed_with_are_refused(flag: str, value: str, allowed: str) -> None:
    """torch takes no batch size of 65 bits and no step beyond float32; it says so in the middle of a round."""
    with pytest.raises(ValueError, match=f"{flag} .*{allowed.replace('+', '[+]')}"):
        utils.get_args("single", ["--dataset", "digits", flag, value])


@pytest.mark.parametrize(
    ("role", "flag", "value", "highest"),
    [
        ("server", "--join_timeout_seconds", "1000000000000", 2_000_000),
        ("server", "--worker_timeout_seconds", "1000000000000", 2_000_000),
        ("server", "--worker_wait_seconds", "2000001", 2_000_000),
        ("worker", "--join_timeout_seconds", HUGE, 2_000_000),
        ("worker", "--server_wait_seconds", "1000000000000", 2_000_000),
        ("single", "--threads", "1000000", 1024),
        ("single", "--checkpoint_every", HUGE, 2**31 - 1),
        ("quick_start", "--workers", HUGE, 2**31 - 1),
        ("server", "--port", "65536", 65535),
    ],
)
def test_waits_and_counts_of_the_machine_are_refused_by_the_command_line(
    role: str, flag: str, value: str, highest: int
) -> None:
    """A wait of 10^12 s overflows in the middle of a run; a million threads take a million copies of the model."""
    rank = ["--rank", "1"] if role == "worker" else []
    with pytest.raises(ValueError, match=f"^{flag} {value} must be a whole number from 1 to {highest}$"):
        utils.get_args(role, [*rank, flag, value])


@pytest.mark.parametrize("text", ["1e-999999999", "1e999999999", "0." + "0" * 100 + "1", "2/1", "0/0", "nan"])
def test_a_share_that_takes_all_memory_is_refused_at_once(text: str) -> None:
    """As an exact fraction, ten to the power of a billion has a billion digits."""
    with pytest.raises(ValueError, match=r"^--test_fraction .* must be above 0 and below 1"):
        parse(personalize.Personalize, ["run", "images", "--test_fraction", text])


@pytest.mark.parametrize("rate", [1e-320, HIGHEST_RATE])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("client_batching", [1, 3])
def test_the_outermost_learning_rates_train(name: str, rate: float, client_batching: int) -> None:
    """The highest makes updates that are refused, the lowest none at all; neither is an error."""
    optimizer = OptimizerConfig(name, rate)
    fedavg = PhaseConfig(1, 2, optimizer, OptimizerConfig("sgd", 1.0))
    config = make_config(fedavg=fedavg, fine_tune=None, batch_size=2**31 - 1, client_batching=client_batching)
    dataset = digits_dataset(20)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    executor = LocalExecutor(config, model, dataset)
    clients = tuple(dataset.train_client_ids[:3])
    capacity = sum(map(dataset.num_train_examples, clients))
    update = executor.train(CohortTask(Phase.FEDAVG, 1, clients, capacity), flatten(model))
    assert len(update.reports) == 3
    assert all((report.refused is None) == (rate < 1) for report in update.reports)
    unseen = tuple(dataset.unseen_client_ids)
    assert len(executor.score(ScoringTask(Phase.FEDAVG, 1, unseen), flatten(model))) == len(unseen)
