"""Entry point: the table and the plots of the sine task, from its finished runs.

Rows are the methods: MAML and FOMAML (Finn, Abbeel, Levine 2017, arXiv 1703.03400), Reptile (Nichol, Achiam, Schulman
2018, arXiv 1803.02999), and joint training, the baseline that has no reason to end where adaptation is fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import paths
import utils
from perfedavg.recording.runs import FinishedRun
from perfedavg.terminal.console import command_line, optional, run_entry_point, say, show

if TYPE_CHECKING:  # imported where they are used, so that --help stays fast
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import nn

    from datasets.sources.sine import SineTasks
    from perfedavg.settings import ExperimentConfig

SHOWN_STEPS = (0, 1, 5, 10, 32)
"""Steps on a task's given points after which the table and the plots show the error."""
METHODS = ("maml", "fomaml", "reptile", "joint")
"""The order of the rows; any others come behind."""
NUM_PLOTTED_TASKS = 2
"""The first of the unseen ones, so that none is picked for its looks."""

Rows = Mapping[str, Sequence[FinishedRun]]
"""By method, the runs of its seeds, in their order."""


@dataclass(frozen=True)
class Curve:
    """MSE after 0, 1, .. steps, and half the width of its 95 % confidence interval."""

    means: tuple[float, ...]
    half_widths: tuple[float, ...]


def read_rows(folder: Path) -> Rows:
    """The finished runs of the sine task.

    folder: in it, at any depth, <method>/seed<k>/ with what a run leaves; runs of other data sets are passed over.
    Raises ValueError where there is none, one of them is damaged or did not measure the errors that are shown, or a
    method has a seed twice.
    """

    found: dict[tuple[str, int], FinishedRun] = {}
    for path in sorted(folder.resolve().rglob("seed*/result.json")):
        run = FinishedRun.read(path.parent)
        if run.dataset != "sine":
            continue
        _check_steps(run)
        key = (run.path.parent.name, run.seed)
        if key in found:
            raise ValueError(f"{run.path} and {found[key].path} have the same row and seed; name a folder with one")
        found[key] = run
    if not found:
        raise ValueError(
            f"{folder} holds no finished run of the sine task (<method>/seed<k>/result.json); make them with: "
            f"{command_line([sys.executable, utils.ROOT / 'reproduce.py', '--dataset', 'sine'])}"
        )
    return {
        method: [found[key] for key in sorted(found) if key[0] == method]
        for method in _in_order({method for method, _ in found})
    }


def _check_steps(run: FinishedRun) -> None:
    from reporting.tables import steps_per_epoch

    last = SHOWN_STEPS[-1]
    if len(measured_errors(run)) <= last:
        raise ValueError(f"{run.path} has no errors up to {last} steps; run it with --pers_curve {last}")
    if steps_per_epoch(run) != 1:
        raise ValueError(
            f"{run.path}: an epoch of its personalization is not known to be one step on all given points; run it with "
            "--batch_size 10"
        )


def _in_order(methods: Iterable[str]) -> list[str]:
    return sorted(methods, key=lambda method: (METHODS.index(method) if method in METHODS else len(METHODS), method))


def measured_errors(run: FinishedRun) -> list[tuple[float, float]]:
    """For 0, 1, .. steps, the mean test MSE over the unseen tasks after the last phase, and its population deviation.

    NaN where it is not finite.
    """
    *_, scores = run.phases.values()
    return [
        (math.nan, math.nan) if entry.loss is None or entry.loss_std is None else (entry.loss, entry.loss_std)
        for entry in scores.by_epoch
    ]


def pool(runs: Sequence[FinishedRun]) -> Curve:
    """The tasks of all runs as one sample: its mean m, and half the width of that mean's interval, 1.96 s / sqrt(n).

    With n_k tasks of mean m_k and deviation s_k in run k and n in all, m = sum n_k m_k / n and
    s^2 = sum n_k (s_k^2 + (m_k - m)^2) / n.
    """
    from reporting.tables import confidence_95

    sizes = [run.result.unseen_clients for run in runs]
    total = sum(sizes)
    means, half_widths = [], []
    for errors in zip(*map(measured_errors, runs), strict=False):
        mean = math.fsum(size * loss for size, (loss, _) in zip(sizes, errors, strict=True)) / total
        squares = (size * (std**2 + (loss - mean) ** 2) for size, (loss, std) in zip(sizes, errors, strict=True))
        means.append(mean)
        half_widths.append(confidence_95(math.sqrt(math.fsum(squares) / total), total))
    return Curve(tuple(means), tuple(half_widths))


def table(rows: Rows) -> str:
    """Markdown: a row a method, what the numbers mean, and how far the seeds are apart."""
    lines = [f"| method | seeds | {' | '.join(map(_steps, SHOWN_STEPS))} |", f"|---|---|{'---|' * len(SHOWN_STEPS)}"]
    for method, runs in rows.items():
        curve = pool(runs)
        cells = [f"{curve.means[count]:.3g} ± {curve.half_widths[count]:.2g}" for count in SHOWN_STEPS]
        lines.append(f"| {method} | {len(runs)} | {' | '.join(cells)} |")
    sizes = sorted({run.result.unseen_clients for runs in rows.values() for run in runs})
    last = SHOWN_STEPS[-1]
    lines += [
        "",
        f"Mean squared error over the {' or '.join(map(str, sizes))} unseen tasks of each seed, on all points of a "
        "task, after so many full-batch steps on its given points. ± is the 95 % confidence interval for the draw of "
        "the tasks: normal, with the tasks of all seeds as one sample. It does not cover the chance in the training, "
        f"for which the seeds stand. By seed, after {_steps(last)}:",
        "",
    ]
    for method, runs in rows.items():
        by_seed = ", ".join(f"{measured_errors(run)[last][0]:.3g} (seed {run.seed})" for run in runs)
        lines.append(f"- {method}: {by_seed}")
    return "\n".join(lines)


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def plot_errors(rows: Rows) -> Figure:
    """MSE against steps, a line a method, with its confidence interval as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, runs in rows.items():
        curve = pool(runs)
        steps = range(len(curve.means))
        lows = [mean - half for mean, half in zip(curve.means, curve.half_widths, strict=True)]
        highs = [mean + half for mean, half in zip(curve.means, curve.half_widths, strict=True)]
        (line,) = axes.plot(steps, curve.means, label=method)
        axes.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.set_yscale("log", nonpositive="clip")
    axes.set(xlabel="gradient steps on the given points", ylabel="test MSE, mean over unseen tasks")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


@dataclass(frozen=True)
class TrainedModel:
    """A run's model, with what it takes to adapt it as the run did."""

    method: str
    config: ExperimentConfig
    tasks: SineTasks
    model: nn.Module


def load_models(rows: Rows, models: Path) -> list[TrainedModel]:
    """The models of one seed, the lowest of which there is any; says which are missing.

    models: holds <method>/seed<k>/, the folders of the runs themselves.
    Raises ValueError where one of them cannot be read, or is not the model that the results are of.
    """
    runs = {(run.seed, method): run for method, of_method in rows.items() for run in of_method}
    folders = {(seed, method): models / method / f"seed{seed}" for seed, method in runs}
    present = {key: folder for key, folder in folders.items() if (folder / "model.safetensors").exists()}
    if not present:
        say(f"no adaptation plot: {models} has no <method>/seed<k>/model.safetensors of these runs (--models)")
        return []
    shown = min(seed for seed, _ in present)
    for method in rows:
        if (shown, method) not in present:
            say(f"{method} is not in the adaptation plot: {models / method / f'seed{shown}'} has no model (--models)")
    return [_load_model(method, runs[seed, method], path) for (seed, method), path in present.items() if seed == shown]


def _load_model(method: str, run: FinishedRun, folder: Path) -> TrainedModel:
    from datasets.sources.sine import SineTasks
    from perfedavg.engine.experiment import parameters_sha256
    from perfedavg.personalizing import RunModel
    from perfedavg.training.flat_model import flatten

    trained = RunModel.read(folder)
    # Of a joint run too, tasks are wanted as they are; pooling touches those of the training clients only.
    tasks = utils.get_datasets(dataclasses.replace(trained.config, joint=False), folder)
    assert isinstance(tasks, SineTasks), "the run's data set is sine"
    model = utils.get_model(trained.config, tasks)
    trained.load_into(model)
    if parameters_sha256(flatten(model)) != run.result.model_sha256:
        raise ValueError(f"{folder} holds another model than the results in {run.path} are of; name theirs in --models")
    return TrainedModel(method, trained.config, tasks, model)


def plot_adaptation(models: Sequence[TrainedModel]) -> Figure:
    """A column a method, a row a task: the sine, the given points, and the model's curve after SHOWN_STEPS."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 3 * len(models), 5.5), layout="constrained")
    grid = figure.subplots(NUM_PLOTTED_TASKS, len(models), squeeze=False, sharex=True, sharey="row")
    for column, model in zip(grid.T, models, strict=True):
        for axes, client_id in zip(column, model.tasks.unseen_client_ids, strict=False):
            _plot_task(axes, model, client_id)
        column[0].set_title(model.method)
        column[-1].set_xlabel("x")
    for axes in grid[:, 0]:
        axes.set_ylabel("y")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _plot_task(axes: Axes, model: TrainedModel, client_id: int) -> None:
    import numpy as np
    from matplotlib import colormaps

    from datasets.sources.sine import INPUT_RANGE

    x = np.linspace(*INPUT_RANGE, 201, dtype=np.float32)
    data = model.tasks.client_data(client_id)
    colors = colormaps["viridis_r"](np.linspace(0.1, 1, len(SHOWN_STEPS)))
    axes.plot(x, model.tasks.task(client_id).values(x), color="black", linestyle="--", label="true sine")
    for (steps, values), color in zip(adapted_curves(model, client_id, x).items(), colors, strict=True):
        axes.plot(x, values, color=color, label=_steps(steps))
    axes.plot(data.train_inputs, data.train_labels, "o", color="tab:red", markersize=4, label="given points")
    axes.grid(alpha=0.3)


def adapted_curves(model: TrainedModel, client_id: int, x: NDArray[np.float32]) -> dict[int, NDArray[np.float32]]:
    """The model's values at x, (num_x,), after each of SHOWN_STEPS on an unseen task's given points.

    It adapts as in the run, whose batch holds all given points, so that their order means nothing.
    """
    import numpy as np
    import torch

    from perfedavg.training.flat_model import FlatModel
    from perfedavg.training.local_training import LocalTraining, train_locally

    data, config = model.tasks.client_data(client_id), model.config
    flat = FlatModel(model.model, precision=config.precision)
    curves: dict[int, NDArray[np.float32]] = {}

    def record(steps: int) -> None:
        if steps in SHOWN_STEPS:
            flat.module.eval()
            with torch.no_grad():
                curves[steps] = flat(torch.tensor(x)[:, None]).squeeze(1).numpy()

    record(0)
    training = LocalTraining(config.fedavg.client_optimizer, SHOWN_STEPS[-1], config.batch_size)
    seeds = np.random.SeedSequence(config.seed)
    train_locally(flat, data.train_inputs, data.train_labels, training, seeds, model.tasks.loss_function, record)
    return curves


def _write(draw: Callable[[], Figure], path: Path) -> None:
    """The table is the result: where a plot cannot be had, a line says so."""
    from perfedavg.recording.drawing import png
    from perfedavg.recording.files import replace_file

    with optional(f"no plot in {path}"):
        replace_file(path, png(draw, 120))
        say(f"plot in {path}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Print the errors of the sine task's finished runs as a Markdown table, and draw them (mse.png) "
        "and how the models adapt (adaptation.png).",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=paths.folder, help="with <method>/seed<k>/result.json in it, at any depth")
    parser.add_argument(
        "--output", type=paths.folder, metavar="FOLDER", help="for the plots (default: the first folder)"
    )
    parser.add_argument(
        "--models",
        type=paths.path,
        metavar="FOLDER",
        default=utils.ROOT / "runs" / "reproduce" / "sine",
        help="with <method>/seed<k>/, the folders of these runs, for their models (default: runs/reproduce/sine)",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    rows = read_rows(args.folder)
    show(table(rows))
    output = args.output or args.folder
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output} cannot be made ({error.strerror}); name another folder") from error
    _write(lambda: plot_errors(rows), output / "mse.png")
    models = load_models(rows, args.models)
    if models:
        _write(lambda: plot_adaptation(models), output / "adaptation.png")


if __name__ == "__main__":
    run_entry_point(main)
