"""MNIST, Fashion-MNIST and EMNIST: downloaded through torchvision on first use, checked and mapped on every use."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
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
from typing import IO
from urllib.error import HTTPError

import numpy as np
from numpy.typing import NDArray

from compat import import_torchvision
from datasets.clients.partitioned import ImageSplits
from datasets.sources.class_names import BALANCED, BYCLASS, DIGITS, FASHION, LETTERS
from datasets.sources.idx import map_idx
from datasets.storage import built_once, locked_place, places_for, tell

IMAGE_SHAPE = (28, 28)
GZIP_MAGIC = b"\x1f\x8b"

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

    @property
    def file_names(self) -> list[str]:
        return [
            f"{prefix}-{content}"
            for prefix in (self.train_prefix, self.test_prefix)
            for content in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]

    def raw(self, data_root: Path) -> Path:
        """The folder into which they are downloaded."""
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


@dataclass(frozen=True)
class _Files:
    """The files of a data set where they were found, by the names that torchvision gives them.

    found: as they lie there, which is what messages name.  unpacked: the same, or what was unpacked from them.
    """

    folder: Path
    found: dict[str, Path]
    unpacked: dict[str, Path]


def load_images(name: str, data_root: Path) -> ImageSplits:
    """A data set's published splits, upright, with labels from 0, read-only and paged in as they are used.

    name: one of IMAGE_NAMES.  data_root: folder of the data files, where they are looked for as torchvision and their
    makers name and pack them (see `_folders` and `_variants`), and into which missing ones are downloaded.
    Raises ValueError where the files cannot be had, are damaged, or lie elsewhere.
    """
    source = SOURCES[name]
    files = _find(name, source, data_root)
    if files is None:
        _download_missing(name, source, data_root)
        files = _find(name, source, data_root)
        assert files is not None, "what was downloaded is there"
    try:
        train = _read_split(source, source.train_prefix, files)
        test = _read_split(source, source.test_prefix, files)
    except ValueError as error:
        raise ValueError(
            f"{error}; replace that file, or move {files.folder} elsewhere to have {name} downloaded anew"
        ) from error
    return ImageSplits(*train, *test, source.num_classes, source.class_names)


def _find(name: str, source: Source, data_root: Path) -> _Files | None:
    """The files in the first folder that has them all, unpacked; None where no folder has any of them.

    Raises ValueError where a folder has some of them only, and where those in data_root itself may be another data
    set's.
    """
    incomplete: tuple[Path, list[str]] | None = None
    for folder in _folders(source, data_root):
        found = _files_in(folder, source)
        if len(found) == len(source.file_names):
            for path in found.values():
                _refuse_link_out_of(data_root, path)
            return _Files(folder, found, _unpacked(name, found, data_root))
        if found and incomplete is None:
            incomplete = folder, [file for file in source.file_names if file not in found]
    if incomplete is not None:
        folder, missing = incomplete
        raise ValueError(
            f"{folder} has no {missing[0]}, as it is or packed as {missing[0]}.gz; put it there, or move {folder} "
            f"elsewhere to have {name} downloaded anew"
        )
    if loose := _files_in(data_root, source):
        raise ValueError(
            f"{next(iter(loose.values()))} may be of MNIST or of Fashion-MNIST, whose files have the same names; move "
            f"those of {name} into {source.raw(data_root)}"
        )
    return None


def _folders(source: Source, data_root: Path) -> Iterator[Path]:
    """Where a data set's files may lie: first where torchvision has them, then in folders called after the data set,
    and in data_root itself where its name, or the files' names, say which data set they are of."""
    inside = ("", "raw", "gzip", f"{source.torchvision_name}/raw")
    for place in places_for(data_root):
        yield source.raw(place)
        with contextlib.suppress(OSError):
            named = sorted(folder for folder in place.iterdir() if _is_called(folder, source))
            yield from (folder / part for folder in named for part in inside)
    whose = data_root.resolve()
    if source.torchvision_name == "EMNIST" or _is_called(whose, source) or _is_called(whose.parent, source):
        yield from (data_root / part for part in inside)


def _is_called(folder: Path, source: Source) -> bool:
    """Whether a folder has the data set's name, in other letters or with other marks between them."""
    names = {"MNIST": ("mnist",), "FashionMNIST": ("fashionmnist", "fashion"), "EMNIST": ("emnist",)}
    return re.sub("[^a-z]", "", folder.name.casefold()) in names[source.torchvision_name]


def _files_in(folder: Path, source: Source) -> dict[str, Path]:
    """Those of a data set's files that a folder has."""
    found = {}
    for name in source.file_names:
        path = next((folder / variant for variant in _variants(name) if (folder / variant).is_file()), None)
        if path is not None:
            found[name] = path
    return found


def _variants(name: str) -> Iterator[str]:
    """What a file may be called: its makers have train-images-idx3-ubyte.gz, others train-images.idx3-ubyte."""
    for ending in ("", ".gz"):
        yield f"{name}{ending}"
        yield f"{name.replace('-idx', '.idx')}{ending}"


def _unpacked(name: str, found: dict[str, Path], data_root: Path) -> dict[str, Path]:
    """The same files, of which packed ones are unpacked into a cache, because only plain files can be mapped."""
    packed = {file: path for file, path in found.items() if _is_packed(path)}
    if not packed:
        return found

    def build(folder: Path) -> None:
        for file, path in packed.items():
            with open(folder / file, "wb") as plain:
                _unpack_gzip(path, plain)

    def open_built(folder: Path) -> dict[str, Path]:
        for file in packed:
            (folder / file).stat()
        return {file: folder / file for file in packed}

    return found | built_once(data_root / "cache", name, packed.values(), build, open_built)


def _is_packed(path: Path) -> bool:
    """By its content: some browsers unpack a file and leave it the name of the packed one."""
    try:
        with open(path, "rb") as file:
            return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


def _unpack_gzip(path: Path, plain: IO[bytes]) -> None:
    """Raises ValueError, with the file, where it is damaged; OSError where there is no room."""
    with gzip.open(path) as packed:
        while True:
            try:
                piece = packed.read(2**20)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is damaged ({error}); replace it") from error
            if not piece:
                return
            plain.write(piece)


def _read_split(source: Source, prefix: str, files: _Files) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images_name, labels_name = (name for name in source.file_names if name.startswith(f"{prefix}-"))
    images_path, labels_path = files.found[images_name], files.found[labels_name]
    images = map_idx(files.unpacked[images_name], 3, images_path)
    labels = map_idx(files.unpacked[labels_name], 1, labels_path).astype(np.int64)
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
        raise ValueError(f"{path} is a symbolic link to {target}, outside of {data_root}; put the file itself there")


def _download_missing(name: str, source: Source, data_root: Path) -> None:
    """Download into a folder beside the final one and rename it, so that nothing half-written is taken for data.

    Where data_root cannot be written, into the user's cache folder.
    """
    raw = source.raw(data_root)
    try:
        with locked_place(places_for(data_root), source.torchvision_name, f"--dataset {name}") as place:
            if len(_files_in(source.raw(place), source)) == len(source.file_names):  # another process was faster
                return
            tell(f"downloading {name} to {place}")
            incoming = place / f".{source.torchvision_name}-incoming"
            shutil.rmtree(incoming, ignore_errors=True)  # of a process that was killed
            try:
                _move_missing(_download(source.torchvision_name, incoming), source.raw(place))
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
    except (*TRANSFER_ERRORS, *UNPACK_ERRORS) as error:
        raise ValueError(
            f"{name} is not in {data_root} and could not be downloaded ({_last_line(error)}); put its files, "
            f"{source.file_names[0]} and so on, as they are or packed as .gz, into {raw}, name another folder with "
            "--data_root or PERFEDAVG_DATA, or use --dataset digits or --dataset synthetic_writers, which need no "
            "download"
        ) from error


def _move_missing(unpacked: Path, raw: Path) -> None:
    """Move a folder to where there may be one with other files, which stay as they are."""
    if not raw.is_dir():
        raw.parent.mkdir(exist_ok=True)
        os.replace(unpacked, raw)
        return
    for path in unpacked.iterdir():
        if not (raw / path.name).exists():
            os.replace(path, raw / path.name)


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
        tell(f"{failure}; trying again in {pause:g} s")
        sleep(pause)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _transfer_settings() -> Iterator[None]:
    """torchvision takes no such options: a progress bar on terminals only, and no endless wait for a silent mirror."""
    progress = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else io.StringIO()
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
