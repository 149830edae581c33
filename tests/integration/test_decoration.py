"""What is measured is on disk before anything is drawn, and no picture, progress or event costs a result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY, Launched, digits_dataset, finish, make_config, read_result
from torch import nn

from perfedavg.engine.executor import LocalExecutor
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.run_folder import RunFolder
from reporting.pictures import theme
from reporting.run_plots import draw_run_plots

NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def run(folder: RunFolder) -> None:
    config, dataset = make_config(), digits_dataset(20)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    run_and_record(config, LocalExecutor(config, model, dataset), dataset, model, folder, {"world_size": 1})


def test_a_run_from_a_notebook_ends_with_its_result_and_its_plots(launched: Launched, tmp_path: Path) -> None:
    """The variable that a notebook sets for itself names a backend that is not installed; files in the way besides."""
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe\n")
    (tmp_path / "styles").write_text("text.usetex: True\n")
    environment = {**os.environ, **NOTEBOOK, "MATPLOTLIBRC": str(tmp_path / "styles"), "TQDM_NCOLS": "wide"}
    words = [*TINY, "--run_dir", tmp_path / "run"]
    status, output, errors = finish(launched.start("quick_start.py", *words, env=environment, cwd=tmp_path))
    assert status == 0, errors
    assert "after fine-tuning" in output
    assert read_result(tmp_path / "run")["after_fine_tune"]
    drawn = {path.name for path in (tmp_path / "run" / "plots").iterdir()}
    assert drawn == {"accuracy.png", "clients.png", "trained-clients.png"}


@pytest.mark.parametrize("error", [MemoryError(), ImportError("no matplotlib"), RuntimeError("a fault of its own")])
def test_plots_that_cannot_be_drawn_cost_a_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(theme, "png", fail)
    folder = RunFolder(tmp_path / "run")
    run(folder)
    draw_run_plots(folder.path)
    assert (tmp_path / "run" / "result.json").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"no plots in {tmp_path / 'run' / 'plots'}")
    assert last.endswith(str(error) or "MemoryError")


def test_the_result_is_complete_before_a_plot_is_drawn(tmp_path: Path) -> None:
    """A process that is killed while it draws leaves a finished run."""
    run(RunFolder(tmp_path / "run", {}, checkpoint_every=1))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"result.json", "model.safetensors", "clients.csv", "metrics.jsonl", "config.json"} <= names
    assert "checkpoint" not in names


def test_a_tensorboard_that_does_not_import_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its release may not fit the protobuf that is installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    run(RunFolder(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["after_fine_tune"]
    assert capsys.readouterr().err.count("no events for TensorBoard from now on") == 1


def test_a_report_whose_plots_cannot_be_drawn_has_its_tables(tmp_path: Path, launched: Launched) -> None:
    """Its page says which plots are missing and why."""
    run(RunFolder(tmp_path / "run"))
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib.figure'] = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = ["report.py", tmp_path / "run", "--output", tmp_path / "report"]
    status, output, errors = finish(launched.start(*words, env=environment))
    assert status == 0, errors
    assert "| digits" in output or "personalized" in output
    assert "no plot digits-clients: " in errors
    assert "The plot digits-clients could not be drawn: " in (tmp_path / "report" / "report.html").read_text()


def test_a_description_is_shown_though_its_plot_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    command = [sys.executable, "-m", "datasets.describe", "--plot", str(tmp_path / "file" / "x.png")]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **NOTEBOOK})
    assert answer.returncode == 2
    assert answer.stdout.startswith("digits: ")
    assert answer.stderr.startswith(f"error: --plot {tmp_path / 'file' / 'x.png'} cannot be written (Not a directory)")
