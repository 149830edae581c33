"""The sine task through the system's own path: who is trained to adapt does, and the report shows what was run."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import single_process
import utils
from datasets.sources.sine import POINTS
from experiments import sine_adaptation, sine_table
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.engine.scores import summarize
from perfedavg.settings import Population
from perfedavg.training.flat_model import flatten
from reporting import sine_errors

SMALL = ["--dataset", "sine", "--client_num_in_total", "510", "--batch_size", "10", "--personalization_epochs", "5"]
SMALL += ["--personalization_curve", "5", "--eval_every", "10000", "--local_lr", "0.02", "--device", "cpu"]
META = ["--rounds", "0", "--client_num_per_round", "10", "--client_batching", "10", "--fine_tune_rounds", "60"]
META += ["--fine_tune_local_lr", "0.02", "--fine_tune_local_steps", "5"]
META += ["--fine_tune_server_optimizer", "adam", "--fine_tune_server_lr", "0.01"]
META += ["--fine_tune_server_schedule", "linear"]
SUPPORT = ["--fine_tune_support_fraction", "0.2"]
JOINT = ["--joint", "true", "--fine_tune_method", "none", "--local_steps", "100", "--client_num_per_round", "1"]
JOINT += ["--server_optimizer", "sgd"]


def errors_by_step(*flags: str) -> list[float]:
    """Mean test MSE over the unseen tasks after 0 .. 5 steps on their given points, when the training has ended."""
    config = utils.get_args("single", [*SMALL, *flags]).experiment
    dataset = utils.get_datasets(config, Path())
    model = utils.get_model(config, dataset)
    executor = LocalExecutor(config, model, dataset)
    outcome = run_experiment(config, executor, dataset, ExperimentState.fresh(config, flatten(model)))
    *_, scores = outcome.scores.values()
    return [entry["loss"] for entry in summarize(scores[Population.UNSEEN])["by_epoch"]]


def test_meta_training_makes_adaptation_fast_and_joint_training_does_not() -> None:
    """The point of it all. If a meta-gradient had a wrong sign, or adapting were left out of it, the method would be no
    better than the baseline, which takes as many steps.
    """
    joint = errors_by_step(*JOINT, "--rounds", "12", "--client_batching", "1")
    assert joint[5] > 2.0, "one model for all sines can only be their mean, which is 0"
    for method in ("maml", "fomaml", "reptile"):
        errors = errors_by_step(*META, "--fine_tune_method", method, *([] if method == "reptile" else SUPPORT))
        assert errors[5] < 0.5 * joint[5], f"{method}: {errors}"
        assert errors[5] < errors[1] < errors[0], f"{method}: {errors}"


def test_the_report_shows_what_the_runs_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The drawn curves have the errors that the runs measured, also with the joint baseline, whose data are pooled."""
    runs, few = (
        tmp_path / "runs",
        ["--client_num_in_total", "102", "--personalization_epochs", "32", "--personalization_curve", "32"],
    )
    rows = {
        "maml": [*META, "--fine_tune_method", "maml", *SUPPORT, "--fine_tune_rounds", "3"],
        "joint": [*JOINT, "--rounds", "3"],
    }
    for method, flags in rows.items():
        folder = runs / method / "seed0"
        monkeypatch.setattr("sys.argv", ["single_process.py", *SMALL, *flags, *few, "--run_dir", str(folder)])
        single_process.main()
    monkeypatch.setattr("sys.argv", ["sine_table.py", str(runs), "--output", str(tmp_path), "--models", str(runs)])
    sine_table.main()
    assert "| Joint training | 1 |" in capsys.readouterr().out
    for name in ("mse.png", "adaptation.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    models = sine_adaptation.load_models(sine_errors.read_rows(runs, list(rows)), runs)
    for folder, model in zip(rows, models, strict=True):
        with open(runs / folder / "seed0" / "clients.csv", newline="") as file:
            row = next(csv.DictReader(file))
        client_id = int(row["client_id"])
        assert client_id == model.tasks.unseen_client_ids[0]
        curves, true = (
            sine_adaptation.adapted_curves(model, client_id, POINTS),
            model.tasks.task(client_id).values(POINTS),
        )
        (column,) = [name for name in row if name.endswith("_personalized_loss")]
        assert ((curves[32] - true) ** 2).mean() == pytest.approx(float(row[column]), rel=1e-3)
        assert not (curves[32] == curves[0]).any()


def test_another_runs_model_is_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a picture would stand beside a table that it has nothing to do with."""
    few = [
        "--client_num_in_total",
        "102",
        "--personalization_curve",
        "32",
        "--rounds",
        "0",
        "--fine_tune_method",
        "none",
    ]
    for folder, seed in (("results/none/seed0", "0"), ("models/none/seed0", "1")):
        argv = ["single_process.py", *SMALL, *few, "--run_dir", str(tmp_path / folder), "--seed", seed]
        monkeypatch.setattr("sys.argv", argv)
        single_process.main()
    with pytest.raises(ValueError, match="holds another model than the results in"):
        sine_adaptation.load_models(sine_errors.read_rows(tmp_path / "results"), tmp_path / "models")
