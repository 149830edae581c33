"""Metrics by name: their values, whoever computes them, and what is said where they cannot be had."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Difference, QuadraticClients, digits_dataset, half_squared_norm, make_config
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import Tensor, nn

from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import ScoringTask
from perfedavg.metrics import METRICS, Metric, find_metrics
from perfedavg.settings import ExperimentConfig, Phase
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.stacked_model import StackedModel

MACRO_F1 = METRICS["macro_f1"].value_of
OWN = """
from perfedavg.metrics import Metric

def wrong(outputs, labels):
    return (outputs.argmax(dim=1) != labels).double().mean()

error_rate = Metric(wrong, higher_is_better=False)

def broken(outputs, labels):
    return outputs.no_such_thing

def texts(outputs, labels):
    return "much"

constant = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    """Also for classes that are only predicted, or only occur, or do neither."""
    labels, predicted = torch.tensor(pairs).unbind(1)
    expected = f1_score(labels.numpy(), predicted.numpy(), average="macro")
    assert MACRO_F1(nn.functional.one_hot(predicted, 8).float(), labels) == pytest.approx(expected, rel=1e-12)


def test_macro_f1_by_hand() -> None:
    """Labels 0 0 0 1, predicted 0 0 2 1: F1 is 4/5 of class 0, 1 of class 1, 0 of class 2; class 3 is left out."""
    outputs = torch.eye(4)[[0, 0, 2, 1]]
    assert MACRO_F1(outputs, torch.tensor([0, 0, 0, 1])) == pytest.approx((0.8 + 1 + 0) / 3)


def test_macro_f1_of_a_regression_is_no_number() -> None:
    assert math.isnan(float(MACRO_F1(torch.ones(3, 1), torch.ones(3, 1))))


def test_a_metric_is_given_the_whole_test_part() -> None:
    """More examples than are run at a time; in a group, each client's own and none of the padding."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    seen: list[tuple[Tensor, Tensor]] = []

    def note(outputs: Tensor, labels: Tensor) -> float:
        seen.append((outputs, labels))
        return len(labels)

    tests = [(torch.randn(size, 3).double(), torch.randint(4, (size,))) for size in (700, 1, 40)]
    for models, some in ((FlatModel(model), tests[:1]), (StackedModel(model, 3), tests)):
        seen.clear()
        models.load(flatten(model), len(some))
        scores = models.score(some, {"size": Metric(note)})
        assert [score["size"] for score in scores] == [len(labels) for _, labels in some]
        for (outputs, labels), (inputs, expected) in zip(seen, some, strict=True):
            assert torch.equal(labels, expected)
            torch.testing.assert_close(outputs, model(inputs).detach(), rtol=1e-12, atol=1e-12)
        assert [list(score)[:2] for score in scores] == [["loss", "accuracy"]] * len(some)
        plain = models.score(some)
        assert [{**score, **basic} for score, basic in zip(scores, plain, strict=True)] == scores, "to the bit"


def scores_of(config: ExperimentConfig) -> list[ClientScore]:
    dataset = digits_dataset(20)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    executor = LocalExecutor(config, model, dataset)
    task = ScoringTask(Phase.FEDAVG, 1, tuple(dataset.unseen_client_ids), num_curve_epochs=2)
    return sorted(executor.score(task, flatten(model)), key=lambda score: score.client_id)


@pytest.mark.usefixtures("own")
def test_own_and_known_metrics_of_clients() -> None:
    config = make_config(metrics="macro_f1, own_metrics:error_rate", num_curve_epochs=2)
    assert config.metric_names == ("loss", "accuracy", "macro_f1", "error_rate")
    together, plain = scores_of(dataclasses.replace(config, client_batching=3)), scores_of(make_config())
    for score, group, without in zip(scores_of(config), together, plain, strict=True):
        for values in (score.initial, score.personalized, *score.by_epoch):
            assert tuple(values) == config.metric_names
            assert values["error_rate"] == pytest.approx(1 - values["accuracy"])
        assert 0 <= score.personalized["macro_f1"] <= 1
        assert group.personalized == pytest.approx(score.personalized, rel=1e-4)
        assert {name: score.initial[name] for name in ("loss", "accuracy")} == without.initial
    assert find_metrics(config.own_metrics)["error_rate"].higher_is_better is False
    assert find_metrics(["own_metrics:wrong"])["wrong"].higher_is_better is True


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "own_metrics.py, line 10: AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
        ("texts", "ValueError: could not convert string to float: 'much'"),
    ],
)
def test_what_fails_in_an_own_metric_is_one_line(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"--metrics own_metrics:{name}: ") as raised:
        scores_of(make_config(metrics=f"own_metrics:{name}"))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("own")
def test_an_own_metric_that_cannot_be_had() -> None:
    with pytest.raises(ValueError, match="has no constant that is a function of outputs and labels or a perfedavg"):
        find_metrics(["own_metrics:constant"])
    with pytest.raises(ValueError, match="--metrics nowhere:at_all cannot be imported"):
        find_metrics(["nowhere:at_all"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("macro_f2", "--metrics macro_f2 must be macro_f1 or package.module:name for your own; several with commas"),
        ("macro_f1,", None),
        ("macro_f1,macro_f1", "would score by macro_f1 twice; leave one out, or rename yours"),
        ("mine:accuracy", "would score by accuracy twice"),
        ("mine:macro_f1,macro_f1", "would score by macro_f1 twice"),
        ("mine:2 f", "must be macro_f1 or package.module:name"),
        ("loss", "must be macro_f1 or package.module:name"),
    ],
)
def test_names_of_metrics(names: str, said: str | None) -> None:
    """They are columns of clients.csv, so each is one word and there is no second of it."""
    if said is None:
        assert make_config(metrics=names).metric_names[2:] == ("macro_f1",)
        return
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        make_config(metrics=names)


def test_a_regression_has_no_macro_f1() -> None:
    config = make_config(metrics="macro_f1")
    clients = QuadraticClients([[1.0, 0.0], [0.0, 1.0]], (10, 10), num_unseen=1)
    executor = LocalExecutor(config, Difference([2.0, 2.0]), clients, loss_function=half_squared_norm)
    labels = clients.client_data(1).test_labels
    (score,) = executor.score(ScoringTask(Phase.FEDAVG, 1, (1,)), flatten(Difference([2.0, 2.0])))
    is_number = not labels.is_floating_point()
    assert np.isfinite(score.initial["accuracy"]) == np.isfinite(score.initial["macro_f1"]) == is_number
