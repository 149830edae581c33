"""One reader for all that is recorded: a run that has begun, one that has ended, and those that are committed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT, digits_dataset, make_config
from torch import nn

from perfedavg.engine.executor import LocalExecutor
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.run_folder import RunFolder
from perfedavg.recording.runs import FinishedRun, RecordedRun, find_runs, read_metrics, read_unfinished_run
from perfedavg.settings import Phase, Population

CONFIG = make_config(eval_every=1)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A small run that has ended, and its model with the final parameters."""
    folder, dataset = RunFolder(tmp_path / "run"), digits_dataset(20)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    run_and_record(CONFIG, LocalExecutor(CONFIG, model, dataset), dataset, model, folder, {"world_size": 1})
    folder.close()
    return folder.path, model


def test_what_a_run_writes_is_what_is_read(run: tuple[Path, nn.Module]) -> None:
    path, model = run
    recorded, finished = RecordedRun.read(path), FinishedRun.read(path)
    assert recorded.has_ended
    assert recorded.experiment() == CONFIG
    state, facts = recorded.model()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (facts.dataset, facts.num_classes) == ("digits", 10)
    result = json.loads((path / "result.json").read_text())
    assert finished.problems == ()
    assert finished.result.model_sha256 == result["model_sha256"]
    assert finished.phases[Phase.FINE_TUNE].personalized == result["after_fine_tune"]["personalized"]
    assert finished.results[Population.TRAINED][Phase.FEDAVG].initial == result["trained_after_fedavg"]["initial"]
    assert finished.curve is not None
    assert [point.round_number for point in finished.curve] == [1, 2, 3, 4], "counted through the phases"
    accuracies = finished.client_scores(Phase.FEDAVG, "initial", "accuracy")
    assert accuracies is not None
    assert accuracies.mean() == pytest.approx(result["after_fedavg"]["initial"]["accuracy"])


def test_settings_of_a_later_version_are_passed_over_by_reports_alone(run: tuple[Path, nn.Module]) -> None:
    path = run[0] / "config.json"
    content = json.loads(path.read_text())
    content["experiment"]["colour"] = content["experiment"]["fedavg"]["shape"] = "new"
    path.write_text(json.dumps(content))
    assert "colour" not in FinishedRun.read(run[0]).settings
    with pytest.raises(ValueError, match=r"config\.json is damaged, or of another version .*colour is unknown"):
        RecordedRun.read(run[0]).experiment()


def test_only_a_run_that_has_not_ended_goes_on(run: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--resume .* has ended, its result is in result\.json"):
        read_unfinished_run(run[0])
    (run[0] / "result.json").unlink()
    assert read_unfinished_run(run[0]).experiment() == CONFIG
    with pytest.raises(ValueError, match="holds a run that has not ended"):
        FinishedRun.read(run[0])
    with pytest.raises(ValueError, match=r"--resume .* is not the folder of a run"):
        read_unfinished_run(tmp_path)


def test_half_a_line_is_damage_behind_the_whole_ones(run: tuple[Path, nn.Module]) -> None:
    """A line that is cut short may still be JSON, such as a number without its last digits."""
    path = run[0] / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"phase": "fedavg", "round_number": 1}')
    lines = read_metrics(run[0])
    assert [next(lines)[1]["round_number"] for _ in range(4)] == [1, 2, 1, 2]
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged \(line 5: it is cut short\)"):
        next(lines)


def test_seconds_of_training_are_those_of_all_rounds_so_far(run: tuple[Path, nn.Module]) -> None:
    """Also where only the rounds with a point were kept, which then say what the others took; else nobody knows."""
    path = run[0] / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    curve = FinishedRun.read(run[0]).curve
    assert curve is not None
    seconds = [point.training_seconds for point in curve]
    assert seconds == pytest.approx(list(itertools.accumulate(record["seconds"] for record in records)))
    path.write_text(json.dumps({**records[-1], "training_seconds": 7.5}) + "\n")
    assert [point.training_seconds for point in FinishedRun.read(run[0]).curve or ()] == [7.5]
    path.write_text(json.dumps(records[-1]) + "\n")
    assert [point.training_seconds for point in FinishedRun.read(run[0]).curve or ()] == [None]


def test_committed_results_stay_readable() -> None:
    runs = [FinishedRun.read(folder) for folder in find_runs(ROOT / "results")]
    assert {"mnist", "sine"} <= {run.dataset for run in runs}
    assert [problem for run in runs for problem in run.problems] == []
