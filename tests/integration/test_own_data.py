"""A user's own data: a folder of images, or a class of their own; and what is said where either is not right."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, Launched, assert_one_clear_line, digits_dataset, finish, make_config, read_result
from PIL import Image

import utils
from datasets import DatasetRequest, load_federated_dataset
from datasets.clients.split import SplitDataset


def request(name: str, num_clients: int | None = None, partition: str | None = None) -> DatasetRequest:
    return DatasetRequest(name, num_clients, lambda count: max(1, count // 5), partition, seed=0)


def load(folder: Path) -> SplitDataset:
    return load_federated_dataset(request("folder"), folder)


def write_image(path: Path, value: int, size: tuple[int, int] = (28, 28)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five clients; client c has 4 images of class `a` with value c and 2 of class `b` with value 100 + c."""
    tmp_path = tmp_path / "my_data"
    for client in range(5):
        for number in range(4):
            write_image(tmp_path / f"client{client}" / "a" / f"{number}.png", client)
        for number in range(2):
            write_image(tmp_path / f"client{client}" / "b" / f"{number}.png", 100 + client)
    return tmp_path


def test_a_folder_of_images_is_read(folder: Path) -> None:
    dataset = load(folder)
    assert (list(dataset.train_client_ids), list(dataset.unseen_client_ids)) == ([0, 1, 2, 3], [4])
    assert dataset.num_classes == 2
    data = dataset.client_data(4)
    values = [round(float(image.max() * 255)) for image in (*data.train_inputs, *data.test_inputs)]
    labels = [*data.train_labels.tolist(), *data.test_labels.tolist()]
    assert sorted(zip(values, labels, strict=True)) == [(4, 0)] * 4 + [(104, 1)] * 2


def test_a_second_reading_comes_from_the_cache_and_a_change_is_seen(folder: Path) -> None:
    before = load(folder).fingerprint
    cached = list((folder / ".cache").glob("folder-*"))
    assert load(folder).fingerprint == before
    assert list((folder / ".cache").glob("folder-*")) == cached
    write_image(folder / "client0" / "a" / "new.png", 50)
    assert load(folder).fingerprint != before


def test_a_folder_that_cannot_be_written(
    folder: Path, tmp_path: Path, make_read_only: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    make_read_only(folder)
    before = load(folder).fingerprint
    assert load(folder).fingerprint == before
    assert not (folder / ".cache").exists()


def test_what_is_wrong_in_a_folder_is_named(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    write_image(elsewhere, 1)
    wrong = folder / "client2" / "b" / "wrong.png"

    def refused(reason: str) -> None:
        with pytest.raises(ValueError, match=reason) as refusal:
            load(folder)
        assert str(wrong.with_suffix("")) in str(refusal.value)
        assert not list((folder / ".cache").glob("folder-*")), "nothing half-cached"

    write_image(wrong, 1, size=(28, 29))
    refused("is 28x29, not 28x28")
    wrong.write_bytes(b"no image")
    refused("is damaged")
    wrong.unlink()
    wrong.symlink_to(elsewhere)
    refused("leads out of")
    wrong.unlink()
    wrong.mkdir()
    refused("is no file")
    wrong.rmdir()
    wrong.with_suffix(".txt").write_text("notes")
    refused("is no image")


def test_an_empty_folder_and_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no client/class/image\.png"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        load(tmp_path / "missing")


def test_more_clients_than_there_are(folder: Path) -> None:
    with pytest.raises(ValueError, match="--client_num_in_total 10 exceeds the 5 clients of folder; lower it to 5"):
        load_federated_dataset(request("folder", 10), folder)
    assert len(load_federated_dataset(request("folder", 3), folder).unseen_client_ids) == 1


def test_a_share_that_leaves_nobody_to_train(folder: Path) -> None:
    """Of natural clients, whose number is known only when they have been read."""
    asked = DatasetRequest("folder", None, lambda count: count, None, seed=0)
    with pytest.raises(
        ValueError, match="--unseen_fraction leaves 0 of 5 clients of folder to train and 5 to be scored"
    ):
        load_federated_dataset(asked, folder)


def test_a_partition_has_no_meaning_where_clients_are_natural(folder: Path) -> None:
    for name in ("folder", "synthetic_writers", "my.module:factory"):
        with pytest.raises(ValueError, match=f"--partition iid has no meaning for {name}"):
            load_federated_dataset(request(name, 5, "iid"), folder)


def test_the_example_of_the_documentation_runs(launched: Launched, tmp_path: Path) -> None:
    """The code in docs/your-own-data.md, as it stands there."""
    page = (ROOT / "docs" / "your-own-data.md").read_text()
    program = next(part.partition("```")[0] for part in page.split("```python\n") if "class Tones" in part)
    (tmp_path / "my_tones.py").write_text(program)
    flags = ["--rounds", "2", "--fine_tune_method", "none", "--run_dir", str(tmp_path / "run")]
    process = launched.start("single_process.py", "--dataset", "my_tones:Tones", *flags, cwd=tmp_path)
    status, _, errors = finish(process)
    assert status == 0, errors
    result = read_result(tmp_path / "run")
    assert (result["train_clients"], result["unseen_clients"]) == (16, 4)


def test_the_documented_model_goes_with_data_of_any_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands on the page."""
    page = (ROOT / "docs" / "your-own-data.md").read_text()
    program = next(part.partition("```")[0] for part in page.split("```python\n") if "my_model.py" in part)
    (tmp_path / "my_model.py").write_text(program)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    config = make_config(dataset="digits", architecture="my_model:build")
    model = utils.get_model(config, digits_dataset(5))
    assert sum(parameter.numel() for parameter in model.parameters()) == 784 * 32 + 32 + 320 + 10


TIED = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, inputs):
        return self.last(torch.relu(self.first(inputs)))

class Data:
    num_classes, fingerprint = 4, "tied"
    train_client_ids, unseen_client_ids = range(4), range(4, 6)

    def __init__(self, data_root, num_clients, seed): pass
    def num_train_examples(self, client_id): return 8
    def client_name(self, client_id): return f"person {client_id}"
    def build_model(self): return Model()
    def client_data(self, client_id):
        inputs = torch.rand(12, 4, generator=torch.Generator().manual_seed(client_id))
        data = Parts()
        data.train_inputs, data.test_inputs = inputs[:8], inputs[8:]
        data.train_labels, data.test_labels = inputs.argmax(dim=1).split([8, 4])
        return data

class Parts: pass
"""


def test_a_run_of_a_model_with_tied_weights_ends_well_and_another_starts_from_it(
    launched: Launched, tmp_path: Path
) -> None:
    """Its weights are saved once, and come back with the same digest. Its clients' names stand in the table."""
    (tmp_path / "my_tied.py").write_text(TIED)
    flags = ["--dataset", "my_tied:Data", "--client_num_per_round", "2", "--fine_tune_method", "none"]
    start = partial(launched.start, "single_process.py", *flags, cwd=tmp_path)
    status, _, errors = finish(start("--rounds", "2", "--run_dir", "one"))
    assert status == 0, errors
    assert finish(start("--rounds", "0", "--run_dir", "two", "--initial_model", "one"))[0] == 0
    digests = [read_result(tmp_path / run)["model_sha256"] for run in ("one", "two")]
    assert digests[0] == digests[1]
    table = csv.DictReader((tmp_path / "one" / "clients.csv").read_text().splitlines())
    unseen = [(row["client_id"], row["client_name"]) for row in table if row["population"] == "unseen"]
    assert unseen == [("4", "person 4"), ("5", "person 5")]


def test_an_installed_package_of_a_name_of_this_projects_is_told_from_it(launched: Launched, tmp_path: Path) -> None:
    """Hugging Face's `datasets`, in a module that is started from a folder of the user's."""
    package = tmp_path / "installed" / "datasets"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def load_dataset(): pass\n")
    (tmp_path / "my_corpus.py").write_text("from datasets import load_dataset\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    words = ("single_process.py", "--dataset", "my_corpus:Data", "--run_dir", "run")
    assert_one_clear_line(
        launched.start(*words, cwd=tmp_path, env=environment),
        f"{tmp_path / 'my_corpus.py'}, line 1: ImportError: cannot import name 'load_dataset'",
        f"datasets is this project's {ROOT / 'datasets' / '__init__.py'}, and not {package / '__init__.py'}",
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:factory", "--dataset no_such_module:factory cannot be imported"),
        ("math:factory", "--dataset math:factory cannot be imported"),
        ("collections:ChainMap", "has no train_client_ids"),
    ],
)
def test_a_factory_that_is_not_one(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        load_federated_dataset(request(name), tmp_path)


def test_a_folder_runs_end_to_end(launched: Launched, folder: Path, tmp_path: Path) -> None:
    flags = ["--client_num_per_round", "2", "--rounds", "1", "--fine_tune_method", "none", "--model", "mlp"]
    words = ("single_process.py", "--dataset", "folder", "--data_root", folder, "--run_dir", tmp_path / "run")
    assert finish(launched.start(*words, *flags))[0] == 0
    assert_one_clear_line(
        launched.start(
            "single_process.py", "--dataset", "folder", "--data_root", folder, "--run_dir", tmp_path / "two"
        ),
        "--client_num_per_round 5 exceeds the 4 training clients",
    )


def test_labels_are_numbered_over_all_clients(folder: Path) -> None:
    """A client with one class only must not shift the numbers of the others."""
    write_image(folder / "client5" / "c" / "1.png", 1)
    write_image(folder / "client5" / "c" / "2.png", 1)
    dataset = load(folder)
    assert dataset.num_classes == 3
    assert set(dataset.client_data(5).train_labels.tolist()) == {2}
    assert np.array_equal(sorted({*dataset.client_data(0).train_labels.tolist()}), [0, 1])
