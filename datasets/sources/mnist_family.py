"""MNIST, Fashion-MNIST and EMNIST: downloaded on first use, checked and mapped on every use."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray

from datasets.clients.partitioned import ImageSplits
from datasets.sources.class_names import BALANCED, BYCLASS, DIGITS, FASHION, LETTERS
from datasets.sources.download import download, incoming_folder
from datasets.sources.idx import map_idx
from datasets.storage import built_once, locked_place, places_for, tell
from perfedavg.contracts import MissingDataError

IMAGE_SHAPE = (28, 28)
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Publication:
    """What is downloaded as a whole.

    folder: below the data root, as torchvision calls it.
    names: what else a folder with the files may be called, in small letters without marks.
    mirrors: addresses, each followed by an archive's name.
    archives: the MD5 of each, as torchvision lists it.
    """

    folder: str
    names: tuple[str, ...]
    mirrors: tuple[str, ...]
    archives: Mapping[str, str]


MNIST = Publication(
    "MNIST",
    ("mnist",),
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
    {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)
FASHION_MNIST = Publication(
    "FashionMNIST",
    ("fashionmnist", "fashion"),
    ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
    {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
)
EMNIST = Publication(
    "EMNIST",
    ("emnist",),
    ("https://biometrics.nist.gov/cs_links/EMNIST/",),
    {"gzip.zip": "58c8d27c78d21e728a6bc7b3cc06412e"},
)
"""MNIST: LeCun et al. 1998. Fashion-MNIST: Xiao et al. 2017. EMNIST: Cohen et al. 2017."""


@dataclass(frozen=True)
class Source:
    """A data set in files of a publication.

    train_prefix, test_prefix: beginnings of the files' names.
    class_names: what label i stands for.
    first_label: in the files; here labels begin at 0.
    transposed: the files hold each image with rows and columns exchanged.
    """

    publication: Publication
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
        """Images and labels to train on, images and labels to test on."""
        return [
            f"{prefix}-{content}"
            for prefix in (self.train_prefix, self.test_prefix)
            for content in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]

    def raw(self, data_root: Path) -> Path:
        """The folder into which they are downloaded."""
        return data_root / self.publication.folder / "raw"


def _emnist(split: str, class_names: tuple[str, ...], first_label: int = 0) -> Source:
    return Source(EMNIST, f"emnist-{split}-train", f"emnist-{split}-test", class_names, first_label, transposed=True)


SOURCES = {
    "emnist": _emnist("byclass", BYCLASS),
    "emnist_balanced": _emnist("balanced", BALANCED),
    "emnist_letters": _emnist("letters", LETTERS, first_label=1),
    "emnist_digits": _emnist("digits", DIGITS),
    "mnist": Source(MNIST, "train", "t10k", DIGITS),
    "fashion_mnist": Source(FASHION_MNIST, "train", "t10k", FASHION),
}


def load_images(name: str, data_root: Path, may_download: bool = True) -> ImageSplits:
    """A data set's published splits, upright, with labels from 0, read-only and paged in as they are used.

    name: one of SOURCES.  data_root: folder of the data files, where they are looked for as torchvision and their
    makers name and pack them (see `_folders` and `_variants`), and into which missing ones are downloaded.
    Raises ValueError where the files cannot be had, are damaged, or lie elsewhere; of these, MissingDataError where
    they are missing and may not be downloaded.
    """
    source = SOURCES[name]
    found = _find(name, source, data_root)
    if found is None and not may_download:
        raise MissingDataError(f"{name} is not in {data_root}")
    if found is None:
        _download_missing(name, source, data_root)
        found = _find(name, source, data_root)
        assert found is not None, "what was downloaded is there"
    try:
        plain = _plain(name, source, found, data_root)
        train = _read_split(source, found[:2], plain[:2])
        test = _read_split(source, found[2:], plain[2:])
    except ValueError as error:
        raise ValueError(
            f"{error}; replace that file, or move {found[0].parent} elsewhere to have {name} downloaded anew"
        ) from error
    return ImageSplits(*train, *test, source.num_classes, source.class_names)


def _find(name: str, source: Source, data_root: Path) -> list[Path] | None:
    """The files in the first folder that has them all, as in `Source.file_names`; None where no folder has any.

    Raises ValueError where a folder has some of them only, and where those in data_root itself may be another data
    set's.
    """
    incomplete = ""
    for folder in _folders(source, data_root):
        found = _files_in(folder, source)
        if len(found) == len(source.file_names):
            for path in found.values():
                _refuse_link_out_of(data_root, path)
            return list(found.values())
        if found and not incomplete:
            missing = next(file for file in source.file_names if file not in found)
            incomplete = (
                f"{folder} has no {missing}, as it is or packed as {missing}.gz; put it there, or move {folder} "
                f"elsewhere to have {name} downloaded anew"
            )
    if incomplete:
        raise ValueError(incomplete)
    if loose := _files_in(data_root, source):
        raise ValueError(
            f"{next(iter(loose.values()))} may be of MNIST or of Fashion-MNIST, whose files have the same names; move "
            f"those of {name} into {source.raw(data_root)}"
        )
    return None


def _folders(source: Source, data_root: Path) -> Iterator[Path]:
    """Where a data set's files may lie: first where torchvision has them, then in folders called after the data set,
    and in data_root itself where its name, or the files' names, say which data set they are of."""

    def is_called_after_it(folder: Path) -> bool:
        return re.sub("[^a-z]", "", folder.name.casefold()) in source.publication.names

    inside = ("", "raw", "gzip", f"{source.publication.folder}/raw")
    for place in places_for(data_root):
        yield source.raw(place)
        with contextlib.suppress(OSError):
            named = sorted(filter(is_called_after_it, place.iterdir()))
            yield from (folder / part for folder in named for part in inside)
    whose = data_root.resolve()
    if source.publication.folder == "EMNIST" or is_called_after_it(whose) or is_called_after_it(whose.parent):
        yield from (data_root / part for part in inside)


def _files_in(folder: Path, source: Source) -> dict[str, Path]:
    """Those of a data set's files that a folder has."""
    found = {}
    for name in source.file_names:
        for variant in _variants(name):
            if (folder / variant).is_file():
                found[name] = folder / variant
                break
    return found


def _variants(name: str) -> list[str]:
    """What a file may be called: its makers have train-images-idx3-ubyte.gz, others train-images.idx3-ubyte."""
    dotted = name.replace("-idx", ".idx")
    return [name, dotted, f"{name}.gz", f"{dotted}.gz"]


def _plain(name: str, source: Source, found: Sequence[Path], data_root: Path) -> list[Path]:
    """The same files, of which packed ones are unpacked into a cache, because only plain files can be mapped."""
    packed = {file: path for file, path in zip(source.file_names, found, strict=True) if _is_packed(path)}
    if not packed:
        return list(found)

    def build(folder: Path) -> None:
        for file, path in packed.items():
            with open(path, "rb") as content:
                _unpack_gzip(content, path, folder / file)

    def open_built(folder: Path) -> Path:
        for file in packed:
            (folder / file).stat()
        return folder

    cache = built_once(data_root / "cache", name, packed.values(), build, open_built)
    return [cache / file if file in packed else path for file, path in zip(source.file_names, found, strict=True)]


def _is_packed(path: Path) -> bool:
    """By its content: some browsers unpack a file and leave it the name of the packed one."""
    try:
        with open(path, "rb") as file:
            return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


def _unpack_gzip(packed: IO[bytes], place: Path, target: Path) -> None:
    """Raises ValueError, with the place, where the content is damaged; OSError where there is no room."""
    with gzip.open(packed) as content, open(target, "wb") as file:
        while True:
            try:
                piece = content.read(2**20)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{place} is damaged ({error}); replace it") from error
            if not piece:
                return
            file.write(piece)


def _read_split(
    source: Source, found: Sequence[Path], plain: Sequence[Path]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels, each from a plain file; messages name the file that was found."""
    images_path, labels_path = found
    images = map_idx(plain[0], 3, images_path)
    labels = map_idx(plain[1], 1, labels_path).astype(np.int64)
    if images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"{images_path} is damaged: its images are {images.shape[1:]}, not {IMAGE_SHAPE}")
    if len(images) != len(labels):
        raise ValueError(f"{labels_path} is damaged: it has {len(labels)} labels for {len(images)} images")
    lowest, highest = source.first_label, source.first_label + source.num_classes - 1
    wrong = np.flatnonzero((labels < lowest) | (labels > highest))
    if len(wrong):
        raise ValueError(
            f"{labels_path} is damaged: label {wrong[0]} is {labels[wrong[0]]}, not in {lowest}..{highest}"
        )
    return images.transpose(0, 2, 1) if source.transposed else images, labels - lowest


def _refuse_link_out_of(data_root: Path, path: Path) -> None:
    """Only a file's own link counts: a data set's folder, or the data root, may be a link to a shared disk."""
    target = Path(os.path.realpath(path))
    if path.is_symlink() and not target.is_relative_to(os.path.realpath(data_root)):
        raise ValueError(f"{path} is a symbolic link to {target}, outside of {data_root}; put the file itself there")


def _download_missing(name: str, source: Source, data_root: Path) -> None:
    """Where data_root cannot be written, into the user's cache folder."""
    publication = source.publication
    try:
        with locked_place(places_for(data_root), publication.folder, f"--dataset {name}") as place:
            if len(_files_in(source.raw(place), source)) == len(source.file_names):  # another process was faster
                return
            tell(f"downloading {name} to {place}")
            with incoming_folder(place, publication.folder) as incoming:
                (incoming / "raw").mkdir()
                for archive, md5 in publication.archives.items():
                    urls = [f"{mirror}{archive}" for mirror in publication.mirrors]
                    _unpack(download(urls, md5, incoming), incoming / "raw")
                _move_missing(incoming / "raw", source.raw(place))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{name} is not in {data_root} and could not be downloaded ({error}); put its files, "
            f"{source.file_names[0]} and so on, as they are or packed as .gz, into {source.raw(data_root)}, name "
            "another folder with --data_root or PERFEDAVG_DATA, or use --dataset digits or --dataset "
            "synthetic_writers, which need no download"
        ) from error


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a gzip file, or the gzip files in EMNIST's archive; what else that holds is passed over."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as members:
            for name in members.namelist():
                if re.fullmatch(r"gzip/emnist-[\w-]+\.gz", name):
                    with members.open(name) as packed:
                        _unpack_gzip(packed, archive / name, folder / PurePosixPath(name).stem)
    else:
        with open(archive, "rb") as packed:
            _unpack_gzip(packed, archive, folder / archive.stem)
    archive.unlink()


def _move_missing(unpacked: Path, raw: Path) -> None:
    """Move a folder to where there may be one with other files, which stay as they are."""
    if not raw.is_dir():
        raw.parent.mkdir(exist_ok=True)
        os.replace(unpacked, raw)
        return
    for path in unpacked.iterdir():
        if not (raw / path.name).exists():
            os.replace(path, raw / path.name)
