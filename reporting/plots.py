"""The plots of a report, each drawn for a light and for a dark page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perfedavg.engine.scores import confidence_95
from perfedavg.recording.runs import KINDS, PhaseResult
from perfedavg.settings import Phase, Population
from reporting.drawing import png
from reporting.figures import Measure, steps_per_epoch
from reporting.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]
"""Places on the x axis, means, and half the height of the band around them, (num_points,) each; None for no band."""


@dataclass(frozen=True)
class Theme:
    """The colors of a plot: of the page it lies on, of text and lines on it, and of rows and kinds of scores."""

    page: str
    text: str
    grid: str
    rows: tuple[str, ...]
    kinds: tuple[str, str]


Draw = Callable[[Theme], "Figure"]

LIGHT = Theme(
    page="#ffffff",
    text="#1f2328",
    grid="#d8dee4",
    rows=("#0b6bcb", "#c4501b", "#1a8754", "#a02c8f", "#8a6d00", "#4b4fc4", "#c22f4e", "#4a5a66"),
    kinds=("#848d97", "#0b6bcb"),
)
DARK = Theme(
    page="#15181c",
    text="#e6e8eb",
    grid="#363c44",
    rows=("#62b0ff", "#ff9a62", "#4fcf90", "#e58ad8", "#dcc14a", "#a3a6ff", "#ff8298", "#aab8c4"),
    kinds=("#9aa4ae", "#62b0ff"),
)

_LINE_STYLES = ("-", "--", ":", "-.")
"""The colors are used again with the next style, where there are more rows than colors."""
_DOTS_PER_INCH = 110
_LEGEND_WIDTH = 64
_TITLE_WIDTH = 76
"""Letters in a line: of a legend with two columns, of the title of one panel of two."""
_NUM_BINS = 20
_MOST_NAMED_CLIENTS = 40
_NAME_CHARS = 24
_SHOWN_SHARE_OF_LOSSES = 98
"""Percentile of the losses at which their histogram ends; those beyond are in its last bin."""


def render(draw: Callable[[Theme], Figure], theme: Theme) -> bytes:
    """The figure as a PNG."""
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.text)
    colors |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), theme.page)
    colors |= dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), theme.grid)
    settings = {**colors, "axes.grid": True, "axes.axisbelow": True, "font.size": 9}
    return png(lambda: draw(theme), _DOTS_PER_INCH, settings)


@dataclass(frozen=True)
class Panel:
    """Curves beside others. lines: (number of the row, which decides the color, its label, its curve)."""

    title: str
    lines: list[tuple[int, str, Curve]]


def draw_curves(rows: Sequence[Row], measure: Measure) -> Draw | None:
    """Initial and personalized scores against the round, a color a row; means over seeds, and a band of their sample
    deviation. None where no row has a curve.
    """
    curves = {
        kind: [(number, row, mean_curve(row, kind, measure)) for number, row in enumerate(rows)] for kind in KINDS
    }
    panels = [
        Panel(kind, [(number, row.label, curve) for number, row, curve in lines if curve[0].size])
        for kind, lines in curves.items()
    ]
    drawn = [rows[number] for number, *_ in panels[0].lines]
    boundaries = {row.settings["fedavg"]["num_rounds"] for row in drawn if len(row.results) > 1}
    return partial(draw_lines, panels, "round", measure, whose(drawn), boundaries=boundaries) if drawn else None


def draw_epochs(rows: Sequence[Row], measure: Measure) -> Draw | None:
    """A score against the epochs of personalization after each phase, a color a row; means over seeds. None where it
    was not measured.

    The band is the sample deviation over seeds, or for losses with one seed the 95 % confidence interval over clients.
    """
    by_phase: dict[Phase, list[tuple[int, str, Curve]]] = {phase: [] for phase in Phase}
    for number, row in enumerate(rows):
        for phase, results in row.results_by_epoch.items():
            by_phase[phase].append((number, row.label, _epoch_curve(results, measure)))
    panels = [Panel(f"after {phase.label}", lines) for phase, lines in by_phase.items() if lines]
    is_stepwise = not measure.is_accuracy and all(steps_per_epoch(run) == 1 for row in rows for run in row.runs)
    x_label = f"{'steps' if is_stepwise else 'epochs'} of personalization"
    drawn = [row for row in rows if row.results_by_epoch]
    return partial(draw_lines, panels, x_label, measure, whose(drawn), zooms_in=True) if panels else None


def draw_lines(
    panels: Sequence[Panel],
    x_label: str,
    measure: Measure,
    clients: str,
    theme: Theme,
    boundaries: Iterable[int] = (),
    zooms_in: bool = False,
) -> Figure:
    """clients: whose scores they are.  boundaries: places of dotted lines.  zooms_in: as `_scale` takes it."""
    legend_lines = max(len(panel.lines) for panel in panels)
    figure, (all_axes,) = _figure(1, len(panels), 4.0, legend_lines)
    for axes, panel in zip(all_axes, panels, strict=True):
        for number, label, (places, means, band) in panel.lines:
            color = theme.rows[number % len(theme.rows)]
            style = _LINE_STYLES[number // len(theme.rows) % len(_LINE_STYLES)]
            axes.plot(
                places, means, color=color, linestyle=style, linewidth=1.5, marker="o", markersize=2.5, label=label
            )
            if band is not None:
                axes.fill_between(places, means - band, means + band, color=color, alpha=0.15, linewidth=0)
        axes.set(title=panel.title, xlabel=x_label, xlim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
    _scale(all_axes, measure, zooms_in)
    for axes in all_axes:
        for boundary in boundaries:
            axes.axvline(boundary, color=theme.text, linewidth=0.8, linestyle=":")
    all_axes[0].set_ylabel(f"{measure.name}, {clients}")
    _legend_below(figure, all_axes)
    return figure


def whose(rows: Sequence[Row]) -> str:
    """Whom the main figures of rows are of, in words."""
    populations = [one.value for one in Population if any(row.population is one for row in rows)]
    return f"{' or '.join(populations)} clients"


def draw_clients(rows: Sequence[Row], measure: Measure, population: Population) -> Draw | None:
    """Histograms over clients, all seeds together, before and after personalization: a panel a row and phase.

    Of a single run with few clients, each client by its name. None where no clients.csv of such clients could be read.
    """
    drawn = [row for row in rows if any(population in (run.clients or ()) for run in row.runs)]
    if len(drawn) == len(drawn[0].runs if drawn else ()) == 1:
        names = (drawn[0].runs[0].client_names or {})[population]
        if len(names) <= _MOST_NAMED_CLIENTS:
            return partial(_draw_named_clients, drawn[0], names, measure, population)
    if not drawn:
        return None
    scores = {
        f"{row.label}: after {row.after(phase)}": [
            measure.client_scores(row.runs, phase, kind, population) for kind in KINDS
        ]
        for row in drawn
        for phase in row.results
    }
    bins = _bins(np.concatenate([values for by_kind in scores.values() for values in by_kind]), measure)

    def draw(theme: Theme) -> Figure:
        num_columns = min(2, len(scores))
        figure, panels = _figure(-(-len(scores) // num_columns), num_columns, 1.8, legend_lines=1)
        for panel in panels.flat[len(scores) :]:
            panel.set_axis_off()
        for panel, (title, by_kind) in zip(panels.flat, scores.items(), strict=False):
            for kind, values, color in zip(KINDS, by_kind, theme.kinds, strict=True):
                shown = np.clip(values, bins[0], bins[-1])
                weights = np.full(values.size, 100 / values.size)
                panel.hist(shown, bins, weights=weights, color=color, alpha=0.35)
                panel.hist(shown, bins, weights=weights, color=color, histtype="step", linewidth=1.4, label=kind)
            panel.set_title(textwrap.fill(title, _TITLE_WIDTH), fontsize=8, loc="left")
            panel.set_xlim(bins[0], bins[-1])
        for panel in panels.flat[len(scores) - num_columns : len(scores)]:
            panel.tick_params(labelbottom=True)
            panel.set_xlabel(f"{measure.name} of a client on its test part")
        figure.supylabel(f"% of {population.value} clients", fontsize=9)
        _legend_below(figure, panels.flat)
        return figure

    return draw


def _draw_named_clients(
    row: Row, names: Sequence[str], measure: Measure, population: Population, theme: Theme
) -> Figure:
    """A line a client from its initial to its personalized score, the best on top: a panel a phase."""
    figure, (panels,) = _figure(1, len(row.results), 0.2 * len(names) + 0.7, legend_lines=1)
    *_, last = row.results
    order = np.argsort(measure.client_scores(row.runs, last, "personalized", population), kind="stable")
    order = order if measure.higher_is_better else order[::-1]
    places = np.arange(len(names))
    for panel, phase in zip(panels, row.results, strict=True):
        initial, personalized = (measure.client_scores(row.runs, phase, kind, population)[order] for kind in KINDS)
        panel.hlines(places, initial, personalized, color=theme.grid, linewidth=2)
        for kind, values, color in zip(KINDS, (initial, personalized), theme.kinds, strict=True):
            panel.plot(values, places, linestyle="", marker="o", markersize=5, color=color, label=kind)
        panel.set(title=f"after {row.after(phase)}", xlabel=f"{measure.name} of a client on its test part")
        panel.set_xlim(-0.02, 1.02) if measure.is_accuracy else panel.set_xlim(left=0)
    panels[0].set_ylim(-0.6, len(names) - 0.4)
    panels[0].set_yticks(places, [_tick_label(names[place]) for place in order])
    panels[0].set_ylabel(f"{population.value} clients")
    _legend_below(figure, panels)
    return figure


def _tick_label(name: str) -> str:
    """Short, and without the sign that would begin a formula."""
    return (name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 3]}...").replace("$", r"\$")


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


def _bins(scores: NDArray[np.float64], measure: Measure) -> NDArray[np.float64]:
    if measure.is_accuracy:
        return np.linspace(0, 1, _NUM_BINS + 1, dtype=np.float64)
    finite = scores[np.isfinite(scores)]
    highest = float(np.percentile(finite, _SHOWN_SHARE_OF_LOSSES)) if finite.size else 1.0
    return np.linspace(0, highest or 1.0, _NUM_BINS + 1, dtype=np.float64)


def _figure(num_lines: int, num_columns: int, line_height: float, legend_lines: int) -> tuple[Figure, Any]:
    """A figure that belongs to no window, and its panels (num_lines, num_columns), with room for a legend below."""
    from matplotlib.figure import Figure

    size = (max(5.5, 4.8 * num_columns), 0.6 + line_height * num_lines + 0.1 * legend_lines)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(num_lines, num_columns, squeeze=False, sharex=True, sharey=True)


def _scale(panels: Sequence[Axes], measure: Measure, zooms_in: bool) -> None:
    """Accuracies from 0 to 1; losses on a logarithmic scale, down to somewhat below the least that is drawn.

    zooms_in: where all accuracies are high, the axis begins below the least of them, at a twentieth.
    """
    means = np.concatenate([line.get_ydata() for panel in panels for line in panel.lines])
    if measure.is_accuracy:
        least = float(np.nanmin(means)) if zooms_in and np.isfinite(means).any() else 0.0
        panels[0].set_ylim(math.floor(20 * least) / 20, 1.01 if least < 0.9 else 1.002)
        return
    above_zero = means[np.isfinite(means) & (means > 0)]
    panels[0].set_yscale("log")
    if above_zero.size:
        panels[0].set_ylim(bottom=float(above_zero.min()) / 2)


def _legend_below(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels; each label once."""
    by_label = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    wrapped = [textwrap.fill(label, _LEGEND_WIDTH) for label in by_label]
    figure.legend(by_label.values(), wrapped, loc="outside lower center", ncols=min(2, len(wrapped)), fontsize=8)
