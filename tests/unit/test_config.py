"""Bad settings are refused before anything starts, with the flag, its value and the fix."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from helpers import make_config

from perfedavg.methods.fomaml import FOMAML
from perfedavg.methods.maml import MAML
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig, num_unseen_clients

SGD = OptimizerConfig("sgd", 0.1)


def test_survives_json() -> None:
    maml = PhaseConfig(3, 1, SGD, SGD, num_local_steps=2, method=MAML(0.3))
    for config in (make_config(), make_config(fine_tune=None), make_config(fine_tune=maml)):
        assert ExperimentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fraction", "num_clients", "unseen"),
    [("0.2", 3400, 680), ("9/34", 3400, 900), ("0.25", 3, 1), ("0.01", 7, 1), ("1/3", 100, 33), ("0.0", 7, 0)],
)
def test_a_share_of_the_clients_is_unseen_but_one_at_least(fraction: str, num_clients: int, unseen: int) -> None:
    """Natural clients come in any number, so the share is rounded."""
    assert num_unseen_clients(num_clients, fraction) == unseen


def test_natural_clients_are_checked_once_their_number_is_known() -> None:
    config = make_config(num_clients=None, cohort_size=30)
    config.check_cohort_size(30)
    with pytest.raises(ValueError, match="--client_num_per_round 30 exceeds the 29 training clients"):
        config.check_cohort_size(29)


def test_a_phase_without_rounds_is_left_out_unless_it_is_the_only_one() -> None:
    none = PhaseConfig(0, 1, SGD, SGD)
    assert list(make_config(fedavg=none).phases) == [Phase.FINE_TUNE]
    assert list(make_config(fedavg=none, fine_tune=None).phases) == [Phase.FEDAVG]


def test_a_linear_schedule_falls_from_the_full_rate_towards_none() -> None:
    phase = PhaseConfig(4, 1, SGD, SGD, server_schedule="linear")
    assert [phase.server_rate_factor(number) for number in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"cohort_size": 17}, ["--client_num_per_round 17", "16 training clients", "lower it to 16"]),
        ({"num_clients": 7}, ["--client_num_in_total 7", "multiple of 5", "5 or 10"]),
        ({"num_clients": 3}, ["--client_num_in_total 3", "such as 5"]),
        ({"num_clients": 20, "unseen_fraction": "1/3"}, ["--client_num_in_total 20", "multiple of 3", "18 or 21"]),
        ({"unseen_fraction": "1.0"}, ["--unseen_fraction 1.0", "below 1"]),
        ({"unseen_fraction": "-0.1"}, ["--unseen_fraction -0.1", "must be 0, or above 0 and below 1"]),
        ({"local_test_fraction": "0"}, ["--local_test_fraction 0", "above 0 and below 1"]),
        ({"unseen_fraction": "1/0"}, ["--unseen_fraction 1/0"]),
        ({"unseen_fraction": "few"}, ["--unseen_fraction few"]),
        ({"num_clients": 0}, ["--client_num_in_total 0"]),
        ({"cohort_size": 0}, ["--client_num_per_round 0"]),
        ({"batch_size": 0}, ["--batch_size 0"]),
        ({"seed": -1}, ["--seed -1"]),
        ({"num_personalization_epochs": 0}, ["--personalization_epochs 0"]),
        ({"eval_every": 0}, ["--eval_every 0"]),
        ({"eval_clients": 0}, ["--eval_clients 0"]),
        ({"fedavg": PhaseConfig(-1, 1, SGD, SGD)}, ["--rounds -1"]),
        ({"fedavg": PhaseConfig(1, 1, SGD, SGD, num_local_steps=0)}, ["--local_steps 0"]),
        ({"num_curve_epochs": -1}, ["--personalization_curve -1"]),
        ({"local_split": "head"}, ["--local_split head", "shuffled, tail"]),
        ({"joint": True, "cohort_size": 2}, ["--client_num_per_round 2", "1 training clients"]),
        ({"fedavg": PhaseConfig(1, 0, SGD, SGD)}, ["--local_epochs 0"]),
        ({"fedavg": PhaseConfig(1, 1, OptimizerConfig("sgd", 0.0), SGD)}, ["--local_lr 0.0"]),
        ({"fedavg": PhaseConfig(1, 1, SGD, OptimizerConfig("sgd", float("nan")))}, ["--server_lr nan"]),
        ({"fedavg": PhaseConfig(1, 1, SGD, OptimizerConfig("momentum", 1.0, momentum=1.0))}, ["--server_momentum 1.0"]),
        (
            {"fedavg": PhaseConfig(1, 1, OptimizerConfig("lamb", 0.1), SGD)},
            ["--client_optimizer lamb", "sgd, momentum, adam"],
        ),
        ({"fine_tune": PhaseConfig(0, 1, SGD, SGD)}, ["--fine_tune_rounds 0"]),
        ({"fine_tune": PhaseConfig(1, 0, SGD, SGD)}, ["--fine_tune_local_epochs 0"]),
        ({"fine_tune": PhaseConfig(1, 1, SGD, SGD, num_local_steps=0)}, ["--fine_tune_local_steps 0"]),
        ({"fine_tune": PhaseConfig(1, 1, SGD, SGD, server_schedule="cosine")}, ["--fine_tune_server_schedule"]),
        ({"fine_tune": PhaseConfig(1, 1, SGD, SGD, method=FOMAML(0.0))}, ["--fine_tune_support_fraction 0.0"]),
        (
            {"fine_tune": PhaseConfig(1, 1, OptimizerConfig("adam", 0.1), SGD, method=MAML())},
            ["--fine_tune_method maml", "--fine_tune_client_optimizer adam", "use sgd"],
        ),
        (
            {"fine_tune": PhaseConfig(1, 1, SGD, OptimizerConfig("adam", 0.1, epsilon=0.0))},
            ["--fine_tune_server_epsilon 0.0"],
        ),
        ({"fine_tune": PhaseConfig(1, 1, OptimizerConfig("adam", -1.0), SGD)}, ["--fine_tune_local_lr -1.0"]),
        ({"fine_tune": PhaseConfig(1, 1, SGD, OptimizerConfig("adam", 0.0))}, ["--fine_tune_server_lr 0.0"]),
    ],
)
def test_refuses_with_the_value_and_the_fix(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as refusal:
        dataclasses.replace(make_config(), **changes)
    for part in parts:
        assert part in str(refusal.value)
