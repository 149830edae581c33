"""The work that every contestant of `round.py` does: the same clients' data, the same model, the same local steps.

`write` makes random images in MNIST's or EMNIST's own file format, so that this project reads them as it reads the real
ones, and hands what it then reads (each training client's tensors, the initial model, the settings) to the rivals in
one .npz file, because they may run without this project's dependencies.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import utils
from perfedavg.training.flat_model import flatten

EXAMPLES_A_CLIENT = 125
"""Of which this project trains on 80 %, and so the rivals too: 100, in 5 batches."""
UNSEEN_EXAMPLES_A_CLIENT = 10
"""Scoring them is no part of a round, so there are few."""
MODELS = {"emnist_cnn": ("emnist", 62), "mnist_cnn": ("mnist", 10)}
"""The data set whose model it is, and its number of classes."""


def experiment_flags(model: str, num_clients: int, num_rounds: int, folder: Path) -> list[str]:
    """This project's flags for a run whose training clients all take part in every round, with FedAvg's plain mean.

    num_clients: that train.  folder: as `write` has filled it.
    """
    flags = ["--dataset", MODELS[model][0], "--data_root", str(folder), "--partition", "iid", "--device", "cpu"]
    flags += ["--client_num_in_total", str(num_clients + num_unseen(num_clients)), "--unseen_fraction", "0.2"]
    flags += ["--client_num_per_round", str(num_clients), "--rounds", str(num_rounds), "--local_epochs", "5"]
    flags += ["--server_lr", "1", "--server_momentum", "0", "--fine_tune_method", "none", "--eval_every", "1000000"]
    return [*flags, "--personalization_epochs", "1"]


def num_unseen(num_clients: int) -> int:
    """Of the clients in total, so that they are the fifth that is never seen in training."""
    assert num_clients % 4 == 0, "the clients that train are four fifths of all"
    return num_clients // 4


def write(model: str, num_clients: int, folder: Path) -> Path:
    """Fill the folder with a workload of `num_clients` training clients. Returns the rivals' file.

    Its arrays: inputs (num_clients, 100, 1, 28, 28) float32, labels (num_clients, 100) int64, parameters
    (num_parameters,) float32 in the order of `module.parameters()`; and the settings, each of shape ().
    """
    name, num_classes = MODELS[model]
    _write_images(name, num_classes, num_clients, folder)
    config = utils.get_args("single", experiment_flags(model, num_clients, 1, folder)).experiment
    dataset = utils.get_datasets(config, folder)
    clients = [dataset.client_data(client_id) for client_id in dataset.train_client_ids]
    assert len(clients) == num_clients, "every training client takes part"
    path = folder / "workload.npz"
    np.savez(
        path,
        inputs=np.stack([client.train_inputs.numpy() for client in clients]),
        labels=np.stack([client.train_labels.numpy() for client in clients]),
        parameters=flatten(utils.get_model(config, dataset)).numpy(),
        model=model,
        num_classes=num_classes,
        batch_size=config.batch_size,
        local_epochs=config.fedavg.num_local_epochs,
        local_lr=config.fedavg.client_optimizer.learning_rate,
    )
    return path


def _write_images(name: str, num_classes: int, num_clients: int, folder: Path) -> None:
    is_emnist = name == "emnist"
    raw = folder / ("EMNIST" if is_emnist else "MNIST") / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    train, test = ("emnist-byclass-train", "emnist-byclass-test") if is_emnist else ("train", "t10k")
    sizes = {train: num_clients * EXAMPLES_A_CLIENT, test: num_unseen(num_clients) * UNSEEN_EXAMPLES_A_CLIENT}
    for prefix, size in sizes.items():
        images = generator.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, num_classes, size, dtype=np.uint8)
        _write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        _write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)


def _write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())
