"""The table and the plot of the sine task: errors against steps on a task's given points, a row a method."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perfedavg.engine.scores import confidence_95
from perfedavg.recording.runs import FinishedRun
from reporting.figures import Measure, counted, steps_per_epoch
from reporting.pictures.lines import Curve, Panel, draw_lines
from reporting.pictures.theme import Draw
from reporting.rows import Row, group_rows, leave_out_repeats
from reporting.tables import SHOWN_STEPS


def read_rows(folder: Path, order: Sequence[str] = ()) -> list[Row]:
    """The finished runs of the sine task; none where there is none.

    folder: in it, at any depth, <method>/seed<k>/ with what a run leaves; runs of other data sets are passed over.
    order: of the methods; any others come behind.
    Raises ValueError where one of them is damaged, did not measure the errors that are shown, or repeats another one.
    """
    found = map(FinishedRun.read, sorted(path.parent for path in folder.resolve().rglob("seed*/result.json")))
    runs, repeats = leave_out_repeats([run for run in found if run.dataset == "sine"])
    if repeats:
        raise ValueError(f"{repeats[0]}; name a folder with one of them")
    last = SHOWN_STEPS[-1]
    for run in runs:
        if len(errors_by_step(run)) <= last:
            raise ValueError(f"{run.path} has no errors up to {last} steps; run it with --personalization_curve {last}")
        if steps_per_epoch(run) != 1:
            raise ValueError(
                f"{run.path}: an epoch of its personalization is not known to be one step on all given points; run it "
                "with --batch_size 10"
            )
    return group_rows(runs, order)


def errors_by_step(run: FinishedRun) -> NDArray[np.float64]:
    """After 0, 1, .. steps, mean and population deviation of the test MSE over the unseen tasks, (num_steps + 1, 2).

    Those after the last phase; NaN where one is not finite.
    """
    *_, last = run.phases.values()
    return np.array([(entry["loss"], entry["loss_std"]) for entry in last.by_epoch], dtype=np.float64).reshape(-1, 2)


def pool(runs: Sequence[FinishedRun]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """After 0, 1, .. steps, the mean over the tasks of all runs as one sample, and half the width of its 95 % interval.

    With n_k tasks of mean m_k and deviation s_k in run k and n in all, m = sum n_k m_k / n and
    s^2 = sum n_k (s_k^2 + (m_k - m)^2) / n; half the width is 1.96 s / sqrt(n).
    """
    sizes = [run.result.unseen_clients for run in runs]
    errors = [errors_by_step(run) for run in runs]
    num_steps = min(map(len, errors))
    means, deviations = (np.array([some[:num_steps, column] for some in errors]) for column in (0, 1))
    mean = np.average(means, axis=0, weights=sizes)
    variance = np.average(deviations**2 + (means - mean) ** 2, axis=0, weights=sizes)
    return mean, np.array([confidence_95(deviation, sum(sizes)) for deviation in np.sqrt(variance)])


def to_markdown(rows: Sequence[Row]) -> str:
    """A table with a row a method, what its numbers mean, and how far the seeds are apart."""
    headers = ["method", "seeds", *(counted(count, "step") for count in SHOWN_STEPS)]
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for row in rows:
        means, half_widths = pool(row.runs)
        cells = [f"{means[count]:.3g} ± {half_widths[count]:.2g}" for count in SHOWN_STEPS]
        lines.append(f"| {row.label} | {len(row.runs)} | {' | '.join(cells)} |")
    sizes = sorted({run.result.unseen_clients for row in rows for run in row.runs})
    last = SHOWN_STEPS[-1]
    lines += [
        "",
        f"Mean squared error over the {' or '.join(map(str, sizes))} unseen tasks of each seed, on all points of a "
        "task, after so many full-batch steps on its given points. ± is the 95 % confidence interval for the draw of "
        "the tasks: normal, with the tasks of all seeds as one sample. It does not cover the chance in the training, "
        f"for which the seeds stand. By seed, after {counted(last, 'step')}:",
        "",
    ]
    for row in rows:
        by_seed = ", ".join(f"{errors_by_step(run)[last, 0]:.3g} (seed {run.seed})" for run in row.runs)
        lines.append(f"- {row.label}: {by_seed}")
    return "\n".join(lines)


def draw_errors(rows: Sequence[Row]) -> Draw:
    """MSE against steps, a line a method, with its confidence interval as a band."""
    lines: list[tuple[str, Curve]] = []
    for row in rows:
        means, half_widths = pool(row.runs)
        lines.append((row.label, (np.arange(len(means), dtype=np.float64), means, half_widths)))
    return partial(
        draw_lines,
        [Panel("", lines)],
        "gradient steps on the given points",
        Measure("loss", "test MSE"),
        "unseen clients",
    )
