"""A user's own images: a folder of client/class/image.png."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datasets.clients import NamedClient, StoredClients, cached_clients

IMAGE_SIZE = (28, 28)
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif")


def load_image_folder(folder: Path) -> StoredClients:
    """A client for each folder in `folder`, a class for each folder in any of them; names in sorted order.

    Images are 28x28, bright ink on a dark ground, and are read as grey. Names that begin with a dot are passed over;
    among them is the cache, `.cache`, in which the images are kept as one array.
    Raises ValueError, with the file, for anything that is no such image and for a link that leads out of the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"--data_root {folder} is no folder; --dataset folder reads client/class/image.png below it")
    images = sorted(path for path in folder.glob("*/*/*") if not _is_hidden(path.relative_to(folder)))
    for path in images:
        _check_inside(path, folder)
    classes = sorted({path.parent.name for path in images})
    if not images:
        raise ValueError(f"--data_root {folder} holds no client/class/image.png")
    clients = _read_clients(folder, images, classes)
    return cached_clients(folder / ".cache", "folder", images, clients, len(classes))


def _read_clients(folder: Path, images: list[Path], classes: list[str]) -> Iterator[NamedClient]:
    numbers = {name: number for number, name in enumerate(classes)}
    owned: dict[str, list[Path]] = {}
    for path in images:
        owned.setdefault(path.relative_to(folder).parts[0], []).append(path)
    for name, paths in owned.items():
        labels = np.array([numbers[path.parent.name] for path in paths], dtype=np.int64)
        yield NamedClient(name, np.stack([_read_image(path) for path in paths]), labels)


def _read_image(path: Path) -> NDArray[np.uint8]:
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path} is no image: its name must end in one of {', '.join(ENDINGS)}")
    try:
        with Image.open(path) as image:
            if image.size != IMAGE_SIZE:  # known from the header, before any pixel is decoded
                raise ValueError(f"{path} is {image.size[0]}x{image.size[1]}, not 28x28; scale it")
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _check_inside(path: Path, folder: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} leads out of {folder}; replace the link by the file")
    if not path.is_file():
        raise ValueError(f"{path} is no file; the layout is client/class/image.png")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
