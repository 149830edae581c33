"""Clients before and after they adapt: all of them in order of their initial scores, or few by their names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perfedavg.recording.runs import KINDS
from perfedavg.settings import Population
from reporting.figures import Measure, SeedMean, percent
from reporting.pictures.theme import SMALL, Draw, Theme, add_legend, make_figure, plain_text, scale, wrapped
from reporting.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMED_CLIENTS = 40
_NAME_CHARS = 24
_MOST_ROWS_WITH_ALL_PHASES = 2
_NUM_COLUMNS = 4


def draw_clients(rows: Sequence[Row], measure: Measure, population: Population) -> Draw | None:
    """Each client before and after personalization, all seeds together: a panel a row, of few rows also a phase.

    Of a single run with few clients, each client by its name. None where no clients.csv of such clients could be read.
    """
    drawn = [row for row in rows if any(population in (run.clients or ()) for run in row.runs)]
    if len(drawn) == len(drawn[0].runs if drawn else ()) == 1:
        names = (drawn[0].runs[0].client_names or {})[population]
        if len(names) <= _MOST_NAMED_CLIENTS:
            return partial(_draw_named_clients, drawn[0], names, measure, population)
    has_all = len(drawn) <= _MOST_ROWS_WITH_ALL_PHASES
    panels = []
    for row in drawn:
        for phase in list(row.results_of(population))[0 if has_all else -1 :]:
            scores = np.stack([measure.client_scores(row.runs, phase, kind, population) for kind in KINDS])
            title = f"{row.label}, after {row.after(phase)}" if has_all else row.label
            panels.append((title, in_order(scores[:, np.isfinite(scores).all(axis=0)])))
    panels = [(title, scores) for title, scores in panels if scores.size]
    return partial(_draw_all_clients, panels, measure, population) if panels else None


def in_order(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Clients by their initial scores, and of one initial score by their personalized ones.

    scores: initial and personalized, (2, num_clients); so is what is returned.
    """
    return scores[:, np.lexsort(scores[::-1])]


def _draw_all_clients(
    panels: Sequence[tuple[str, NDArray[np.float64]]], measure: Measure, population: Population, theme: Theme
) -> Figure:
    num_columns = min(_NUM_COLUMNS, len(panels))
    size = (2.35, 1.85) if len(panels) > num_columns or num_columns > 2 else (4.4, 3.2)
    figure, grid = make_figure(len(panels), num_columns, size, 1)
    for axes, (title, scores) in zip(grid.flat, panels, strict=False):
        initial, personalized = scores
        shares = (np.arange(initial.size) + 0.5) / initial.size * 100
        is_hurt = personalized < initial if measure.higher_is_better else personalized > initial
        dot = float(np.clip(60 * size[0] / initial.size, 1.6, 4.5))
        axes.plot(
            shares[~is_hurt],
            personalized[~is_hurt],
            linestyle="",
            marker="o",
            markersize=dot,
            markeredgewidth=0,
            color=theme.kinds[1],
            label="personalized",
        )
        axes.plot(
            shares[is_hurt],
            personalized[is_hurt],
            linestyle="",
            marker="x",
            markersize=dot + 1.6,
            markeredgewidth=0.8,
            color=theme.hurt,
            label="personalized, worse than before",
        )
        axes.step(shares, initial, where="mid", color=theme.text, linewidth=1.1, label="initial")
        hurt = percent(SeedMean(float(is_hurt.mean())), digits=1)
        axes.set_title(f"{wrapped(title)}: {hurt} worse", fontsize=SMALL, loc="left")
        axes.set_xlim(-1, 101)
        axes.set_xticks([0, 25, 50, 75, 100])
    added = scale(grid[0, 0], "y", np.concatenate([scores.ravel() for _, scores in panels]), measure)
    figure.supxlabel(f"% of {population.value} clients, in order of their initial {measure.name}", fontsize=9)
    figure.supylabel(f"{measure.name}{added}", fontsize=9)
    add_legend(figure, grid.flat[: len(panels)], num_columns=3, place="upper")
    return figure


def _draw_named_clients(
    row: Row, names: Sequence[str], measure: Measure, population: Population, theme: Theme
) -> Figure:
    """A line a client from its initial to its personalized score, the best on top: a panel a phase."""
    phases = list(row.results_of(population))
    order = np.argsort(measure.client_scores(row.runs, phases[-1], "personalized", population), kind="stable")
    order = order if measure.higher_is_better else order[::-1]
    figure, grid = make_figure(len(phases), len(phases), (4.4, 0.2 * len(names) + 0.7), 1)
    scores = [[measure.client_scores(row.runs, phase, kind, population)[order] for kind in KINDS] for phase in phases]
    for axes, phase, by_kind in zip(grid.flat, phases, scores, strict=True):
        _draw_pairs(axes, by_kind, measure, theme)
        axes.set(title=f"after {row.after(phase)}", xlabel=f"{measure.name} of a client on its test part")
    scale(grid[0, 0], "x", np.concatenate([values for by_kind in scores for values in by_kind]), measure)
    grid[0, 0].set_ylim(-0.6, len(names) - 0.4)
    grid[0, 0].set_yticks(np.arange(len(names)), [_tick_label(names[place]) for place in order])
    grid[0, 0].set_ylabel(f"{population.value} clients")
    add_legend(figure, grid.flat, num_columns=3)
    return figure


def _draw_pairs(axes: Axes, by_kind: Sequence[NDArray[np.float64]], measure: Measure, theme: Theme) -> None:
    initial, personalized = by_kind
    places = np.arange(len(initial))
    is_hurt = personalized < initial if measure.higher_is_better else personalized > initial
    axes.hlines(
        places, initial, personalized, colors=[theme.hurt if one else theme.quiet for one in is_hurt], linewidth=2
    )
    # Behind and larger, so that it is seen where both are the same.
    axes.plot(
        initial,
        places,
        linestyle="",
        marker="o",
        markersize=6,
        markerfacecolor=theme.page,
        color=theme.text,
        label="initial",
    )
    axes.plot(personalized, places, linestyle="", marker="o", markersize=4, color=theme.kinds[1], label="personalized")


def _tick_label(name: str) -> str:
    """Short, and without the sign that would begin a formula."""
    return plain_text(name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 3]}...")
