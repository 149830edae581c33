"""A client of a run gets the model and the figures that it had there, to the digit, and can have them again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CountingFedAvg, digits_dataset, make_config

import personalize
from datasets.clients.views import JointView
from models import build_model
from perfedavg.client_of_run import adapt_client, check_data, find_client
from perfedavg.engine.executor import LocalExecutor
from perfedavg.methods import FedAvg, Method
from perfedavg.methods.ditto import Ditto
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.run_folder import RunFolder
from perfedavg.recording.runs import RecordedRun
from perfedavg.settings import ExperimentConfig, OptimizerConfig, PhaseConfig

SGD = OptimizerConfig("sgd", 0.1)


def make_run(path: Path, method: Method, data: Any = None, **changes: Any) -> tuple[Path, ExperimentConfig]:
    """A finished run of an MLP on digits, or on other data."""
    phase = PhaseConfig(4, 1, SGD, OptimizerConfig("sgd", 1.0), method=method)
    config = make_config(fedavg=phase, fine_tune=None, eval_every=100, **changes)
    data = data or digits_dataset(20)
    model = build_model("mlp", (1, 28, 28), data.num_classes)
    folder = RunFolder(path)
    run_and_record(config, LocalExecutor(config, model, data, num_slots=2), data, model, folder, {"world_size": 1})
    folder.close()
    return path, config


def rows_of(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "clients.csv").read_text().splitlines()))


@pytest.mark.parametrize("client_batching", [1, 3])
@pytest.mark.parametrize("method", [FedAvg(), Ditto()], ids=["fedavg", "ditto"])
def test_every_scored_client_gets_its_figures_to_the_digit(
    method: Method, client_batching: int, tmp_path: Path
) -> None:
    """Alone and in groups, those never seen and those that trained, which go on from what they kept."""
    data = digits_dataset(20)
    path, _ = make_run(tmp_path / "run", method, data, client_batching=client_batching)
    rows = rows_of(path)
    assert {row["population"] for row in rows} == {"unseen", "trained"}
    for row in rows:
        model = build_model("mlp", (1, 28, 28), 10)
        adapted = adapt_client(RecordedRun.read(path), model, data, int(row["client_id"]))
        assert adapted.population.value == row["population"]
        for kind, values in (("initial", adapted.score.initial), ("personalized", adapted.score.personalized)):
            for metric, value in values.items():
                assert row[f"after_fedavg_{kind}_{metric}"] == repr(value)
        assert adapted.recorded is not None
        assert adapted.differing == ""
        test = data.client_data(adapted.client_id)
        loss = F.cross_entropy(model(test.test_inputs), test.test_labels).item()
        assert loss == pytest.approx(adapted.score.personalized["loss"], rel=1e-5), (
            "the model is the one that was scored"
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", FedAvg())[0]


def test_the_saved_model_has_the_same_figures_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    personalize.main([str(run), "--client", "17"])
    assert "the same figures, to the digit, as in the run's clients.csv" in capsys.readouterr().out
    folder = run / "personalized" / "client-17"
    result = json.loads((folder / "result.json").read_text())
    (row,) = [row for row in rows_of(run) if row["client_id"] == "17"]
    assert repr(result["after"]["loss"]) == row["after_fedavg_personalized_loss"]
    personalize.main([str(run), "--client", "17", "--again"])
    then, now = [line.split()[-2:] for line in capsys.readouterr().out.splitlines() if line.startswith(("when", "now"))]
    assert then == now == [repr(result["after"][metric]) for metric in ("loss", "accuracy")]
    data = digits_dataset(20).client_data(17)
    program = torch.export.load(folder / "model.pt2").module()
    right = (program(data.test_inputs).argmax(dim=1) == data.test_labels).double().mean().item()
    assert right == result["after"]["accuracy"]


def test_a_client_that_was_not_scored_has_no_figures_to_compare(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unscored = next(each for each in range(20) if str(each) not in {row["client_id"] for row in rows_of(run)})
    personalize.main([str(run), "--client", str(unscored)])
    assert "the run did not score this client" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--client", "20"], "--client 20 is no client of this run; use a number from 0 to 19"),
        (["--client", "3", "--epochs", "2"], "--epochs 2 is for images; a client of the run adapts as it did there"),
        (["--client", "3", "--again"], "holds no personalized model; give the command without --again first"),
        (["--client", "3", "--output", "{run}"], "is the folder of a run, whose model would be replaced"),
        ([], "name either a folder of images or, with --client, a client of the run"),
        (["{run}", "--client", "3"], "name either a folder of images or, with --client, a client of the run"),
        (["{run}", "--again"], "--again is for --client"),
    ],
)
def test_what_cannot_be_is_one_line(flags: list[str], reason: str, run: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        personalize.main([str(run), *(flag.format(run=run) for flag in flags)])


def test_a_run_that_has_not_ended_has_no_clients_yet(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(ValueError, match="a run that has not ended"):
        personalize.main([str(tmp_path), "--client", "17"])


def test_other_data_are_one_line(tmp_path: Path) -> None:
    data = digits_dataset(20)
    path, _ = make_run(tmp_path / "run", CountingFedAvg(), data)
    run = RecordedRun.read(path)
    check_data(run, data)
    with pytest.raises(ValueError, match=r"made with other data \(fingerprint .*--data_root"):
        check_data(run, digits_dataset(20, seed=1))


def test_a_client_without_a_test_part_is_one_line(tmp_path: Path) -> None:
    data = JointView(digits_dataset(20))
    path, _ = make_run(tmp_path / "run", FedAvg(), data, joint=True, cohort_size=1)
    model = build_model("mlp", (1, 28, 28), 10)
    (joint,) = data.train_client_ids
    with pytest.raises(ValueError, match=f"client {joint} has no test part to be scored on; name another one"):
        adapt_client(RecordedRun.read(path), model, data, joint)


class Named:
    """Clients with names, one of which is another one's number."""

    train_client_ids, unseen_client_ids = range(3), range(3, 5)

    def client_name(self, client_id: int) -> str | None:
        return ("anna", "Ben", "0", None, "annika")[client_id]


def test_a_client_is_found_by_its_name_and_else_by_its_number() -> None:
    data: Any = Named()
    assert [find_client(data, text) for text in ("anna", "Ben", "0", "3", "annika", "1")] == [0, 1, 2, 3, 4, 1]
    with pytest.raises(ValueError, match="--client ann is no client of this run; use anna, annika, or a number"):
        find_client(data, "ann")
    with pytest.raises(ValueError, match="--client ben is no client of this run; use Ben, or a number"):
        find_client(data, "ben")
    with pytest.raises(ValueError, match=r"use a number from 0 to 4, as clients\.csv has them"):
        find_client(data, "zoe and others")


def test_figures_of_any_length_stand_apart() -> None:
    figures = {"loss": 1.2345678901234567e-05, "accuracy": 0.011111111111111112}
    table = personalize.figures_table({"when it was saved": figures}).splitlines()
    assert table[1].split() == list(figures)
    assert table[2].split()[-2:] == list(map(repr, figures.values()))
