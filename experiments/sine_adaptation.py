"""How the sine task's models adapt: the curve of each method's model after some steps on a task's given points."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import utils
from datasets.sources.sine import INPUT_RANGE, SineTasks
from perfedavg.engine.experiment import parameters_sha256
from perfedavg.personal_model import RunModel
from perfedavg.recording.runs import FinishedRun
from perfedavg.settings import ExperimentConfig
from perfedavg.terminal.console import say
from perfedavg.training.client_models import Client
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import LocalTraining
from reporting.figures import counted
from reporting.rows import Row
from reporting.tables import SHOWN_STEPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_PLOTTED_TASKS = 2
"""The first of the unseen ones, so that none is picked for its looks."""


@dataclass(frozen=True)
class TrainedModel:
    """A run's model, with what it takes to adapt it as the run did. label: of its row."""

    label: str
    config: ExperimentConfig
    tasks: SineTasks
    model: nn.Module


def load_models(rows: Sequence[Row], models: Path) -> list[TrainedModel]:
    """The models of one seed, the lowest of which there is any; says which are missing.

    models: holds <method>/seed<k>/, the folders of the runs themselves.
    Raises ValueError where one of them cannot be read, or is not the model that the results are of.
    """
    runs = {(row.label, run.seed): run for row in rows for run in row.runs}
    folders = {key: models / run.path.parent.name / run.path.name for key, run in runs.items()}
    present = [key for key, folder in folders.items() if (folder / "model.safetensors").exists()]
    if not present:
        say(f"no adaptation plot: {models} has no <method>/seed<k>/model.safetensors of these runs (--models)")
        return []
    shown = min(seed for _, seed in present)
    for row in rows:
        if (row.label, shown) not in present:
            say(f"{row.label} is not in the adaptation plot: {models} has no model of it with seed {shown} (--models)")
    return [_load_model(label, runs[label, seed], folders[label, seed]) for label, seed in present if seed == shown]


def _load_model(label: str, run: FinishedRun, folder: Path) -> TrainedModel:
    trained = RunModel.read(folder)
    # Of a joint run too, tasks are wanted as they are; pooling touches those of the training clients only.
    tasks = utils.get_datasets(dataclasses.replace(trained.config, joint=False), folder)
    assert isinstance(tasks, SineTasks), "the run's data set is sine"
    model = utils.get_model(trained.config, tasks)
    trained.load_into(model)
    if parameters_sha256(flatten(model)) != run.result.model_sha256:
        raise ValueError(f"{folder} holds another model than the results in {run.path} are of; name theirs in --models")
    return TrainedModel(label, trained.config, tasks, model)


def plot_adaptation(models: Sequence[TrainedModel]) -> Figure:
    """A column a method, a row a task: the sine, the given points, and the model's curve after each of SHOWN_STEPS."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 3 * len(models), 5.5), layout="constrained")
    grid = figure.subplots(NUM_PLOTTED_TASKS, len(models), squeeze=False, sharex=True, sharey="row")
    for column, model in zip(grid.T, models, strict=True):
        for axes, client_id in zip(column, model.tasks.unseen_client_ids, strict=False):
            _plot_task(axes, model, client_id)
        column[0].set_title(model.label)
        column[-1].set_xlabel("x")
    for axes in grid[:, 0]:
        axes.set_ylabel("y")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _plot_task(axes: Axes, model: TrainedModel, client_id: int) -> None:
    from matplotlib import colormaps

    x = np.linspace(*INPUT_RANGE, 201, dtype=np.float32)
    data = model.tasks.client_data(client_id)
    colors = colormaps["viridis_r"](np.linspace(0.1, 1, len(SHOWN_STEPS)))
    axes.plot(x, model.tasks.task(client_id).values(x), color="black", linestyle="--", label="true sine")
    for (steps, values), color in zip(adapted_curves(model, client_id, x).items(), colors, strict=True):
        axes.plot(x, values, color=color, label=counted(steps, "step"))
    axes.plot(data.train_inputs, data.train_labels, "o", color="tab:red", markersize=4, label="given points")
    axes.grid(alpha=0.3)


def adapted_curves(model: TrainedModel, client_id: int, x: NDArray[np.float32]) -> dict[int, NDArray[np.float32]]:
    """The model's values at x, (num_x,), after each of SHOWN_STEPS on an unseen task's given points.

    It adapts as in the run, whose batch holds all given points, so that their order means nothing.
    """
    data, config = model.tasks.client_data(client_id), model.config
    flat = FlatModel(model.model, precision=config.precision, loss_function=model.tasks.loss_function)
    curves: dict[int, NDArray[np.float32]] = {}

    def record(epochs: dict[int, int]) -> None:
        steps = epochs[0]
        if steps in SHOWN_STEPS:
            flat.module.eval()
            with torch.no_grad():
                curves[steps] = flat(torch.tensor(x)[:, None]).squeeze(1).numpy()

    training = LocalTraining(config.fedavg.client_optimizer, SHOWN_STEPS[-1], config.batch_size)
    seeds = np.random.SeedSequence(config.seed)
    client = Client(data.train_inputs, data.train_labels, seeds)
    flat.train(flat.vector.clone(), [client], training, after_epochs=record)
    return curves
