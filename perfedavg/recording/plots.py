"""The pictures of a run: its learning curve, and what personalization did to each unseen client."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perfedavg.engine.scores import ClientScore
from perfedavg.recording.drawing import png
from perfedavg.recording.files import replace_file
from perfedavg.settings import Phase

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from perfedavg.engine.experiment import RoundRecord

INITIAL_COLOR, PERSONALIZED_COLOR = "#7f7f7f", "#1f77b4"
_DOTS_PER_INCH = 120


@dataclass(frozen=True)
class _Measure:
    """What is drawn. name: in a summary and in a ClientScore.  highest: of the axis, or None for the data's own."""

    name: str
    highest: float | None


_ACCURACY, _LOSS = _Measure("accuracy", 1.01), _Measure("loss", None)


def write_plots(folder: Path, curve: Sequence[RoundRecord], scores: dict[Phase, list[ClientScore]]) -> None:
    """Write accuracy.png and clients.png into a folder, which is created. Raises OSError, or what drawing fails with.

    curve: the records of rounds that were evaluated, in order.  scores: of all unseen clients, after each phase.
    Of a regression, which has no accuracies, the pictures are of losses: loss.png and clients.png.
    """
    folder.mkdir(exist_ok=True)
    measure = _LOSS if any(math.isnan(row.initial_accuracy) for rows in scores.values() for row in rows) else _ACCURACY
    for name, draw in (
        (f"{measure.name}.png", partial(_learning_curve, curve, measure)),
        ("clients.png", partial(_client_histograms, scores, measure)),
    ):
        replace_file(folder / name, png(draw, _DOTS_PER_INCH))


def _figure(columns: int) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(1.5 + 5 * columns, 4.2), layout="constrained")


def _learning_curve(curve: Sequence[RoundRecord], measure: _Measure) -> Figure:
    figure = _figure(2)
    axes = figure.subplots(1, 1)
    offset = 0
    for phase in dict.fromkeys(record.phase for record in curve):
        records = [record for record in curve if record.phase is phase]
        rounds = [offset + record.round_number for record in records]
        for kind, color in (("initial", INITIAL_COLOR), ("personalized", PERSONALIZED_COLOR)):
            values = [record.evaluation[kind][measure.name] for record in records if record.evaluation]
            label = kind if offset == 0 else None
            axes.plot(rounds, values, color=color, marker="o", markersize=3, label=label)
        if offset:
            axes.axvline(offset, color="black", linewidth=0.8, linestyle=":")
        axes.text(offset, 1.02, f" {phase.label}", transform=axes.get_xaxis_transform())
        offset += records[-1].round_number
    axes.set(xlabel="round", ylabel=f"{measure.name} on unseen clients (uniform mean)", xlim=(0, None))
    axes.set_ylim(0, measure.highest)
    axes.grid(alpha=0.3)
    if offset:
        axes.legend(loc="best")
    return figure


def _client_histograms(scores: dict[Phase, list[ClientScore]], measure: _Measure) -> Figure:
    figure = _figure(len(scores))
    all_axes = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    shown = [row for rows in scores.values() for row in rows]
    bins = np.linspace(0, 1 if measure is _ACCURACY else max(row.initial_loss for row in shown), 21)
    for axes, (phase, rows) in zip(all_axes, scores.items(), strict=True):
        for kind, color in (("initial", INITIAL_COLOR), ("personalized", PERSONALIZED_COLOR)):
            values = [getattr(row, f"{kind}_{measure.name}") for row in rows]
            axes.hist(values, bins=bins, color=color, alpha=0.65, label=f"{kind}, mean {np.mean(values):.3f}")
        axes.set(title=f"after {phase.label}", xlabel=f"{measure.name} of a client on its test part")
        axes.legend(loc="best")
    all_axes[0].set_ylabel("unseen clients")
    return figure
