"""Results lead back: clients that have names of their own are called by them wherever clients are listed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import digits_dataset, make_config
from PIL import Image
from torch import Tensor, nn

from datasets import DatasetRequest, load_federated_dataset
from datasets.clients.split import SplitDataset
from datasets.clients.views import JointView, ValidationView
from datasets.describe import describe, plot
from perfedavg.contracts import client_label, client_name
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.tasks import CohortTask, CohortUpdate
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.run_folder import RunFolder
from perfedavg.recording.runs import FinishedRun
from perfedavg.settings import OptimizerConfig, PhaseConfig

NAMES = ["anna", 'ben, "the" <b>', "cleo\nx", "d$o$e", "émile", "fay"]
"""In the order of the folders: as file systems allow them, and awkward for CSV, HTML, terminals and matplotlib."""


@pytest.fixture
def dataset(tmp_path: Path) -> SplitDataset:
    """A client for each name; client c has images of value 40 * c. The last two are unseen."""
    for number, name in enumerate(sorted(NAMES)):
        for image in range(5):
            path = tmp_path / "data" / name / f"class{image % 2}" / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (28, 28), 40 * number).save(path)
    return load_federated_dataset(DatasetRequest("folder", None, lambda count: 2, None, seed=0), tmp_path / "data")


def run(dataset: Any, path: Path, learning_rate: float = 0.1, num_rounds: int = 1, resume: bool = False) -> Path:
    sgd = OptimizerConfig("sgd", learning_rate)
    fedavg = PhaseConfig(num_rounds, 1, sgd, OptimizerConfig("sgd", 1.0))
    config = make_config(cohort_size=2, fedavg=fedavg, fine_tune=None, client_batching=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, dataset.num_classes))
    folder = RunFolder(path, resume=resume)
    try:
        run_and_record(config, LocalExecutor(config, model, dataset), dataset, model, folder, {"world_size": 1})
    finally:
        folder.close()
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with open(path / "clients.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_of_clients_has_their_names(dataset: SplitDataset, tmp_path: Path) -> None:
    """Each beside the number under which its data are read."""
    folder = run(dataset, tmp_path / "run")
    named = {int(row["client_id"]): row["client_name"] for row in rows(folder)}
    assert set(named) > set(dataset.unseen_client_ids)
    assert named == {client_id: sorted(NAMES)[client_id].replace("\n", "?") for client_id in named}
    for client_id in named:
        assert dataset.client_data(client_id).train_inputs.max() * 255 == 40 * client_id
    assert FinishedRun.read(folder).clients is not None


def test_where_clients_have_numbers_only_the_table_has_no_names(tmp_path: Path) -> None:
    """So that whoever reads older tables reads this one."""
    folder = run(digits_dataset(20), tmp_path / "run")
    assert list(rows(folder)[0])[:4] == ["client_id", "population", "num_train_examples", "num_test_examples"]
    assert FinishedRun.read(folder).clients is not None


def test_names_are_one_printable_line_that_a_csv_reader_gets_back(tmp_path: Path) -> None:
    """Names are text of strangers: none forges a row, a colour of the terminal, or the direction of writing."""

    class Named:
        def __init__(self, dataset: SplitDataset) -> None:
            self._dataset = dataset

        def __getattr__(self, name: str) -> Any:
            return getattr(self._dataset, name)

        def client_name(self, client_id: int) -> str | None:
            awkward = {16: 'a,"b"\n17,c', 17: "\x1b[31mred", 18: "\u202eabc", 19: "x" * 1000}
            return awkward.get(client_id)

    folder = run(Named(digits_dataset(20)), tmp_path / "run")
    unseen = [row for row in rows(folder) if row["population"] == "unseen"]
    assert {row["client_id"]: row["client_name"] for row in unseen} == {
        "16": 'a,"b"?17,c',
        "17": "?[31mred",
        "18": "?abc",
        "19": "x" * 97 + "...",
    }
    assert len((folder / "clients.csv").read_text().splitlines()) == 1 + len(rows(folder))


def test_a_refused_client_is_named_in_the_metrics_and_on_the_terminal(
    dataset: SplitDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(dataset, tmp_path / "run", learning_rate=1e30)
    record = json.loads((folder / "metrics.jsonl").read_text())
    assert record["refused"]
    assert record["client_names"] == {
        client_id: sorted(NAMES)[int(client_id)].replace("\n", "?") for client_id in record["refused"]
    }
    errors = capsys.readouterr().err
    for client_id in record["refused"]:
        assert client_label(dataset, int(client_id)).startswith(f"{client_id} (")
        assert client_label(dataset, int(client_id)) in errors


def test_a_run_goes_on_behind_lines_with_names(
    dataset: SplitDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of the round that a checkpoint stands for is read back, and kept as it is."""
    train = LocalExecutor.train

    def fail_in_round_2(executor: LocalExecutor, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        if task.round_number == 2:
            raise RuntimeError("the power fails")
        return train(executor, task, parameters)

    with monkeypatch.context() as patched:
        patched.setattr(LocalExecutor, "train", fail_in_round_2)
        with pytest.raises(RuntimeError, match="the power fails"):
            run(dataset, tmp_path / "run", learning_rate=1e30, num_rounds=2)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    run(dataset, tmp_path / "run", learning_rate=1e30, num_rounds=2, resume=True)
    assert "damaged" not in capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == line
    assert ["client_names" in line for line in lines] == [True, True]


def test_views_keep_the_names_and_the_pooled_client_has_none(dataset: SplitDataset) -> None:
    first, unseen = dataset.train_client_ids[0], dataset.unseen_client_ids[0]
    joint = JointView(dataset)
    assert client_name(joint, first) is None
    assert client_name(joint, unseen) == client_name(dataset, unseen) == "fay"
    assert client_name(ValidationView(dataset, 1), first) == client_name(dataset, first) == "anna"
    assert client_label(digits_dataset(20), 3) == "3"


def test_a_description_shows_names_whatever_is_in_them(dataset: SplitDataset) -> None:
    """A `$` would begin a formula, which fails where it does not end."""
    figure = plot(describe("folder", dataset))
    figure.savefig(io.BytesIO(), format="png")
    labels = [axes.get_ylabel() for subfigure in figure.subfigs for axes in subfigure.axes]
    assert "0 (anna)" in labels
    assert r"3 (d\$o\$e)" in labels
