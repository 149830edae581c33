"""The pictures of a run: its accuracy curve, and what personalization did to each unseen client."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perfedavg.config import Phase
from perfedavg.files import replace_file
from perfedavg.scores import ClientScore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from perfedavg.experiment import RoundRecord

INITIAL_COLOR, PERSONALIZED_COLOR = "#7f7f7f", "#1f77b4"


def write_plots(folder: Path, curve: Sequence[RoundRecord], scores: dict[Phase, list[ClientScore]]) -> None:
    """Write accuracy.png and clients.png into the folder, which is created. Raises OSError.

    curve: the records of rounds that were evaluated, in order.  scores: of all unseen clients, after each phase.
    """
    folder.mkdir(exist_ok=True)
    for name, figure in (("accuracy.png", _accuracy_curve(curve)), ("clients.png", _client_accuracies(scores))):
        image = io.BytesIO()
        figure.savefig(image, dpi=120)
        replace_file(folder / name, [image.getbuffer()])


def _figure(columns: int) -> Figure:
    """A figure that belongs to no window and no global state, so that any thread may draw it."""
    from matplotlib.figure import Figure  # costs half a second, which only a finished run should pay

    return Figure(figsize=(1.5 + 5 * columns, 4.2), layout="constrained")


def _accuracy_curve(curve: Sequence[RoundRecord]) -> Figure:
    figure = _figure(2)
    axes = figure.subplots(1, 1)
    offset = 0
    for phase in dict.fromkeys(record.phase for record in curve):
        records = [record for record in curve if record.phase is phase]
        rounds = [offset + record.round_number for record in records]
        for kind, color in (("initial", INITIAL_COLOR), ("personalized", PERSONALIZED_COLOR)):
            accuracies = [record.evaluation[kind]["accuracy"] for record in records if record.evaluation]
            label = kind if offset == 0 else None
            axes.plot(rounds, accuracies, color=color, marker="o", markersize=3, label=label)
        if offset:
            axes.axvline(offset, color="black", linewidth=0.8, linestyle=":")
        axes.text(offset, 1.02, f" {phase.label}", transform=axes.get_xaxis_transform())
        offset += records[-1].round_number
    axes.set(xlabel="round", ylabel="accuracy on unseen clients (uniform mean)", ylim=(0, 1.01), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def _client_accuracies(scores: dict[Phase, list[ClientScore]]) -> Figure:
    figure = _figure(len(scores))
    all_axes = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    bins = np.linspace(0, 1, 21)
    for axes, (phase, rows) in zip(all_axes, scores.items(), strict=True):
        for kind, color in (("initial", INITIAL_COLOR), ("personalized", PERSONALIZED_COLOR)):
            values = [getattr(row, f"{kind}_accuracy") for row in rows]
            axes.hist(values, bins=bins, color=color, alpha=0.65, label=f"{kind}, mean {np.mean(values):.3f}")
        axes.set(title=f"after {phase.label}", xlabel="accuracy of a client on its test part")
        axes.legend(loc="upper left")
    all_axes[0].set_ylabel("unseen clients")
    return figure
