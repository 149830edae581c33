"""Lines: scores against rounds, and against epochs of personalization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perfedavg.engine.scores import confidence_95
from perfedavg.recording.runs import KINDS, PhaseResult
from perfedavg.settings import Phase
from reporting.figures import Measure, steps_per_epoch
from reporting.pictures.theme import (
    LINE_STYLES,
    MARKERS,
    SMALL,
    Draw,
    Theme,
    add_legend,
    make_figure,
    plain_text,
    scale,
    wrapped,
)
from reporting.rows import Row, whose

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]
"""Places on the x axis, means, and half the height of the band around them, (num_points,) each; None for no band."""

_MOST_TOGETHER = 5
"""Rows in one panel; more have a panel each, because nobody can follow so many lines."""
_NUM_COLUMNS = 4
_MOST_MARKERS = 12
_PHASES = ("before fine-tuning", "after the last phase")


@dataclass(frozen=True)
class Panel:
    """Lines beside others: label and curve. title: of the panel; may be empty.

    boundary: the place of a dotted line, or None.
    """

    title: str
    lines: list[tuple[str, Curve]]
    boundary: int | None = None


def draw_curves(rows: Sequence[Row], measure: Measure) -> Draw | None:
    """Initial and personalized scores against the round; means over seeds, and a band of their sample deviation.

    Few rows are lines in the same two panels; of more, each has a panel. None where no row has a curve.
    """
    curves = [(row, {kind: mean_curve(row, kind, measure) for kind in KINDS}) for row in rows]
    curves = [(row, by_kind) for row, by_kind in curves if by_kind[KINDS[0]][0].size]
    drawn = [row for row, _ in curves]
    if not drawn:
        return None
    boundaries = [row.settings["fedavg"]["num_rounds"] if len(row.results) > 1 else None for row in drawn]
    if len(drawn) > _MOST_TOGETHER:
        panels = [
            Panel(row.label, list(by_kind.items()), boundary)
            for (row, by_kind), boundary in zip(curves, boundaries, strict=True)
        ]
        return partial(draw_small_panels, panels, "round", measure, whose(drawn))
    common = set(boundaries) - {None}
    boundary = common.pop() if len(common) == 1 else None
    panels = [Panel(kind, [(row.label, by_kind[kind]) for row, by_kind in curves], boundary) for kind in KINDS]
    return partial(draw_lines, panels, "round", measure, whose(drawn), stretches=True)


def draw_epochs(rows: Sequence[Row], measure: Measure) -> Draw | None:
    """A score against the epochs of personalization after each phase; means over seeds. None where it was not measured.

    The band is the sample deviation over seeds, or for losses with one seed the 95 % confidence interval over clients.
    """
    drawn = [row for row in rows if row.results_by_epoch]
    if not drawn:
        return None
    is_stepwise = not measure.is_accuracy and all(steps_per_epoch(run) == 1 for row in rows for run in row.runs)
    x_label = f"{'steps' if is_stepwise else 'epochs'} of personalization"
    curves = {
        row.label: {phase: _epoch_curve(results, measure) for phase, results in row.results_by_epoch.items()}
        for row in drawn
    }
    if len(drawn) > _MOST_TOGETHER:
        panels = [
            Panel(label, list(zip(_PHASES[-len(by_phase) :], by_phase.values(), strict=True)))
            for label, by_phase in curves.items()
        ]
        return partial(draw_small_panels, panels, x_label, measure, whose(drawn))
    panels = [
        Panel(
            f"after {_after(drawn, phase)}",
            [(label, by_phase[phase]) for label, by_phase in curves.items() if phase in by_phase],
        )
        for phase in Phase
    ]
    panels = [panel for panel in panels if panel.lines]
    return partial(draw_lines, panels, x_label, measure, whose(drawn))


def _after(rows: Sequence[Row], phase: Phase) -> str:
    """What the scores of rows come after: what they have in common, or the phase's name."""
    names = {row.after(phase) for row in rows if phase in row.results_by_epoch}
    return names.pop() if len(names) == 1 else phase.label


def draw_lines(
    panels: Sequence[Panel],
    x_label: str,
    measure: Measure,
    clients: str,
    theme: Theme,
    stretches: bool = False,
) -> Figure:
    """Panels side by side, in which a line of the same label looks the same.

    clients: whose scores they are.  stretches: as `scale` takes it.
    """
    labels = list(dict.fromkeys(label for panel in panels for label, _ in panel.lines))
    figure, grid = make_figure(len(panels), len(panels), (4.4, 3.2), -(-len(labels) // 2))
    for axes, panel in zip(grid.flat, panels, strict=True):
        for label, curve in panel.lines:
            _draw_line(axes, curve, plain_text(label), labels.index(label), theme, measure)
        axes.set(title=panel.title, xlabel=x_label)
        _draw_boundary(axes, panel, theme)
    added = scale(grid[0, 0], "y", _all_values(panels, measure), measure, stretches)
    _scale_x(grid.flat, panels)
    grid[0, 0].set_ylabel(f"{measure.name}, {clients}{added}")
    add_legend(figure, grid.flat)
    return figure


def draw_small_panels(panels: Sequence[Panel], x_label: str, measure: Measure, clients: str, theme: Theme) -> Figure:
    """A small panel a row, with the last line of all others behind its own, so that it can be compared with them."""
    figure, grid = make_figure(len(panels), _NUM_COLUMNS, (2.35, 1.75), 1)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for number, (label, curve) in enumerate(panel.lines):
            _draw_kind(axes, curve, label, number + len(theme.kinds) - len(panel.lines), theme, measure)
        for other in panels:
            label, (places, means, _) = other.lines[-1]
            if other is not panel:
                axes.plot(places, means, color=theme.quiet, linewidth=0.6, zorder=1, label=f"{label}, the other rows")
        axes.set_title(wrapped(panel.title), fontsize=SMALL, loc="left")
        _draw_boundary(axes, panel, theme)
    added = scale(grid[0, 0], "y", _all_values(panels, measure), measure, True)
    _scale_x(grid.flat, panels)
    figure.supxlabel(x_label, fontsize=9)
    figure.supylabel(f"{measure.name}, {clients}{added}", fontsize=9)
    add_legend(figure, grid.flat[: len(panels)], num_columns=4, place="upper")
    return figure


def _draw_kind(axes: Axes, curve: Curve, label: str, place: int, theme: Theme, measure: Measure) -> None:
    """The first of two lines is dashed, the second, which is the result, stands out."""
    places, means, band = curve
    color, style, width = ((theme.kinds[0], "--", 1.3), (theme.kinds[1], "-", 1.8))[place]
    axes.plot(places, means, color=color, linestyle=style, linewidth=width, label=label, zorder=3)
    _draw_band(axes, places, means, band, color, measure)


def _draw_line(axes: Axes, curve: Curve, label: str, number: int, theme: Theme, measure: Measure) -> None:
    places, means, band = curve
    color, marker = theme.rows[number % len(theme.rows)], MARKERS[number % len(MARKERS)]
    style = LINE_STYLES[(number + number // len(theme.rows)) % len(LINE_STYLES)]
    every = max(1, -(-len(places) // _MOST_MARKERS))
    axes.plot(
        places,
        means,
        color=color,
        linestyle=style,
        linewidth=1.6,
        marker=marker,
        markersize=4,
        markevery=every,
        label=label,
    )
    _draw_band(axes, places, means, band, color, measure)


def _draw_band(
    axes: Axes,
    places: NDArray[np.float64],
    means: NDArray[np.float64],
    band: NDArray[np.float64] | None,
    color: str,
    measure: Measure,
) -> None:
    if band is not None:
        low, high = _bounds(means, band, measure)
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)


def _bounds(
    means: NDArray[np.float64], band: NDArray[np.float64], measure: Measure
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of a band; an accuracy is 1 at most, and a loss that is drawn by its logarithm above 0."""
    if measure.is_accuracy:
        return np.maximum(means - band, 0), np.minimum(means + band, 1)
    return np.where(means > band, means - band, means / 2), means + band


def _draw_boundary(axes: Axes, panel: Panel, theme: Theme) -> None:
    if panel.boundary is not None:
        axes.axvline(panel.boundary, color=theme.text, linewidth=0.8, linestyle=":", label="fine-tuning begins")


def _scale_x(all_axes: Iterable[Axes], panels: Sequence[Panel]) -> None:
    last = max(float(curve[0].max()) for panel in panels for _, curve in panel.lines if curve[0].size)
    for axes in all_axes:
        axes.set_xlim(-0.02 * last, 1.02 * last)
        axes.locator_params(axis="x", integer=True, nbins=5)


def _all_values(panels: Sequence[Panel], measure: Measure) -> NDArray[np.float64]:
    """Of all lines, with the bands around them."""
    values: list[NDArray[np.float64]] = [np.empty(0)]
    for panel in panels:
        for _, (_, means, band) in panel.lines:
            values += [means] if band is None else [means, *_bounds(means, band, measure)]
    return np.concatenate(values)


def mean_curve(row: Row, kind: str, measure: Measure) -> Curve:
    """The curve of a row: means and sample deviations over its seeds, at the rounds that all their curves have."""
    curves = [
        {point.round_number: getattr(point, kind).get(measure.field) for point in run.curve}
        for run in row.runs
        if run.curve
    ]
    return _over_seeds(curves)


def _epoch_curve(results: Sequence[PhaseResult], measure: Measure) -> Curve:
    curves = [dict(enumerate(scores[measure.field] for scores in result.by_epoch)) for result in results]
    epochs, means, deviations = _over_seeds(curves)
    if len(results) == 1 and not measure.is_accuracy:
        spread = [scores["loss_std"] for scores in results[0].by_epoch]
        deviations = np.array([np.nan if std is None else confidence_95(std, results[0].clients) for std in spread])
    return epochs, means, deviations


def _over_seeds(curves: Sequence[dict[int, float | None]]) -> Curve:
    places = sorted(set.intersection(*map(set, curves))) if curves else []
    values = np.array([[curve[place] for place in places] for curve in curves], dtype=np.float64)
    if not places:
        return np.empty(0), np.empty(0), None
    deviations = values.std(axis=0, ddof=1) if len(curves) > 1 else None
    return np.array(places, dtype=np.float64), values.mean(axis=0), deviations
