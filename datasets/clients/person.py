"""One person's labelled images: what personalize.py adapts a model to, and scores it on."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.clients.split import count_train, cut_examples
from datasets.own.image_folder import read_class_folders
from datasets.sources.image_files import GREY_28, ImageForm
from perfedavg.contracts import ClientData
from perfedavg.seeding import Purpose, data_stream


def load_person(
    folder: Path, class_names: Sequence[str], test_fraction: Fraction, seed: int, form: ImageForm = GREY_28
) -> ClientData:
    """The images of a folder that holds class/image.png, as a client whose parts are cut as a federated client's are.

    class_names: of the model; label i stands for the i-th. See `label_of` for what its folder may be called.
    test_fraction: share of the images, above 0 and below 1, that the model is scored on and does not adapt to. Both
        parts have an image at least; which images are in which follows from the seed.
    form: of the images that the model takes.
    Raises ValueError, with the file or folder, for what is no such image, for a folder that is no class of the
    model, and for fewer than two images.
    """
    by_name = read_class_folders(folder, form)
    sizes = [len(images) for images in by_name.values()]
    labels = np.repeat([_known_label(folder / name, class_names) for name in by_name], sizes).astype(np.int64)
    if len(labels) < 2:
        raise ValueError(f"{folder} holds 1 image; add another: one to adapt to, and one to be scored on")
    order = np.random.default_rng(data_stream(seed, Purpose.LOCAL_CUT, 0)).permutation(len(labels))
    num_train = count_train(len(labels), test_fraction)
    return cut_examples(np.concatenate([*by_name.values()])[order], labels[order], num_train)


def label_of(folder_name: str, class_names: Sequence[str]) -> int | None:
    """The label of the class that a folder is named after, or None where it is none.

    A folder has the class's name, or its label where no class is called by another number than its label, or the name
    in other letters: in the other case, where that leaves one class; with `-` for `/`, which no folder's name can hold;
    with accents composed in another way, as some systems' file names are.
    """
    if folder_name in class_names:
        return class_names.index(folder_name)
    labels = [str(label) for label in range(len(class_names))]
    names_mislead = any(name.isdecimal() and name != label for name, label in zip(class_names, labels, strict=True))
    if folder_name in labels and not names_mislead:
        return int(folder_name)
    alike = [label for label, name in enumerate(class_names) if _folded(name) == _folded(folder_name)]
    return alike[0] if len(alike) == 1 else None


def has_bright_ground(inputs: Tensor) -> bool:
    """Whether most of the outermost pixels of the images, (num_images, channels, height, width) in 0..1, are bright."""
    edges = (inputs[..., 0, :], inputs[..., -1, :], inputs[..., :, 0], inputs[..., :, -1])
    return bool(torch.cat(edges, dim=-1).median() > 0.5)


def _known_label(class_folder: Path, class_names: Sequence[str]) -> int:
    label = label_of(class_folder.name, class_names)
    if label is None:
        known = ", ".join(name.replace("/", "-") for name in class_names)
        raise ValueError(f"{class_folder} is named after no class of the run; rename it to one of {known}")
    return label


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().replace("/", "-")
