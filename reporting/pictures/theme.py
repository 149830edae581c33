"""What all pictures have in common: colors, sizes, the legend, and axes that show how scores differ."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reporting.drawing import png
from reporting.figures import Measure, axis_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """The colors of a picture, which people with any color vision can tell apart (Okabe and Ito 2008).

    page: that it lies on.  text: of words, and of lines that guide.  quiet: of what stands behind.
    rows: of lines in one panel.  kinds: initial and personalized.  hurt: of clients that fare worse after adapting.
    """

    page: str
    text: str
    grid: str
    quiet: str
    rows: tuple[str, ...]
    kinds: tuple[str, str]
    hurt: str


Draw = Callable[[Theme], "Figure"]

LIGHT = Theme(
    page="#ffffff",
    text="#1f2328",
    grid="#dfe4e9",
    quiet="#b4bcc4",
    rows=("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#1f2328"),
    kinds=("#7a838c", "#0072b2"),
    hurt="#d55e00",
)
DARK = Theme(
    page="#15181c",
    text="#e6e8eb",
    grid="#2c3239",
    quiet="#59626c",
    rows=("#56b4e9", "#ff8c42", "#2fcf9f", "#e08fc4", "#f0e442", "#a3a6ff", "#e6e8eb"),
    kinds=("#9aa4ae", "#56b4e9"),
    hurt="#ff8c42",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":")
"""Where colors are alike, as in grey print, marker and style tell lines apart."""
TITLE_WIDTH = 30
"""Letters in a line, of a small panel's title and of a row's name beside an axis."""
SMALL = 8
"""Points: of legends, titles of small panels, and numbers at axes."""

_DOTS_PER_INCH = 130
_LEGEND_WIDTH = 64
_STRETCH = 0.005
"""The error at which a stretched axis ends: the smaller, the more room the last percents have."""
_STRETCHED_TICKS = (
    1,
    0.99,
    0.98,
    0.95,
    0.9,
    0.8,
    0.5,
    0,
    0.97,
    0.96,
    0.94,
    0.92,
    0.85,
    0.7,
    0.6,
    0.4,
    0.2,
    0.995,
    0.985,
)
"""Those that come first are shown where there is no room for all."""
_HIGH = 0.9
_MANY_TIMES = 5
_MOST_TICKS = {"x": 6, "y": 10}
_LEGEND_MARKERS = 1.3


def render(draw: Callable[[Theme], Figure], theme: Theme) -> bytes:
    """The figure as a PNG."""
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.text)
    colors |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), theme.page)
    colors |= dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), theme.grid)
    sizes = {"font.size": 9, "axes.titlesize": 9, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL}
    settings = {**colors, **sizes, "axes.grid": True, "axes.axisbelow": True}
    return png(lambda: draw(theme), _DOTS_PER_INCH, settings)


def make_figure(
    num_panels: int, num_columns: int, panel: tuple[float, float], legend_lines: int, share_x: bool = True
) -> tuple[Figure, NDArray[Any]]:
    """A figure that belongs to no window, with room for a legend below, and its panels, (num_lines, num_columns).

    panel: width and height of each, in inches.  Places without a panel are left empty, with the axis' numbers above.
    """
    from matplotlib.figure import Figure

    num_lines = -(-num_panels // num_columns)
    width = max(5.5, panel[0] * num_columns + 0.5)
    figure = Figure(figsize=(width, panel[1] * num_lines + 0.6 + 0.18 * legend_lines), layout="constrained")
    panels = figure.subplots(num_lines, num_columns, squeeze=False, sharex=share_x, sharey=True)
    for empty in panels.flat[num_panels:]:
        empty.set_axis_off()
    for above in panels.flat[max(0, num_panels - num_columns) : num_panels]:
        above.tick_params(labelbottom=True)
    return figure, panels


def scale(axes: Axes, name: str, values: NDArray[np.float64], measure: Measure, stretches: bool = False) -> str:
    """Let an axis begin and end a little beyond the values; losses have a logarithmic one.

    name: `x` or `y`.
    stretches: where accuracies are high, and some much higher than others, distances near 100 % are drawn larger, in
        proportion to the logarithm of the error.
    Returns what to add to the axis' label.
    """
    values = values[np.isfinite(values)]
    set_limits, axis = (axes.set_xlim, axes.xaxis) if name == "x" else (axes.set_ylim, axes.yaxis)
    set_scale = axes.set_xscale if name == "x" else axes.set_yscale
    if not measure.is_accuracy:
        positive = values[values > 0]
        set_scale("log")
        if positive.size:
            set_limits(float(positive.min()) / 1.3, float(positive.max()) * 1.3)
        return ""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if stretches and low < _HIGH < high and 1 - low > _MANY_TIMES * (1 - high):
        set_scale("function", functions=(_stretched, _unstretched))
        begin, end = _stretched(np.array([low, high]))
        margin = 0.05 * (end - begin)
        begin, end = begin - margin, min(end + margin, float(_stretched(np.array(1 + _STRETCH / 10))))
        set_limits(*_unstretched(np.array([begin, end])))
        ticks = [tick for tick in _STRETCHED_TICKS if begin < _stretched(np.array(tick)) < end]
        axis.set_ticks(_apart(ticks, (end - begin) / _MOST_TICKS[name]))
        added = " (stretched towards 100 %)"
    else:
        margin = 0.04 * max(high - low, 0.01)
        set_limits(low - margin, high + margin)
        added = ""
    axis.set_major_formatter(lambda value, _: axis_percent(value))
    return added


def scale_differences(axes: Axes, values: NDArray[np.float64], measure: Measure) -> None:
    """Let a linear x axis begin and end a little beyond the values, and show their signs."""
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * max(high - low, 0.01)
    axes.set_xlim(low - margin, high + margin)
    axes.locator_params(axis="x", nbins=_MOST_TICKS["x"])
    if measure.is_accuracy:
        axes.xaxis.set_major_formatter(
            lambda value, _: axis_percent(value) if value <= 0 else f"+{axis_percent(value)}"
        )


def _stretched(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    place: NDArray[np.float64] = -np.log10(np.maximum(1 + _STRETCH - accuracy, _STRETCH / 10))
    return place


def _unstretched(place: NDArray[np.float64]) -> NDArray[np.float64]:
    accuracy: NDArray[np.float64] = 1 + _STRETCH - np.power(10.0, -place)
    return accuracy


def _apart(ticks: Sequence[float], least: float) -> list[float]:
    """Those of the ticks that have room for their numbers beside earlier ones. least: distance between two."""
    kept: list[float] = []
    for tick in ticks:
        if all(abs(_stretched(np.array(tick)) - _stretched(np.array(other))) >= least for other in kept):
            kept.append(tick)
    return sorted(kept)


def add_legend(figure: Figure, panels: Iterable[Axes], num_columns: int = 2, place: str = "lower") -> None:
    """One legend for all panels; each label once. place: `lower`, or `upper` where words stand below the panels."""
    by_label = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    lines = [textwrap.fill(label, _LEGEND_WIDTH) for label in by_label]
    figure.legend(
        by_label.values(),
        lines,
        loc=f"outside {place} center",
        ncols=min(num_columns, len(lines)),
        fontsize=SMALL,
        frameon=False,
        markerscale=_LEGEND_MARKERS,
    )


def wrapped(label: str) -> str:
    """A row's name, in lines that a small panel has room for, without the sign that would begin a formula."""
    return textwrap.fill(plain_text(label), TITLE_WIDTH)


def plain_text(text: str) -> str:
    return text.replace("$", r"\$")
