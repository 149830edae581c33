"""python -m datasets.describe --dataset NAME [--plot FILE]: what a data set looks like when it is dealt out.

An entry point like those at the root, with their flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import utils
from launch.settings import NAMED_BY_DATASET
from perfedavg.contracts import FederatedDataset, client_label
from perfedavg.own_files import shown_dataset
from perfedavg.recording.files import replace_file
from perfedavg.terminal.console import show
from perfedavg.terminal.entry_point import run_entry_point
from reporting.drawing import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SAMPLE = 1000
"""Clients that are read for the statistics; where there are more, as many are taken at even distances."""

CLIENTS_IN_LABEL_MIX, CLIENTS_IN_GRID, EXAMPLES_IN_GRID = 40, 8, 12
TICK_CHARS = 24
IN_COLOUR = 3
"""Channels of an image whose colours are shown; of others, the first one is."""


@dataclass(frozen=True)
class Description:
    """Statistics over the clients that were read.

    labels: of all examples of each sampled client; classes, or (num_examples, ...) classes of places, or targets.
    """

    name: str
    dataset: FederatedDataset
    client_ids: list[int]
    labels: list[NDArray[Any]]

    @property
    def has_classes(self) -> bool:
        return self.labels[0].dtype.kind == "i"

    @property
    def label_counts(self) -> NDArray[np.int64]:
        """(num_sampled, num_classes) labels of each class that each sampled client has."""
        return np.stack([np.bincount(own.reshape(-1), minlength=self.dataset.num_classes) for own in self.labels])

    def text(self) -> str:
        dataset = self.dataset
        num_clients = len(dataset.train_client_ids) + len(dataset.unseen_client_ids)
        sampled = f" (of {len(self.client_ids)} clients)" if len(self.client_ids) < num_clients else ""
        about, note = getattr(dataset, "about", ""), getattr(dataset, "note", "")
        kind = f"{dataset.num_classes} classes" if self.has_classes else "labels are numbers"
        lines = [
            *([about] if about else []),
            f"{self.name}: {num_clients} clients, {len(dataset.train_client_ids)} train and "
            f"{len(dataset.unseen_client_ids)} are unseen; {kind}",
            f"left out, too small to train and be scored: {getattr(dataset, 'num_left_out', 0)} clients",
            f"examples a client, min, median, max: {_spread(np.array([len(own) for own in self.labels]))}{sampled}",
            f"{self._spread_of_labels()}{sampled}",
            f"fingerprint: {dataset.fingerprint}",
            *([f"note: {note}"] if note else []),
        ]
        return "\n".join(lines)

    def _spread_of_labels(self) -> str:
        if self.has_classes:
            return f"classes a client, min, median, max: {_spread((self.label_counts > 0).sum(axis=1))}"
        means = np.array([own.mean() for own in self.labels]).round(4)
        return f"a client's mean label, min, median, max: {_spread(means)}"


def describe(name: str, dataset: FederatedDataset) -> Description:
    """Read the clients, or MAX_SAMPLE of them."""
    everyone = [dataset.train_client_ids, dataset.unseen_client_ids]
    share = min(1.0, MAX_SAMPLE / sum(map(len, everyone)))
    client_ids = [client_id for ids in everyone for client_id in _evenly(ids, max(1, round(share * len(ids))))]
    clients = map(dataset.client_data, client_ids)
    labels = [np.concatenate([data.train_labels.numpy(), data.test_labels.numpy()]) for data in clients]
    return Description(name, dataset, client_ids, labels)


def plot(description: Description) -> Figure:
    """The labels of some clients, and (of images) a row of examples of a few of them."""
    from matplotlib.figure import Figure

    dataset = description.dataset
    first = dataset.client_data(description.client_ids[0])
    has_images = first.train_inputs.ndim == 4
    figure = Figure(figsize=(10, 9 if has_images else 4.5), layout="constrained")
    figures = figure.subfigures(2, 1, height_ratios=(1, 1)) if has_images else [figure]
    what, draw = (
        ("label mix, a column", _plot_label_mix) if description.has_classes else ("labels, a box", _plot_labels)
    )
    figures[0].suptitle(f"{description.name}: {what} a client")
    draw(figures[0], description)
    if has_images:
        figures[1].suptitle("examples, a row a client")
        _plot_examples(figures[1], description)
    return figure


def _plot_label_mix(figure: Figure, description: Description) -> None:
    rows = _evenly(range(len(description.client_ids)), CLIENTS_IN_LABEL_MIX)
    counts = description.label_counts[rows]
    shares = counts / counts.sum(axis=1, keepdims=True)
    axes = figure.subplots()
    image = axes.imshow(shares.T, aspect="auto", cmap="viridis", interpolation="nearest", origin="lower")
    axes.set(xlabel="client", ylabel="class", xticks=range(0, len(rows), 5))
    _name_clients(axes, description, rows[::5])
    figure.colorbar(image, ax=axes, label="share of the client's examples")


def _plot_labels(figure: Figure, description: Description) -> None:
    rows = _evenly(range(len(description.client_ids)), CLIENTS_IN_LABEL_MIX)
    axes = figure.subplots()
    axes.boxplot([description.labels[row].reshape(-1) for row in rows], positions=range(len(rows)), whis=(0, 100))
    axes.set(xlabel="client", ylabel="label", xticks=range(0, len(rows), 5))
    _name_clients(axes, description, rows[::5])


def _name_clients(axes: Axes, description: Description, rows: Sequence[int]) -> None:
    """Names at the ticks of the x axis."""
    labels = [_tick_label(description.dataset, description.client_ids[row]) for row in rows]
    named = any(not label.isdecimal() for label in labels)
    axes.set_xticklabels(labels, rotation=30 if named else 0, ha="right" if named else "center")


def _plot_examples(figure: Figure, description: Description) -> None:
    client_ids = _evenly(description.client_ids, CLIENTS_IN_GRID)
    grid = figure.subplots(len(client_ids), 1, squeeze=False)[:, 0]
    for axes, client_id in zip(grid, client_ids, strict=True):
        inputs = description.dataset.client_data(client_id).train_inputs[:EXAMPLES_IN_GRID].numpy()
        images = inputs.transpose(0, 2, 3, 1) if inputs.shape[1] == IN_COLOUR else inputs[:, 0]
        blank = np.zeros((EXAMPLES_IN_GRID - len(images), *images.shape[1:]), dtype=images.dtype)
        axes.imshow(np.clip(np.concatenate([*images, *blank], axis=1), 0, 1), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(_tick_label(description.dataset, client_id), rotation=0, ha="right", va="center")


def _tick_label(dataset: FederatedDataset, client_id: int) -> str:
    """A client's number and name, short; `$` would begin a formula."""
    label = client_label(dataset, client_id)
    return (label if len(label) <= TICK_CHARS else f"{label[: TICK_CHARS - 3]}...").replace("$", r"\$")


def _evenly(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, at even distances."""
    positions = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[position] for position in positions.tolist()]


def _spread(values: NDArray[Any]) -> str:
    return f"{values.min():g}, {np.median(values):g}, {values.max():g}"


def main() -> None:
    args = utils.get_args("describe")
    description = describe(shown_dataset(args.dataset), utils.load_clients(args, args.data_root))
    show(description.text())
    if args.plot is not None:
        file = Path(f"{description.name}.png") if args.plot == NAMED_BY_DATASET else args.plot
        image = png(lambda: plot(description), 110)
        try:
            replace_file(file, image)
        except OSError as error:
            raise ValueError(f"--plot {file} cannot be written ({error.strerror}); name another file") from error
        show(f"plot in {file}")


if __name__ == "__main__":
    run_entry_point(main)
