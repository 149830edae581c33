"""Methods as points with their intervals: the picture of the main table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perfedavg.recording.runs import KINDS
from perfedavg.settings import Population
from reporting.comparison import Reference, paired_differences, scores_by_seed
from reporting.figures import Measure, SeedMean
from reporting.intervals import confidence_interval, mean_over_seeds
from reporting.pictures.theme import SMALL, Draw, Theme, add_legend, make_figure, scale, scale_differences, wrapped
from reporting.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Estimates = dict[Population, NDArray[np.float64]]
"""Of a row, by population: mean, lower and upper bound, (3,)."""

_WORDS = {Population.UNSEEN: "unseen clients", Population.TRAINED: "clients that trained"}
_MARKERS = {Population.UNSEEN: "o", Population.TRAINED: "s"}
_MOST_ROOM = 1.5
"""Times the length that an axis needs for the others, for a row that may lie outside."""
_APART = 0.2
"""Of a row's height, from its middle to the points of either population."""


@dataclass(frozen=True)
class Column:
    """A panel: what each row is estimated at. zero: of differences, the row that they are from; else empty."""

    title: str
    rows: list[Estimates]
    zero: str = ""


def draw_methods(rows: Sequence[Row], reference: Reference | None, measure: Measure) -> Draw | None:
    """Each row's mean after its last phase with its 95 % interval, in a panel each for initial and personalized scores,
    and in a third the differences of personalized scores from the reference's, of the same clients.

    None where there are no two rows to compare.
    """
    scores = [{population: scores_by_seed(row, measure, population) for population in row.populations} for row in rows]
    drawn = [row for row, found in zip(rows, scores, strict=True) if any(found.values())]
    if len(drawn) < 2:
        return None
    columns = [
        Column(kind, [_estimates(found, place, measure.is_accuracy) for found in scores if any(found.values())])
        for place, kind in enumerate(KINDS)
    ]
    if reference is not None:
        differences = [
            {
                population: paired_differences(row, reference.row, measure, population)
                for population in ([] if row is reference.row else row.populations)
            }
            for row in drawn
        ]
        columns.append(
            Column(f"{KINDS[-1]}, difference", [_estimates(one, -1) for one in differences], reference.row.label)
        )
    may_lie_outside = [row.is_local_only for row in drawn]
    return partial(_draw_methods, [row.label for row in drawn], columns, may_lie_outside, measure)


def _estimates(
    by_population: Mapping[Population, Sequence[NDArray[np.float64]]],
    column: int,
    is_share: bool = False,
) -> Estimates:
    """Of those populations whose values are known and finite. A single client has no interval but its own score.

    column: of each client's values.  is_share: whether a value, and so the end of an interval, is in 0..1.
    """
    estimates = {}
    for population, values in by_population.items():
        if values:
            mean = mean_over_seeds(values)[column]
            bounds = confidence_interval(values)[:, column]
            bounds = np.where(np.isnan(bounds), mean, bounds)
            estimates[population] = np.array([mean, *(np.clip(bounds, 0, 1) if is_share else bounds)])
    return {population: values for population, values in estimates.items() if np.isfinite(values).all()}


def _draw_methods(
    labels: Sequence[str], columns: Sequence[Column], may_lie_outside: Sequence[bool], measure: Measure, theme: Theme
) -> Figure:
    """may_lie_outside: rows so far from the others that these could not be told apart, if the axis had room for all;
    where they do, an arrow has the figure.
    """
    populations = [each for each in Population if any(each in found for found in columns[0].rows)]
    size = (9.2 / len(columns), 0.3 * len(labels) + 0.5)
    figure, grid = make_figure(len(columns), len(columns), size, 1, share_x=False)
    for axes, column in zip(grid.flat, columns, strict=True):
        values = _values(column, column.rows)
        others = _values(column, [one for one, may in zip(column.rows, may_lie_outside, strict=True) if not may])
        if others.size and np.ptp(values) > _MOST_ROOM * np.ptp(others):
            values = others
        if column.zero:
            axes.axvline(0, color=theme.text, linewidth=0.8, linestyle=":", zorder=1)
            scale_differences(axes, values, measure)
            axes.set_xlabel(f"{wrapped(f'from {column.zero},')}\nsame clients")
            if column.zero in labels:
                place = (0, labels.index(column.zero))
                axes.annotate("reference", place, (4, 0), textcoords="offset points", va="center", fontsize=SMALL)
        else:
            added = scale(axes, "x", values, measure, stretches=column.title == KINDS[-1])
            axes.set_xlabel(f"{measure.name}{added}")
        shown = _inside(axes, column, measure)
        for population in populations:
            _draw_points(axes, shown, population, populations, theme)
        axes.set_title(column.title)
    first = grid[0, 0]
    first.set_yticks(np.arange(len(labels)), [wrapped(label) for label in labels], fontsize=SMALL)
    first.set_ylim(len(labels) - 0.4, -0.6)
    add_legend(figure, grid.flat, num_columns=3)
    return figure


def _values(column: Column, rows: Sequence[Estimates]) -> NDArray[np.float64]:
    """That an axis has to show: of differences, 0 too."""
    return np.concatenate([np.zeros(1 if column.zero else 0), *(one for found in rows for one in found.values())])


def _inside(axes: Axes, column: Column, measure: Measure) -> list[Estimates]:
    """The estimates whose means are within the axis; of any other, words say where it is."""
    left, right = axes.get_xlim()
    inside: list[Estimates] = []
    for place, found in enumerate(column.rows):
        inside.append({each: values for each, values in found.items() if left < values[0] < right})
        for population in found.keys() - inside[-1].keys():
            mean = float(found[population][0])
            text = (measure.difference if column.zero else measure.text)(SeedMean(mean))
            is_left = mean < (left + right) / 2
            axes.annotate(
                f"\N{LEFTWARDS ARROW} {text}" if is_left else f"{text} \N{RIGHTWARDS ARROW}",
                (0.02 if is_left else 0.98, place),
                xycoords=("axes fraction", "data"),
                ha="left" if is_left else "right",
                va="center",
                fontsize=SMALL,
            )
    return inside


def _draw_points(
    axes: Axes, rows: Sequence[Estimates], population: Population, populations: Sequence[Population], theme: Theme
) -> None:
    is_first = population is populations[0]
    shift = (-_APART if is_first else _APART) if len(populations) > 1 else 0
    color = theme.kinds[1] if population is Population.UNSEEN else theme.hurt
    places = np.array([place + shift for place, found in enumerate(rows) if population in found])
    values = np.array([found[population] for found in rows if population in found]).reshape(-1, 3)
    means, low, high = values.T
    axes.hlines(places, low, high, color=color, linewidth=1.6)
    axes.plot(
        means,
        places,
        linestyle="",
        marker=_MARKERS[population],
        markersize=5,
        color=color,
        markerfacecolor=color if is_first else theme.page,
        label=f"{_WORDS[population]}, with 95 % interval",
    )
