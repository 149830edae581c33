"""A run whose clients all train: they are scored, on the curve too, and what reads the run knows of nobody else.

With processes: tests/integration/test_method_runs.py.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from helpers import make_config
from torch import nn

from datasets.clients.partition import Partition
from datasets.clients.partitioned import PartitionedClients
from datasets.clients.split import SplitDataset
from datasets.clients.views import JointView, ValidationView
from datasets.sources.digits import load_digits_images
from perfedavg.client_of_run import adapt_client
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.methods import METHODS
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.run_folder import RunFolder
from perfedavg.recording.runs import FinishedRun, RecordedRun
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig, Population
from perfedavg.training.flat_model import flatten
from reporting.contents import Plot, build_report
from reporting.run_plots import draw_run_plots

SGD = OptimizerConfig("sgd", 1.0)
EVERYBODY = range(8)


def dataset() -> SplitDataset:
    clients = PartitionedClients(load_digits_images(), Partition("groups", 5), len(EVERYBODY), 0, seed=0)
    return SplitDataset("digits", clients, len(EVERYBODY), 0, seed=0)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def config_of(**changes: object) -> ExperimentConfig:
    phase = PhaseConfig(3, 1, OptimizerConfig("sgd", 0.05), SGD, method=METHODS["ditto"]())
    settings = {"num_clients": 8, "unseen_fraction": "0", "cohort_size": 3, "fedavg": phase, "fine_tune": None}
    return make_config(**{**settings, "eval_every": 1, "eval_clients": 4, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, data, net = config_of(), dataset(), model()
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    run_and_record(config, LocalExecutor(config, net, data), data, net, folder, {"world_size": 1})
    folder.close()
    draw_run_plots(folder.path)
    return folder.path


def test_those_that_took_part_are_scored_and_some_of_them_are_on_the_curve(run: Path) -> None:
    """Were others on the curve, its last point would be over fewer clients than those before."""
    finished, took_part = FinishedRun.read(run), set[int]()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        took_part |= set(json.loads(line)["client_ids"])
    assert finished.population is Population.TRAINED
    assert list(finished.results) == [Population.TRAINED]
    assert finished.clients is not None
    assert finished.clients[Population.TRAINED]["client_id"].tolist() == sorted(took_part)
    assert finished.curve is not None
    assert [(point.round_number, point.clients) for point in finished.curve] == [(1, 4), (2, 4), (3, 4)]
    result = json.loads((run / "result.json").read_text())
    assert result["unseen_clients"] == 0
    assert "after_fedavg" not in result
    assert result["trained_after_fedavg"]["clients"] == len(took_part)


def test_the_best_round_is_the_first_with_the_best_mean(run: Path) -> None:
    finished = FinishedRun.read(run)
    assert finished.curve is not None
    for kind in ("initial", "personalized"):
        accuracies = [getattr(point, kind)["accuracy"] for point in finished.curve]
        losses = [getattr(point, kind)["loss"] for point in finished.curve]
        best, least = finished.best_point(kind), finished.best_point(kind, "loss", Phase.FEDAVG)
        assert best is finished.curve[accuracies.index(max(accuracies))]
        assert least is finished.curve[losses.index(min(losses))]
    assert finished.best_point("initial", phase=Phase.FINE_TUNE) is None


def test_report_and_plots_tell_of_them(run: Path) -> None:
    report = build_report([FinishedRun.read(run)], target=0.5)
    plots = [block for block in report.sections[0].blocks if isinstance(block, Plot)]
    assert [plot.name for plot in plots] == ["digits-curves", "digits-clients"]
    assert "on trained clients" in plots[0].description
    assert "those that trained, of runs without any" in report.summary
    assert sorted(path.name for path in (run / "plots").iterdir()) == ["accuracy.png", "clients.png"]
    assert [line["population"] for line in csv.DictReader(io.StringIO(report.csv))] == ["trained"]


def test_one_of_them_adapts_again_as_it_did(run: Path) -> None:
    adapted = adapt_client(RecordedRun.read(run), model(), dataset(), json.loads(first_line(run))["client_ids"][0])
    assert adapted.recorded is not None
    assert adapted.differing == ""


def first_line(run: Path) -> str:
    return (run / "metrics.jsonl").read_text().partition("\n")[0]


def test_where_nobody_trains_all_are_scored(tmp_path: Path) -> None:
    """Each client alone, the baseline of local training, has the same clients as the runs that it is compared with.

    There is no curve to draw, and the clients' plot is there all the same.
    """
    config, data, net = config_of(fedavg=PhaseConfig(0, 1, SGD, SGD)), dataset(), model()
    folder = RunFolder(tmp_path / "run")
    run_and_record(config, LocalExecutor(config, net, data), data, net, folder, {"world_size": 1})
    folder.close()
    draw_run_plots(folder.path)
    finished = FinishedRun.read(folder.path)
    assert finished.clients is not None
    assert finished.clients[Population.TRAINED]["client_id"].tolist() == list(EVERYBODY)
    assert [path.name for path in (folder.path / "plots").iterdir()] == ["clients.png"]


def test_somebody_must_be_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that cannot be leaves no folder, and no line on what to save of it."""
    config, data, net, folder = config_of(num_trained_scored=0), dataset(), model(), RunFolder(tmp_path / "run")
    executor = LocalExecutor(config, net, data)
    reason = r"no unseen clients and --trained_clients_scored 0 .* --unseen_fraction above 0"
    with pytest.raises(ValueError, match=reason):
        run_experiment(config, executor, data, ExperimentState.fresh(config, flatten(net)))
    with pytest.raises(ValueError, match=reason):
        run_and_record(config, executor, data, net, folder, {"world_size": 1})
    data.has_test_part = lambda client_id: False  # as a user's own clients that only train may be
    with pytest.raises(ValueError, match="no client that took part in training has a test part"):
        run_and_record(config_of(), executor, data, net, folder, {"world_size": 1})
    folder.discard_unless_begun()
    assert not folder.path.exists()
    assert "nothing to save" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="--joint true pools the training clients"):
        JointView(data)
    with pytest.raises(ValueError, match="--unseen_fraction 0 gives no validation clients"):
        ValidationView(data, 0)
