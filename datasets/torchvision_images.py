"""MNIST, Fashion-MNIST and EMNIST: downloaded through torchvision on first use, checked and mapped on every use."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import socket
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from time import sleep
from urllib.error import HTTPError

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from compat import import_torchvision
from datasets.class_names import BALANCED, BYCLASS, DIGITS, FASHION, LETTERS
from datasets.idx import map_idx
from datasets.partitioned import ImageSplits

IMAGE_SHAPE = (28, 28)

PAUSES_SECONDS = (1.0, 2.0, 4.0)
"""Before the second attempt and each one after it; an attempt tries every mirror once."""

SILENCE_SECONDS = 60.0
"""A mirror that sends nothing for so long has failed."""

TRANSFER_ERRORS = (OSError, RuntimeError, HTTPException)
UNPACK_ERRORS = (OSError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Source:
    """A data set that torchvision knows.

    torchvision_name: of the class that says the mirrors and the checksums, and of the folder.
    train_prefix, test_prefix: beginnings of the file names.
    class_names: label i stands for the i-th.
    first_label: in the files; here labels begin at 0.
    transposed: the files hold each image with rows and columns exchanged.
    """

    torchvision_name: str
    train_prefix: str
    test_prefix: str
    class_names: tuple[str, ...]
    first_label: int = 0
    transposed: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def raw(self, data_root: Path) -> Path:
        """The folder of the unpacked files."""
        return data_root / self.torchvision_name / "raw"


def _emnist(split: str, class_names: tuple[str, ...], first_label: int = 0) -> Source:
    return Source("EMNIST", f"emnist-{split}-train", f"emnist-{split}-test", class_names, first_label, transposed=True)


SOURCES = {
    "emnist": _emnist("byclass", BYCLASS),
    "emnist_balanced": _emnist("balanced", BALANCED),
    "emnist_letters": _emnist("letters", LETTERS, first_label=1),
    "emnist_digits": _emnist("digits", DIGITS),
    "mnist": Source("MNIST", "train", "t10k", DIGITS),
    "fashion_mnist": Source("FashionMNIST", "train", "t10k", FASHION),
}
"""MNIST: LeCun et al. 1998. Fashion-MNIST: Xiao et al. 2017. EMNIST: Cohen et al. 2017, `emnist` being its byclass."""

IMAGE_NAMES = tuple(SOURCES)


def load_images(name: str, data_root: Path) -> ImageSplits:
    """A data set's published splits, upright, with labels from 0, read-only and paged in as they are used.

    name: one of IMAGE_NAMES.  data_root: folder of the data files, into which missing ones are downloaded.
    Raises ValueError where the files cannot be had, are damaged, or lie elsewhere.
    """
    source = SOURCES[name]
    _download_if_missing(name, source, data_root)
    try:
        train = _read_split(source, source.train_prefix, data_root)
        test = _read_split(source, source.test_prefix, data_root)
    except ValueError as error:
        shared = ", which all EMNIST data sets share," if source.torchvision_name == "EMNIST" else ""
        raise ValueError(
            f"{error}; replace it, or delete {source.raw(data_root)}{shared} to download {name} anew"
        ) from error
    return ImageSplits(*train, *test, source.num_classes, source.class_names)


def _read_split(source: Source, prefix: str, data_root: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    raw = source.raw(data_root)
    images_path, labels_path = raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"
    for path in (images_path, labels_path):
        _refuse_link_out_of(data_root, path)
    images, labels = map_idx(images_path, 3), map_idx(labels_path, 1).astype(np.int64)
    if images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"{images_path} is damaged: its images are {images.shape[1:]}, not {IMAGE_SHAPE}")
    if len(images) != len(labels):
        raise ValueError(f"{labels_path} is damaged: it has {len(labels)} labels for {len(images)} images")
    end = source.first_label + source.num_classes
    for wrong, rule in (
        (labels >= end, f"below {end}"),
        (labels < source.first_label, f"{source.first_label} or more"),
    ):
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ValueError(f"{labels_path} is damaged: label {first} is {labels[first]}, not {rule}")
    return images.transpose(0, 2, 1) if source.transposed else images, labels - source.first_label


def _refuse_link_out_of(data_root: Path, path: Path) -> None:
    """Only a file's own link counts: a data set's folder, or the data root, may be a link to a shared disk."""
    target = Path(os.path.realpath(path))
    if path.is_symlink() and not target.is_relative_to(os.path.realpath(data_root)):
        raise ValueError(f"{path} is a symbolic link to {target}, outside of {data_root}")


def _download_if_missing(name: str, source: Source, data_root: Path) -> None:
    """Download into a folder beside the final one and rename it, so that nothing half-written is taken for data."""
    raw = source.raw(data_root)
    if raw.is_dir():
        return
    folder = raw.parent
    incoming = data_root / f".{folder.name}-incoming"
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        with FileLock(data_root / f".{folder.name}.lock"):
            if raw.is_dir():  # another process was faster
                return
            print(f"downloading {name} to {data_root}", file=sys.stderr, flush=True)
            shutil.rmtree(incoming, ignore_errors=True)  # of a process that was killed
            try:
                unpacked = _download(source.torchvision_name, incoming)
                folder.mkdir(exist_ok=True)
                os.replace(unpacked, raw)
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
    except (*TRANSFER_ERRORS, *UNPACK_ERRORS) as error:
        raise ValueError(
            f"{name} is not in {data_root} and could not be downloaded ({_last_line(error)}); put its unpacked "
            f"IDX files into {raw}, name another folder with --data_root or PERFEDAVG_DATA, or use --dataset digits "
            "or --dataset synthetic_writers, which need no download"
        ) from error


def _download(torchvision_name: str, incoming: Path) -> Path:
    """Fetch and unpack every archive. Returns the folder of the unpacked files, below `incoming`."""
    unpacked = incoming / "raw"
    unpacked.mkdir(parents=True)
    for urls, md5 in _archives(torchvision_name):
        archive = _fetch(urls, md5, incoming)
        if archive.suffix == ".zip":
            _unpack_zip(archive, unpacked)
        else:
            with gzip.open(archive) as packed, open(unpacked / archive.stem, "wb") as file:
                shutil.copyfileobj(packed, file)
        archive.unlink()
    return unpacked


def _archives(torchvision_name: str) -> list[tuple[list[str], str]]:
    """Each archive's addresses and its MD5."""
    import_torchvision()  # here, because it takes a second and 90 MB, and few runs download
    from torchvision.datasets import EMNIST, MNIST, FashionMNIST

    if torchvision_name == "EMNIST":
        return [([EMNIST.url], EMNIST.md5)]
    source = {"MNIST": MNIST, "FashionMNIST": FashionMNIST}[torchvision_name]
    return [([f"{mirror}{file}" for mirror in source.mirrors], md5) for file, md5 in source.resources]


def _fetch(urls: list[str], md5: str, folder: Path) -> Path:
    """Download a file from the first address that delivers it whole; after the last one, pause and start over.

    Raises RuntimeError, saying the last failure, when the attempts are used up.
    """
    from torchvision.datasets.utils import download_url

    name = urls[0].rpartition("/")[2]
    for pause in (*PAUSES_SECONDS, None):
        for url in urls:
            try:
                with _transfer_settings():
                    download_url(url, folder, name, md5)
                return folder / name
            except TRANSFER_ERRORS as error:
                failure, cause = f"{url}: {_last_line(error)}", error
                if isinstance(error, HTTPError):
                    error.close()  # it holds the connection
        if pause is None:
            raise RuntimeError(failure) from cause
        print(f"{failure}; trying again in {pause:g} s", file=sys.stderr, flush=True)
        sleep(pause)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _transfer_settings() -> Iterator[None]:
    """torchvision takes no such options: a progress bar on terminals only, and no endless wait for a silent mirror."""
    progress = sys.stderr if sys.stderr.isatty() else io.StringIO()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        with contextlib.redirect_stdout(progress), contextlib.redirect_stderr(progress):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack the gzip files in EMNIST's archive, once every member is known to stay within a folder.

    Raises BadZipFile, with the member's name, where one does not.
    """
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            name = member.orig_filename.replace("\\", "/")
            if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
                raise zipfile.BadZipFile(
                    f"{archive.name} is refused: its member {member.orig_filename!r} leads out of the folder"
                )
            if stat.S_ISLNK(member.external_attr >> 16):
                raise zipfile.BadZipFile(f"{archive.name} is refused: its member {member.orig_filename!r} is a link")
        for member in file.infolist():
            path = PurePosixPath(member.filename)
            if path.match("gzip/emnist-*.gz"):
                with file.open(member) as packed, gzip.open(packed) as plain, open(folder / path.stem, "wb") as target:
                    shutil.copyfileobj(plain, target)


def _last_line(error: Exception) -> str:
    """The end of what an error says, without the paths and mirrors before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
