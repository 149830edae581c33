"""A user's own images: a folder of client/class/image.png, or of one person's class/image.png."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datasets.clients.stored import NamedClient, StoredClients, cached_clients
from datasets.sources.image_files import are_blank, read_image
from datasets.storage import tell

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif")


def load_image_folder(folder: Path) -> StoredClients:
    """A client for each folder in `folder`, a class for each folder in any of them; names in sorted order.

    Images are 28x28, bright ink on a dark ground; see `read_image`. Names that begin with a dot are passed over; among
    them is the cache, `.cache`, in which the images are kept as one array.
    Raises ValueError, with the file, for anything that is no such image and for a link that leads out of the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"--data_root {folder} is no folder; --dataset folder reads client/class/image.png below it")
    images = _images_below(folder, "client/class/image.png")
    if not images:
        raise ValueError(f"--data_root {folder} holds no client/class/image.png")
    classes = sorted({path.parent.name for path in images})
    clients = _read_clients(images, classes)
    return cached_clients(folder / ".cache", "folder", images, clients, classes)


def read_class_folders(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """One person's images, (num_images, 28, 28), by the name of their class's folder; names in sorted order.

    The layout is class/image.png; all else is as for `load_image_folder`, but that there is no cache.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name one that holds class/image.png")
    images = {
        name: np.stack([_read_image(path) for path in paths])
        for name, paths in groupby(_images_below(folder, "class/image.png"), lambda path: path.parent.name)
    }
    if not images:
        raise ValueError(f"{folder} holds no class/image.png")
    if all(map(are_blank, images.values())):
        tell(f"{folder}: each image has one and the same grey all over")
    return images


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


def _read_clients(images: list[Path], classes: list[str]) -> Iterator[NamedClient]:
    for name, paths in groupby(images, lambda path: path.parents[1].name):
        own = list(paths)
        labels = np.array([classes.index(path.parent.name) for path in own], dtype=np.int64)
        yield NamedClient(name, np.stack([_read_image(path) for path in own]), labels)


def _read_image(path: Path) -> NDArray[np.uint8]:
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path} is no image: its name must end in one of {', '.join(ENDINGS)}")
    return read_image(path, str(path))
