"""A user's own data set, model and loss: what breaks a rule is one line with the client, the rule and the value."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_config
from torch import Tensor, nn

import utils
from datasets import DatasetRequest, load_federated_dataset
from datasets.clients.split import SplitDataset
from datasets.describe import describe
from models.mlp import MLP
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.tasks import ScoringTask
from perfedavg.training.flat_model import flatten

CLIENT = 2
"""Of those that train; neither the first nor the last."""


class Points:
    """Well-formed: 5 training clients and 2 unseen ones, 6 + 3 points on a line, of 3 classes."""

    num_classes = 3
    fingerprint = "points"
    train_client_ids: Any = range(5)
    unseen_client_ids: Any = range(5, 7)

    def __init__(self, data_root: Path, num_clients: int | None, seed: int) -> None:
        pass

    def num_train_examples(self, client_id: int) -> Any:
        return 6

    def client_data(self, client_id: int) -> Any:
        values = torch.arange(9.0).add(client_id)
        labels = values.long() % 3
        return SimpleNamespace(
            train_inputs=values[:6, None], train_labels=labels[:6], test_inputs=values[6:, None], test_labels=labels[6:]
        )

    def build_model(self) -> Any:
        return nn.Linear(1, 3)


def load(own: type[Points], monkeypatch: pytest.MonkeyPatch) -> SplitDataset:
    """The data set as an entry point reads it."""
    monkeypatch.setattr(sys.modules[__name__], "Given", own, raising=False)
    request = DatasetRequest(f"{__name__}:Given", None, lambda count: 1, None, seed=0)
    return load_federated_dataset(request, Path("nowhere"))


def read_all(own: type[Points], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run does with it, but for the training."""
    dataset = load(own, monkeypatch)
    for client_id in (*dataset.train_client_ids, *dataset.unseen_client_ids):
        dataset.client_data(client_id)
    utils.get_model(make_config(dataset="my:Given", architecture="auto"), dataset)


def with_facts(**facts: Any) -> type[Points]:
    return type("Changed", (Points,), facts)


def with_client(client_id: int, **tensors: Any) -> type[Points]:
    """One client has other parts than the rest."""

    class Changed(Points):
        def client_data(self, asked: int) -> Any:
            data = super().client_data(asked)
            if asked == client_id:
                vars(data).update({name: change(getattr(data, name)) for name, change in tensors.items()})
            return data

    return Changed


def with_model(build: Callable[[], Any]) -> type[Points]:
    return with_facts(build_model=lambda self: build())


def with_loss(loss: Callable[[Tensor, Tensor], Any]) -> type[Points]:
    return with_facts(loss_function=staticmethod(loss))


class OtherEachTime(Points):
    def client_data(self, client_id: int) -> Any:
        data = super().client_data(client_id)
        data.train_inputs = torch.rand(6, 1)
        return data


class FailingClient(Points):
    def client_data(self, client_id: int) -> Any:
        if client_id == CLIENT:
            raise KeyError("client_2.csv")
        return super().client_data(client_id)


class FailingFactory(Points):
    def __init__(self, data_root: Path, num_clients: int | None, seed: int) -> None:
        raise RuntimeError("no such table")


class InTheWrongPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).view(7, 3)


def frozen() -> nn.Module:
    return nn.Linear(1, 3).requires_grad_(False)


def not_finite() -> nn.Module:
    model = nn.Linear(1, 3)
    nn.init.constant_(model.weight, float("nan"))
    return model


def test_a_well_formed_one_passes_and_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    read_all(Points, monkeypatch)
    dataset = load(Points, monkeypatch)
    assert (list(dataset.train_client_ids), list(dataset.unseen_client_ids)) == ([0, 1, 2, 3, 4], [5, 6])
    assert dataset.fingerprint == "points"
    data = dataset.client_data(3)
    assert data.train_inputs.flatten().tolist() == [3, 4, 5, 6, 7, 8]
    assert data.test_labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("nobody", [(), range(0)])
def test_there_need_not_be_unseen_clients(nobody: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(load(with_facts(unseen_client_ids=nobody), monkeypatch).unseen_client_ids) == 0


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (with_facts(train_client_ids=[]), "train_client_ids is empty"),
        (with_facts(train_client_ids=["anna", "ben"]), "train_client_ids holds 'anna'; number the clients"),
        (with_facts(train_client_ids=[0, 1.5]), "train_client_ids holds 1.5"),
        (with_facts(train_client_ids=[0, True]), "train_client_ids holds True"),
        (with_facts(train_client_ids=range(-1, 4)), "train_client_ids holds -1"),
        (with_facts(train_client_ids=[0, 2**63]), "train_client_ids holds 9223372036854775808"),
        (with_facts(train_client_ids=[0, 3, 3]), "train_client_ids holds 3 twice"),
        (with_facts(train_client_ids=None), "train_client_ids: TypeError: 'NoneType' object is not iterable"),
        (with_facts(unseen_client_ids=[6, 4]), "client 4 is in train_client_ids and in unseen_client_ids"),
        (with_facts(fingerprint=b"points"), "fingerprint is b'points'; it must be a text"),
        (with_facts(fingerprint=""), "fingerprint is ''"),
        (with_facts(fingerprint="x" * 10**6), "fingerprint is .*; it must be a text of 1 to 500 characters"),
        (with_facts(num_classes=0), "num_classes is 0; it must be a whole number from 1"),
        (with_facts(num_classes=3.0), "num_classes is 3.0"),
        (with_facts(num_train_examples=lambda self, client_id: 5), "client 0: .*num_train_examples says 5"),
        (with_facts(num_train_examples=lambda self, client_id: 6.0), r"num_train_examples\(0\) is 6.0"),
        (with_facts(client_name=lambda self, client_id: 7, num_classes=2), r"client_name\(0\) is 7; return a text"),
        (OtherEachTime, r"client_data\(0\) gave other train_inputs when it was called again"),
        (
            FailingFactory,
            r"Given\(data_root, num_clients, seed\): .*test_own_dataset.py, line \d+: RuntimeError: no such",
        ),
    ],
)
def test_what_is_wrong_with_a_whole_data_set_is_seen_when_it_is_opened(
    own: type[Points], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=rf"--dataset test_own_dataset:Given: {reason}") as refusal:
        load(own, monkeypatch)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("client_id", [0, CLIENT, 5])
@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"train_labels": lambda x: x + 1}, "train_labels hold 3; with num_classes 3 a label is 0 to 2"),
        ({"test_labels": lambda x: x - 1}, "test_labels hold -1"),
        ({"train_labels": lambda x: x.float()}, "train_labels are torch.float32; use int64 for classes"),
        ({"train_labels": lambda x: x.int()}, "train_labels are torch.int32; use int64"),
        ({"test_labels": lambda x: x.to(torch.uint8)}, "test_labels are torch.uint8; use int64"),
        ({"train_labels": lambda x: x[:, None]}, r"train_labels have the shape \(6, 1\)"),
        ({"train_labels": lambda x: x[:4]}, "train_inputs has 6 examples, train_labels 4"),
        ({"test_inputs": lambda x: x[:1]}, "test_inputs has 1 examples, test_labels 3"),
        ({"train_inputs": lambda x: x[:0], "train_labels": lambda x: x[:0]}, "its training part is empty"),
        (
            {"train_inputs": lambda x: x[:4], "train_labels": lambda x: x[:4]},
            "train_labels has 4 entries, and num_train",
        ),
        ({"train_inputs": lambda x: x.numpy()}, "train_inputs is a ndarray; make it a torch.Tensor"),
        ({"test_labels": lambda x: x.tolist()}, "test_labels is a list"),
        ({"train_inputs": lambda x: x / 0}, "train_inputs hold NaN or infinity"),
        ({"test_inputs": lambda x: x * float("nan")}, "test_inputs hold NaN or infinity"),
        (
            {"train_inputs": lambda x: x.to("meta")},
            "train_inputs is torch.strided on meta; give a dense",
        ),
        ({"train_inputs": lambda x: x.to_sparse()}, "train_inputs is torch.sparse_coo on cpu"),
        ({"train_inputs": lambda x: x.requires_grad_()}, "train_inputs requires a gradient; detach it"),
        ({"train_inputs": lambda x: x > 1}, "train_inputs are torch.bool"),
        (
            {"test_inputs": lambda x: x.double()},
            r"test_inputs are torch.float64 of shape \(1,\) each, those read",
        ),
        ({"test_inputs": lambda x: x.expand(-1, 2)}, r"test_inputs are torch.float32 of shape \(2,\) each"),
    ],
)
def test_what_is_wrong_with_a_client_is_one_line_with_its_number(
    tensors: dict[str, Callable[[Tensor], Any]], reason: str, client_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first training client, one later on, and the first unseen one."""
    with pytest.raises(ValueError, match=f"--dataset test_own_dataset:Given: client {client_id}: {reason}") as refusal:
        read_all(with_client(client_id, **tensors), monkeypatch)
    assert "\n" not in str(refusal.value)


def test_the_first_clients_are_checked_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    for client_id in (0, 5):
        with pytest.raises(ValueError, match=f"client {client_id}: train_labels hold 3"):
            load(with_client(client_id, train_labels=lambda x: x + 1), monkeypatch)


def test_who_is_scored_needs_a_test_part_and_who_only_trains_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    no_test = {"test_inputs": lambda x: x[:0], "test_labels": lambda x: x[:0]}
    with pytest.raises(ValueError, match="client 6: its test part is empty, and it is to be scored"):
        read_all(with_client(6, **no_test), monkeypatch)
    read_all(with_client(4, **no_test), monkeypatch)
    held_out = utils.apply_views(make_config(validation=True), load(with_client(4, **no_test), monkeypatch))
    with pytest.raises(ValueError, match=r"--validation true .*client 4 has no test part"):
        held_out.client_data(4)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (with_model(lambda: "a model"), r"build_model\(\) is a str; return a torch.nn.Module"),
        (with_model(nn.Identity), "has no parameter that is trained"),
        (with_model(frozen), "has no parameter that is trained"),
        (with_model(lambda: nn.Linear(1, 3).half()), "has parameters of torch.float16; make all of them float32"),
        (with_model(lambda: nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 3).double())), "torch.float32, torch.float64"),
        (with_model(lambda: nn.LazyLinear(3)), "does not know the shape of weight yet"),
        (with_model(lambda: nn.Linear(1, 3, device="meta")), "has weight on meta; build it on the CPU"),
        (with_model(not_finite), "starts with NaN or infinity in weight"),
        (with_model(lambda: nn.Linear(1, 4)), r"outputs \(2, 4\) are not \(examples, num_classes\), which is \(2, 3\)"),
        (with_model(lambda: nn.LSTM(1, 3)), "the model returns a tuple; let it return one tensor"),
        (with_model(lambda: nn.Linear(5, 3)), r"on inputs \(2, 1\) of torch.float32: RuntimeError: mat1 and mat2"),
        (with_model(InTheWrongPlace), r"test_own_dataset.py, line \d+: RuntimeError: shape '\[7, 3\]'"),
        (with_loss(lambda outputs, labels: outputs.mean(dim=1)), r"loss_function returns a tensor of shape \(2,\)"),
        (with_loss(lambda outputs, labels: 0.5), "loss_function returns a float"),
        (with_loss(lambda outputs, labels: outputs.mean() * float("nan")), "the loss of the untrained model is nan"),
        (
            with_loss(lambda outputs, labels: outputs.detach().mean()),
            "the loss does not depend on the model's parameters",
        ),
        (with_loss(lambda outputs, labels: outputs[0, 9]), r"loss_function: .*line \d+: IndexError: index 9 is out"),
    ],
)
def test_a_model_or_a_loss_that_cannot_be_trained_is_seen_before_the_first_round(
    own: type[Points], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load(own, monkeypatch)
    with pytest.raises(ValueError, match=rf"--dataset test_own_dataset:Given: .*{reason}") as refusal:
        utils.get_model(make_config(dataset="my:Given", architecture="auto"), dataset)
    assert "\n" not in str(refusal.value)


def test_this_projects_model_must_fit_the_users_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points have one coordinate, a convolutional network takes images."""
    parts = {name: value for name, value in vars(Points).items() if name != "build_model"}
    dataset = load(type("WithoutModel", (), parts), monkeypatch)  # type: ignore[arg-type]
    for name, reason in (
        ("resnet8", r"--model resnet8 does not fit the data: it takes images .*, the inputs are \(1,\); name another"),
        ("lstm", r"--model lstm: the model on inputs \(2, 1\) of torch.float32: RuntimeError"),
    ):
        with pytest.raises(ValueError, match=reason):
            utils.get_model(make_config(dataset="my:Given", architecture=name), dataset)


def test_a_model_that_is_named_comes_before_the_data_sets_own(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(Points, monkeypatch)
    assert isinstance(utils.get_model(make_config(dataset="my:Given", architecture="mlp"), dataset), MLP)
    assert type(utils.get_model(make_config(dataset="my:Given", architecture="auto"), dataset)) is nn.Linear


def test_trying_a_model_leaves_it_and_the_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run on a user's own data set would end with another model than before the rules were there."""
    dataset = load(with_model(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 3))), monkeypatch)
    before = torch.random.get_rng_state()
    one, two = (utils.get_model(make_config(dataset="my:Given", architecture="auto"), dataset) for _ in range(2))
    assert torch.equal(flatten(one), flatten(two))
    assert one.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_error_in_the_users_code_is_one_line_with_client_file_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(FailingClient, monkeypatch)
    expected = rf"client_data\({CLIENT}\): .*test_own_dataset.py, line \d+: KeyError: 'client_2.csv'"
    with pytest.raises(ValueError, match=expected):
        dataset.client_data(CLIENT)


def test_a_client_is_checked_where_it_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a worker, which reads clients that the server never reads."""
    from perfedavg.settings import Phase

    dataset = load(with_client(6, train_labels=lambda x: x + 1), monkeypatch)
    config = make_config(dataset="my:Given", architecture="auto", client_batching=1)
    model = utils.get_model(config, dataset)
    executor = LocalExecutor(config, model, dataset)
    with pytest.raises(ValueError, match="client 6: train_labels hold 3"):
        executor.score(ScoringTask(Phase.FEDAVG, 1, (5, 6)), flatten(model))


class Picky(nn.Module):
    """Fails for a client of which the first one says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        table = {position: position for position in range(10)}
        table[int(inputs.max())]
        return self.layer(inputs)


def test_a_model_that_fails_for_a_later_client_is_one_line_with_client_file_and_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The points of client 2 end at 10, those of the first one at 8."""
    from perfedavg.settings import Phase

    dataset = load(with_model(Picky), monkeypatch)
    config = make_config(dataset="my:Given", architecture="auto", client_batching=1)
    model = utils.get_model(config, dataset)
    executor = LocalExecutor(config, model, dataset)
    expected = rf"scoring client {CLIENT}: .*test_own_dataset.py, line \d+: KeyError: 10"
    with pytest.raises(ValueError, match=expected):
        executor.score(ScoringTask(Phase.FEDAVG, 1, (0, CLIENT)), flatten(model))


def test_numbers_of_numpy_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "train_client_ids": np.array([4, 2, 0]),
        "unseen_client_ids": torch.tensor([9]),
        "num_classes": np.int64(3),
    }
    dataset = load(with_facts(**facts, num_train_examples=lambda self, client_id: np.int32(6)), monkeypatch)
    assert list(dataset.train_client_ids) == [4, 2, 0]
    assert [*map(type, (dataset.train_client_ids[0], dataset.unseen_client_ids[0], dataset.num_classes))] == [int] * 3


def test_targets_of_a_regression_pass_with_a_loss_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Regression(Points):
        num_classes = 1

        def client_data(self, client_id: int) -> Any:
            data = super().client_data(client_id)
            data.train_labels, data.test_labels = 2 * data.train_inputs, 2 * data.test_inputs
            return data

        @staticmethod
        def loss_function(outputs: Tensor, labels: Tensor) -> Tensor:
            return (outputs - labels).square().mean()

        def build_model(self) -> nn.Module:
            return nn.Linear(1, 1)

    read_all(Regression, monkeypatch)


def test_a_users_own_data_set_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    text = describe("test_own_dataset:Given", load(Points, monkeypatch)).text()
    assert "test_own_dataset:Given: 7 clients, 5 train and 2 are unseen; 3 classes" in text
    assert "examples a client, min, median, max: 9, 9, 9" in text
