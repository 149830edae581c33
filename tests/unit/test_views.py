"""The same data seen otherwise: a choice of settings must not see the unseen, and joint training must see all else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import Examples, QuadraticClients, digits_dataset
from torch import Tensor

import utils
from datasets.clients.split import SplitDataset
from datasets.clients.views import JointView, ValidationView
from perfedavg.training.local_training import loss_of

PARTS = ("train_inputs", "train_labels", "test_inputs", "test_labels")


@cache
def digits() -> SplitDataset:
    """16 training clients and 4 unseen ones."""
    return digits_dataset(20)


def validation() -> ValidationView:
    return ValidationView(digits(), num_scored=3)


def assert_same_data(one: Examples, other: Examples) -> None:
    for part in PARTS:
        assert torch.equal(getattr(one, part), getattr(other, part))


def test_validation_scores_training_clients_and_nobody_who_is_unseen() -> None:
    """Else what is chosen by it would be chosen on the clients that the result is reported of."""
    view = validation()
    assert list(view.train_client_ids) == list(range(13))
    assert list(view.unseen_client_ids) == list(range(13, 16))
    assert not {*view.train_client_ids, *view.unseen_client_ids} & set(digits().unseen_client_ids)


def test_a_client_is_the_same_in_every_view() -> None:
    """Of the joint one, the clients that are scored."""
    view = validation()
    for client_id in (*view.train_client_ids, *view.unseen_client_ids):
        assert_same_data(view.client_data(client_id), digits().client_data(client_id))
        assert view.num_train_examples(client_id) == digits().num_train_examples(client_id)
    joint = JointView(digits())
    assert joint.unseen_client_ids == digits().unseen_client_ids
    for client_id in joint.unseen_client_ids:
        assert_same_data(joint.client_data(client_id), digits().client_data(client_id))
        assert joint.num_train_examples(client_id) == digits().num_train_examples(client_id)


@pytest.mark.parametrize("num_scored", [16, 17])
def test_validation_leaves_somebody_to_train(num_scored: int) -> None:
    with pytest.raises(
        ValueError, match=rf"--validation true holds {num_scored} of 16 training clients out.*use more clients"
    ):
        ValidationView(digits(), num_scored)
    assert list(ValidationView(digits(), 15).train_client_ids) == [0]


def test_fingerprints_tell_the_views_apart() -> None:
    """A run must not go on with the data seen otherwise, nor a worker join with them."""
    views = [digits(), validation(), JointView(digits()), JointView(validation())]
    assert len({view.fingerprint for view in views}) == 4
    assert validation().fingerprint == validation().fingerprint
    assert ValidationView(digits_dataset(20, seed=1), 3).fingerprint != validation().fingerprint


@pytest.mark.parametrize("base", [digits, validation], ids=["all", "without the validation clients"])
def test_the_joint_client_has_every_training_example_once_and_no_other(base: object) -> None:
    dataset = base()
    view = JointView(dataset)
    (client_id,) = view.train_client_ids
    assert client_id in dataset.train_client_ids
    assert client_id not in view.unseen_client_ids
    data = view.client_data(client_id)
    parts = [dataset.client_data(member) for member in dataset.train_client_ids]
    assert torch.equal(data.train_inputs, torch.cat([part.train_inputs for part in parts]))
    assert torch.equal(data.train_labels, torch.cat([part.train_labels for part in parts]))
    assert view.num_train_examples(client_id) == len(data.train_labels) > 900
    assert len(data.test_inputs) == len(data.test_labels) == 0


def test_the_joint_client_is_pooled_once_whoever_asks() -> None:
    view = JointView(digits())
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(view.client_data, [view.train_client_ids[0]] * 8))
    assert all(answer is answers[0] for answer in answers)


class WithOwnLoss(QuadraticClients):
    """A data set that brings its loss and its name."""

    name = "own"

    @staticmethod
    def loss_function(outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.sum() + labels.sum()


def with_own_loss() -> WithOwnLoss:
    return WithOwnLoss([[1.0], [2.0], [3.0], [4.0]], (3, 4, 5, 6), num_unseen=1)


@pytest.mark.parametrize("view_of", [partial(ValidationView, num_scored=1), JointView], ids=["validation", "joint"])
def test_all_else_is_the_data_sets_own(view_of: object) -> None:
    """Its classes, its loss; and what it has not, it has not in a view either."""
    view, own = view_of(digits()), view_of(with_own_loss())
    assert (view.num_classes, view.name, view.class_names) == (10, "digits", digits().class_names)
    assert loss_of(view) is F.cross_entropy
    assert loss_of(own) is WithOwnLoss.loss_function
    assert not hasattr(view, "build_model")
    assert copy.copy(view).num_classes == 10


def seen(flags: Sequence[str], folder: Path) -> SplitDataset:
    given = ["--client_num_in_total", "20", "--unseen_fraction", "1/51" if "sine" in flags else "0.2", *flags]
    config = utils.get_args("single", given).experiment
    return utils.get_datasets(config, folder)


def test_flags_give_the_views(tmp_path: Path) -> None:
    """--validation holds as large a share of the training clients out as there are unseen among all."""
    base, one = ["--dataset", "digits"], ["--client_num_per_round", "1"]
    plain, held_out = seen(base, tmp_path), seen([*base, "--validation"], tmp_path)
    assert len(plain.train_client_ids) == 16
    assert (list(held_out.train_client_ids), list(held_out.unseen_client_ids)) == ([*range(13)], [13, 14, 15])
    joint = seen([*base, *one, "--joint"], tmp_path)
    assert (len(joint.train_client_ids), list(joint.unseen_client_ids)) == (1, [16, 17, 18, 19])
    both = seen([*base, *one, "--joint", "--validation"], tmp_path)
    assert (len(both.train_client_ids), list(both.unseen_client_ids)) == (1, [13, 14, 15])
    (client_id,) = both.train_client_ids
    assert both.num_train_examples(client_id) == sum(map(plain.num_train_examples, range(13)))


def test_sine_has_no_validation_clients(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--validation true .* sine"):
        seen(["--dataset", "sine", "--client_num_in_total", "51", "--validation"], tmp_path)


def test_the_joint_flag_asks_for_one_client_a_round(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--client_num_per_round 5 exceeds the 1 training clients"):
        seen(["--dataset", "digits", "--client_num_per_round", "5", "--joint"], tmp_path)


def test_tail_reaches_the_data(tmp_path: Path) -> None:
    dataset = seen(["--dataset", "digits", "--local_split", "tail"], tmp_path)
    data = dataset.client_data(0)
    assert data.train_labels.max() <= data.test_labels.min()
