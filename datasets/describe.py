"""python -m datasets.describe --dataset NAME [--plot FILE]: what a data set looks like when it is dealt out.

An entry point like those at the root, with their flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
    from matplotlib.figure import Figure

MAX_SAMPLE = 1000
"""Clients that are read for the statistics; where there are more, as many are taken at even distances."""

CLIENTS_IN_LABEL_MIX, CLIENTS_IN_GRID, EXAMPLES_IN_GRID = 40, 8, 12
TICK_CHARS = 24


@dataclass(frozen=True)
class Description:
    """Statistics over the clients that were read.

    label_counts: (num_sampled, num_classes) examples of each class that each sampled client has.
    """

    name: str
    dataset: FederatedDataset
    client_ids: list[int]
    label_counts: NDArray[np.int64]

    def text(self) -> str:
        dataset, sizes = self.dataset, self.label_counts.sum(axis=1)
        num_left_out = getattr(dataset, "num_left_out", 0)
        classes = (self.label_counts > 0).sum(axis=1)
        num_clients = len(dataset.train_client_ids) + len(dataset.unseen_client_ids)
        sampled = f" (of {len(self.client_ids)} clients)" if len(self.client_ids) < num_clients else ""
        about = getattr(dataset, "about", "")
        lines = [
            *([about] if about else []),
            f"{self.name}: {num_clients} clients, {len(dataset.train_client_ids)} train and "
            f"{len(dataset.unseen_client_ids)} are unseen; {dataset.num_classes} classes",
            f"left out, too small to train and be scored: {num_left_out} clients",
            f"examples a client, min, median, max: {_spread(sizes)}{sampled}",
            f"classes a client, min, median, max: {_spread(classes)}{sampled}",
            f"fingerprint: {dataset.fingerprint}",
        ]
        note = getattr(dataset, "note", "")
        return "\n".join([*lines, f"note: {note}"] if note else lines)


def describe(name: str, dataset: FederatedDataset) -> Description:
    """Read the clients, or MAX_SAMPLE of them. Raises ValueError where labels are numbers to predict, not classes."""
    everyone = [dataset.train_client_ids, dataset.unseen_client_ids]
    if dataset.client_data(dataset.train_client_ids[0]).train_labels.is_floating_point():
        raise ValueError(f"--dataset {name} has no classes to describe; its labels are numbers")
    share = min(1.0, MAX_SAMPLE / sum(map(len, everyone)))
    client_ids = [client_id for ids in everyone for client_id in _evenly(ids, max(1, round(share * len(ids))))]
    counts = []
    for client_id in client_ids:
        data = dataset.client_data(client_id)
        labels = np.concatenate([data.train_labels.numpy(), data.test_labels.numpy()])
        counts.append(np.bincount(labels, minlength=dataset.num_classes))
    return Description(name, dataset, client_ids, np.stack(counts))


def plot(description: Description) -> Figure:
    """The label mix of some clients, and (of images) a row of examples of a few of them."""
    from matplotlib.figure import Figure

    dataset = description.dataset
    first = dataset.client_data(description.client_ids[0])
    has_images = first.train_inputs.ndim == 4
    figure = Figure(figsize=(10, 9 if has_images else 4.5), layout="constrained")
    figures = figure.subfigures(2, 1, height_ratios=(1, 1)) if has_images else [figure]
    figures[0].suptitle(f"{description.name}: label mix, a column a client")
    _plot_label_mix(figures[0], description)
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
    labels = [_tick_label(description.dataset, description.client_ids[row]) for row in rows[::5]]
    named = any(not label.isdecimal() for label in labels)
    axes.set_xticklabels(labels, rotation=30 if named else 0, ha="right" if named else "center")
    figure.colorbar(image, ax=axes, label="share of the client's examples")


def _plot_examples(figure: Figure, description: Description) -> None:
    client_ids = _evenly(description.client_ids, CLIENTS_IN_GRID)
    grid = figure.subplots(len(client_ids), 1, squeeze=False)[:, 0]
    for axes, client_id in zip(grid, client_ids, strict=True):
        images = description.dataset.client_data(client_id).train_inputs[:EXAMPLES_IN_GRID, 0].numpy()
        blank = np.zeros((EXAMPLES_IN_GRID - len(images), *images.shape[1:]), dtype=images.dtype)
        axes.imshow(np.concatenate([*images, *blank], axis=1), cmap="gray", vmin=0, vmax=1)
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


def _spread(values: NDArray[np.int64]) -> str:
    return f"{values.min()}, {np.median(values):g}, {values.max()}"


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
