"""The plots of a single run, in its own folder, drawn when its results are there."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from perfedavg.recording.files import replace_file
from perfedavg.recording.runs import KINDS, FinishedRun
from perfedavg.settings import Population
from perfedavg.terminal.console import optional
from reporting.figures import ACCURACY, Measure
from reporting.pictures.clients import draw_clients
from reporting.pictures.lines import Panel, draw_lines, mean_curve
from reporting.pictures.theme import LIGHT, render
from reporting.rows import group_rows, whose


def draw_run_plots(run_folder: Path) -> None:
    """Write plots/accuracy.png, the learning curve of a run that has rounds, and plots/clients.png and, beside unseen
    clients, trained-clients.png, clients before and after personalization.

    Of a regression, which has no accuracies, they are of losses, and the first is loss.png. Where drawing fails, for
    whatever reason, a line says so.
    """
    folder = run_folder / "plots"
    with optional(f"no plots in {folder} (the results are complete; report.py draws the same)"):
        (row,) = group_rows([FinishedRun.read(run_folder)])
        measure = ACCURACY if row.has_accuracy else Measure("loss", "loss")
        drawn = {"clients": draw_clients([row], measure, row.population)}
        if row.population is Population.UNSEEN:
            drawn["trained-clients"] = draw_clients([row], measure, Population.TRAINED)
        if row.runs[0].curve:
            boundary = row.settings["fedavg"]["num_rounds"] if len(row.results) > 1 else None
            panel = Panel("", [(kind, mean_curve(row, kind, measure)) for kind in KINDS], boundary)
            drawn[measure.field] = partial(draw_lines, [panel], "round", measure, whose([row]))
        folder.mkdir(exist_ok=True)
        for name, draw in drawn.items():
            if draw is not None:
                replace_file(folder / f"{name}.png", render(draw, LIGHT))
