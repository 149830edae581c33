"""A run's folder is what remains of a run: complete, never half-written, never overwritten by another run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import digits_dataset, make_config
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import parameters_sha256
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.events import FILE_NAME
from perfedavg.recording.folders import make_default_folder
from perfedavg.recording.run_folder import RunFolder
from perfedavg.training.flat_model import flatten
from reporting.run_plots import draw_run_plots

CONFIG = make_config(fedavg=make_config().fedavg, eval_every=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A small run and its model, which ends with the final parameters."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "one" / "run")
    dataset = digits_dataset(20)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    run_and_record(CONFIG, LocalExecutor(CONFIG, model, dataset), dataset, model, folder, {"world_size": 1})
    draw_run_plots(folder.path)
    return folder.path, model


def test_holds_every_promised_file(run: tuple[Path, nn.Module]) -> None:
    names = {str(path.relative_to(run[0])) for path in run[0].rglob("*") if path.is_file()}
    tables = {"config.json", "metrics.jsonl", "clients.csv", "result.json", "log.txt", ".lock"}
    pictures = {"plots/accuracy.png", "plots/clients.png", "plots/trained-clients.png"}
    assert names == tables | pictures | {"model.safetensors", f"tensorboard/{FILE_NAME}"}


def test_tensorboard_reads_every_round_once(run: tuple[Path, nn.Module]) -> None:
    """Rounds are counted through the phases; a number that is not there would be a gap in the curve."""
    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    for tag, values in (
        ("training/loss", [record["train_loss"] for record in records]),
        ("unseen_accuracy/personalized", [record["evaluation"]["personalized"]["accuracy"] for record in records]),
    ):
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == list(range(1, len(records) + 1))
        assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-6)


def test_the_tensorboard_that_is_installed_starts_and_finds_them(run: tuple[Path, nn.Module]) -> None:
    """The README names its command, and a release of it may need what is not there."""
    command = [sys.executable, "-m", "tensorboard.main", "--inspect", "--logdir", str(run[0])]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "training/loss" in answer.stdout


def test_result_has_what_its_readers_rely_on(run: tuple[Path, nn.Module]) -> None:
    result = json.loads((run[0] / "result.json").read_text())
    assert (result["dataset"], result["seed"], result["world_size"]) == ("digits", 0, 1)
    assert (result["train_clients"], result["unseen_clients"], result["rounds"]) == (16, 4, 2)
    assert set(result["phases"]) == {"fedavg", "fine_tune"}
    measures = {f"{metric}{of}" for metric in ("loss", "accuracy") for of in ("", "_std", "_p10", "_p50", "_p90")}
    for key in ("after_fedavg", "after_fine_tune"):
        assert set(result[key]["initial"]) == set(result[key]["personalized"]) == measures
        assert 0 <= result[key]["fraction_hurt"] <= 1


def test_the_saved_model_is_the_one_whose_digest_is_stated(run: tuple[Path, nn.Module]) -> None:
    result = json.loads((run[0] / "result.json").read_text())
    assert parameters_sha256(flatten(run[1])) == result["model_sha256"]
    with safe_open(run[0] / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    assert all(saved[name].equal(tensor) for name, tensor in run[1].state_dict().items())


def test_a_line_a_round_and_a_row_a_client(run: tuple[Path, nn.Module]) -> None:
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["round_number"]) for line in lines] == [
        ("fedavg", 1),
        ("fedavg", 2),
        ("fine_tune", 1),
        ("fine_tune", 2),
    ]
    assert all(line["evaluation"]["clients"] == 2 and len(line["client_ids"]) == 4 for line in lines)
    rows = list(csv.DictReader((run[0] / "clients.csv").read_text().splitlines()))
    trained = [row for row in rows if row["population"] == "trained"]
    rows = [row for row in rows if row["population"] == "unseen"]
    assert [int(row["client_id"]) for row in rows] == [16, 17, 18, 19]
    assert len(trained) == 4
    assert {int(row["client_id"]) for row in trained} <= {client for line in lines[:2] for client in line["client_ids"]}
    result = json.loads((run[0] / "result.json").read_text())
    accuracies = [float(row["after_fine_tune_personalized_accuracy"]) for row in rows]
    assert sum(accuracies) / 4 == pytest.approx(result["after_fine_tune"]["personalized"]["accuracy"])


def test_config_says_how_to_repeat_the_run(run: tuple[Path, nn.Module]) -> None:
    recorded = json.loads((run[0] / "config.json").read_text())
    assert type(CONFIG).from_dict(recorded["experiment"]) == CONFIG
    assert {"python", "torch", "fedlab", "commit"} <= set(recorded["environment"])


def test_a_folder_that_holds_a_run_is_refused(run: tuple[Path, nn.Module]) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        RunFolder(run[0])


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"--run_dir .*file/run cannot be written \(Not a directory\)"):
        RunFolder(tmp_path / "file" / "run")


def test_the_default_folder_is_a_new_one(tmp_path: Path) -> None:
    """Two runs that start in the same second must not write into one folder."""
    folders = {make_default_folder(tmp_path / "runs", "digits") for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() and "digits" in folder.name for folder in folders)
