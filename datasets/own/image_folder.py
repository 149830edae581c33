"""A user's own images: a folder of client/class/image.png, or of one person's class/image.png."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datasets.clients.stored import NamedClient, NewClients, StoredClients, stored_clients
from datasets.sources.image_files import GREY_28, ImageForm, are_blank, image_size, read_image, shown_size
from datasets.storage import tell
from perfedavg.own_files import UNTOLD, OwnFiles, sides

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
MOST_UNASKED = 256
"""Pixels of a side of images that are read in their own size without being told so; models grow with it."""


def load_image_folder(folder: Path, files: OwnFiles = UNTOLD) -> StoredClients:
    """A client for each folder in `folder`, a class for each folder in any of them; names in sorted order.

    Images have one size, unless they are scaled to one; see `form_of` and `read_image`. Names that begin with a dot are
    passed over; among them is the cache, `.cache`, in which the images are kept as one array.
    Raises ValueError, with the file, for anything that is no such image and for a link that leads out of the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; --dataset folder reads client/class/image.png below it")
    images = _images_below(folder, "client/class/image.png")
    if not images:
        raise ValueError(f"{folder} holds no client/class/image.png")
    classes = sorted({path.parent.name for path in images})
    form = _form_of(images[0], files)

    def read() -> NewClients:
        about = f"{folder.name}: images are read as {form}; --image_size and --image_color choose another form"
        return NewClients(
            _read_clients(images, classes, form), classes, about="" if str(form) == str(GREY_28) else about
        )

    return stored_clients(folder / ".cache", f"folder-{form.name}", images, read)


def read_class_folders(folder: Path, form: ImageForm = GREY_28) -> dict[str, NDArray[np.uint8]]:
    """One person's images, as `read_image` gives them, by the name of their class's folder; names in sorted order.

    The layout is class/image.png; all else is as for `load_image_folder`, but that there is no cache.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name one that holds class/image.png")
    images = {
        name: np.stack([_read_image(path, form) for path in paths])
        for name, paths in groupby(_images_below(folder, "class/image.png"), lambda path: path.parent.name)
    }
    if not images:
        raise ValueError(f"{folder} holds no class/image.png")
    if all(map(are_blank, images.values())):
        tell(f"{folder}: each image has one and the same grey all over")
    return images


def _form_of(first: Path, files: OwnFiles) -> ImageForm:
    """What the images of a folder are brought to: the size that is asked for, or that of the first of them."""
    if files.image_size is not None:
        return ImageForm(sides(files.image_size), files.image_color, is_scaled=True, is_chosen=True)
    _check_ending(first)
    size = image_size(first)
    if max(size) > MOST_UNASKED:
        raise ValueError(
            f"{first} is {shown_size(size)}, more than {MOST_UNASKED} pixels a side; have the images scaled, such as "
            f"by --image_size 32, or name their own size (--image_size {shown_size(size)})"
        )
    return ImageForm(size, files.image_color, is_chosen=True)


def _images_below(folder: Path, layout: str) -> list[Path]:
    """The files of that layout in sorted order, but for those with a name that begins with a dot."""
    found = []
    for path in sorted(folder.glob("/".join("*" for _ in layout.split("/")))):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} leads out of {folder}; replace the link by the file")
        if not path.is_file():
            raise ValueError(f"{path} is no file; the layout is {layout}")
        found.append(path)
    return found


def _read_clients(images: list[Path], classes: list[str], form: ImageForm) -> Iterator[NamedClient]:
    for name, paths in groupby(images, lambda path: path.parents[1].name):
        own = list(paths)
        labels = np.array([classes.index(path.parent.name) for path in own], dtype=np.int64)
        yield NamedClient(name, np.stack([_read_image(path, form) for path in own]), labels)


def _read_image(path: Path, form: ImageForm) -> NDArray[np.uint8]:
    _check_ending(path)
    return read_image(path, str(path), form)


def _check_ending(path: Path) -> None:
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path} is no image: its name must end in one of {', '.join(ENDINGS)}")
