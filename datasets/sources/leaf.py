"""FEMNIST and Shakespeare of the LEAF benchmark (Caldas et al. 2018, arXiv 1812.01097), read from the user's files.

Nothing is downloaded. The files are other people's: everything in them is checked, with the file and the place in it
in every message, and nothing in them is executed. They are read once, into a cache, and again when they change.
"""

from __future__ import annotations

import io
import json
import re
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datasets.clients.stored import NamedClient, StoredClients, cached_clients
from datasets.sources.class_names import BYCLASS
from datasets.sources.image_files import read_image
from datasets.storage import tell

LEAF_FILES = "all_data*.json"
"""LEAF names FEMNIST's files all_data_0.json and on, and Shakespeare's all_data.json or, sampled, all_data_*.json."""

PARQUET_FILES = "*.parquet"

IMAGE_SHAPE = (28, 28)
NUM_PIXELS = 28 * 28
FEMNIST_CLASSES = 62
VOCABULARY = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""LEAF's 80 characters of Shakespeare; a token is an index into them."""

SEQUENCE_LENGTH = 80
ROWS_PER_BATCH = 1024

_UNKNOWN = 255
_TOKEN_OF_CODE = np.full(128, _UNKNOWN, dtype=np.uint8)
_TOKEN_OF_CODE[[ord(character) for character in VOCABULARY]] = np.arange(len(VOCABULARY))


def load_femnist(data_root: Path) -> StoredClients:
    """One client a writer, with images (28, 28), 0 for background and 255 for ink, and labels 0..61.

    Read from data_root/femnist: LEAF's files (see `_leaf_files`; writers in the order of the files), or the .parquet
    files of the public `femnist` data set (writers in the order of their names). Both hold black ink on white, which is
    inverted here to look like MNIST. Labels: the digits, A to Z, a to z.
    Raises ValueError, with the file and the place in it, where files are missing, damaged or of both kinds.
    """
    folder = data_root / "femnist"
    sources = _leaf_files(folder, data_root)
    parquet_files = _files(folder, PARQUET_FILES, data_root) or _files(folder / "data", PARQUET_FILES, data_root)
    if sources and parquet_files:
        raise ValueError(
            f"{folder} has both {sources[0].whole.name} and {parquet_files[0].name}, which hold the same writers; keep "
            "one"
        )
    if sources:
        clients = _clients_of_json(sources, _images, _image_labels)
    elif parquet_files:
        clients = _clients_of_parquet(parquet_files)
    else:
        raise _missing("femnist", folder, "all_data_*.json of LEAF's FEMNIST, or the *.parquet of the femnist data set")
    files = [path for source in sources for path in source.paths] or parquet_files
    return cached_clients(data_root / "cache", "femnist", files, clients, BYCLASS)


def load_shakespeare(data_root: Path) -> StoredClients:
    """One client a speaking role, with tokens (80,), consecutive characters, and the token that follows as the label.

    Read from LEAF's files in data_root/shakespeare (see `_leaf_files`). Clients and examples keep the order of the
    files, which is that of the play. A token is an index into VOCABULARY.
    Raises ValueError, with the file and the place in it, where files are missing or damaged.
    """
    folder = data_root / "shakespeare"
    sources = _leaf_files(folder, data_root)
    if not sources:
        raise _missing("shakespeare", folder, "all_data*.json of LEAF's Shakespeare")
    clients = _clients_of_json(sources, _sequences, _next_characters)
    files = [path for source in sources for path in source.paths]
    if sources[0].test is not None:
        tell(
            f"shakespeare: {sources[0].test.name} is of LEAF's own split, which draws windows at random: roles are "
            "scored on text that they trained on; LEAF's files from before its split are cut here with a gap"
        )
    # LEAF's windows begin at every character, so that one and its label end where the window 80 places on begins.
    return cached_clients(data_root / "cache", "shakespeare", files, clients, VOCABULARY, overlap=SEQUENCE_LENGTH)


@dataclass(frozen=True)
class _LeafFile:
    """A file with users' examples, or a pair of files with LEAF's split of each user's examples.

    whole: the file, or the one with the training parts.  test: the one with the test parts, or None.
    """

    whole: Path
    test: Path | None = None

    @property
    def paths(self) -> list[Path]:
        return [self.whole] if self.test is None else [self.whole, self.test]


def _leaf_files(folder: Path, data_root: Path) -> list[_LeafFile]:
    """LEAF's files of a data set, where its scripts leave them or a user puts them; none where there are none.

    Looked for in the folder, then in its folder `data`, as in LEAF's own tree: all_data*.json in that folder; or else
    the split that LEAF makes (`preprocess.sh -t sample`), from its folders `train` and `test`, or from the folder
    itself; or else all_data*.json in its folder `all_data`.
    Raises ValueError where there are some of these files twice, or one of a pair.
    """
    for place in (folder, folder / "data"):
        own = _files(place, LEAF_FILES, data_root)
        split = _files(place / "train", LEAF_FILES, data_root) + _files(place / "test", LEAF_FILES, data_root)
        if own and split:
            raise ValueError(f"{place} has both {own[0].name} and {split[0]}, which hold the same users; keep one")
        found = own or split or _files(place / "all_data", LEAF_FILES, data_root)
        if found:
            return _paired(found)
    return []


def _paired(files: Sequence[Path]) -> list[_LeafFile]:
    """Files with LEAF's split in pairs. Raises ValueError where one lacks its other, or some files are not split."""
    parts: dict[Path, dict[str, Path]] = {}
    for path in files:
        for part, other in (("train", "test"), ("test", "train")):
            if (counterpart := _counterpart(path, part, other)) is not None:
                parts.setdefault(path if part == "train" else counterpart, {})[part] = path
                if counterpart not in files:
                    raise ValueError(
                        f"{path} lacks {counterpart}, the other part of the same users; put it there or, if LEAF split "
                        "by user (-t user), use its files from before the split"
                    )
    whole = [path for path in files if not any(path in pair.values() for pair in parts.values())]
    if whole and parts:
        raise ValueError(f"{whole[0]} and {next(iter(parts))} hold the same users, one before LEAF's split; keep one")
    return [_LeafFile(path) for path in whole] + [_LeafFile(pair["train"], pair["test"]) for pair in parts.values()]


def _counterpart(path: Path, part: str, other: str) -> Path | None:
    """Where a file with LEAF's split, known by its folder or its name, has its other part; None for other files."""
    folder = path.parent.with_name(other) if path.parent.name == part else path.parent
    name = re.sub(rf"_{part}(_\d+)?\.json$", rf"_{other}\1.json", path.name)
    return None if (folder, name) == (path.parent, path.name) else folder / name


def _missing(name: str, folder: Path, files: str) -> ValueError:
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    instead = f" (there is {', '.join(others[:3])}{', ...' if others[3:] else ''})" if others else ""
    return ValueError(
        f"--dataset {name} has no files: put {files}, into {folder.absolute()}{instead}; "
        "--dataset digits and --dataset synthetic_writers need no download"
    )


def _files(folder: Path, pattern: str, data_root: Path) -> list[Path]:
    """The files of a folder in the order of their names; a link out of data_root could make a user's file public."""
    files = sorted(folder.glob(pattern))
    root = data_root.resolve()
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is no file that can be read; remove it or replace it with the file itself")
        target = path.resolve()
        if not target.is_relative_to(root):
            raise ValueError(f"{path} leads out of {data_root}, to {target}; put the file itself there, not a link")
    return files


@dataclass(frozen=True)
class _LeafUser:
    """What LEAF's JSON says of one user, not yet checked. place: the file and the user, for messages."""

    name: str
    place: str
    x: list[Any]
    y: list[Any]


def _clients_of_json(
    sources: Sequence[_LeafFile],
    read_x: Callable[[_LeafUser], NDArray[np.uint8]],
    read_y: Callable[[_LeafUser], NDArray[np.int64]],
) -> Iterator[NamedClient]:
    file_of: dict[str, Path] = {}
    for source in sources:
        for train, test in _users_in_parts(source):
            if train.name in file_of:
                raise ValueError(
                    f"{train.place} comes twice, first in {file_of[train.name]}; keep one of the two files there"
                )
            file_of[train.name] = source.whole
            parts = [train] if test is None else [train, test]
            inputs = np.concatenate([read_x(part) for part in parts])
            labels = np.concatenate([read_y(part) for part in parts])
            yield NamedClient(train.name, inputs, labels, None if test is None else len(train.y))


def _users_in_parts(source: _LeafFile) -> Iterator[tuple[_LeafUser, _LeafUser | None]]:
    """Each user of a file, with None; or the two parts of each user of a pair of files, one of which may be empty."""
    if source.test is None:
        for user in _users_of(source.whole):
            yield user, None
        return
    tests = {user.name: user for user in _users_of(source.test)}
    num_tests = len(tests)
    for train in _users_of(source.whole):
        yield train, tests.pop(train.name, _LeafUser(train.name, train.place, [], []))
    if len(tests) == num_tests:
        raise ValueError(
            f"{source.whole} and {source.test} have no user in common: LEAF split them by user (-t user), while here "
            "--unseen_fraction says how many never train; use LEAF's files from before the split, or split by sample"
        )
    for name, test in tests.items():
        yield _LeafUser(name, test.place, [], []), test


def _users_of(path: Path) -> Iterator[_LeafUser]:
    """The users of one file, in its order. Each is let go of after its turn: a file of FEMNIST takes 600 MB."""
    document = _load_json(path)
    names = _entry(document, "users", list, str(path))
    counts = _entry(document, "num_samples", list, str(path))
    user_data = _entry(document, "user_data", dict, str(path))
    if not names:
        raise ValueError(f'{path}: "users" is empty')
    if len(names) != len(counts):
        raise ValueError(f'{path}: "users" has {len(names)} entries, "num_samples" has {len(counts)}')
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"{path}: users[{index}] is {reprlib.repr(name)}, not a name")
    for name in sorted(user_data.keys() - set(names)):
        if _user(name, f"{path}: user {name!r}", user_data.pop(name)).y:  # LEAF's split leaves empty ones behind
            raise ValueError(f'{path}: user {name!r} is in "user_data" but not in "users"')
    seen: set[str] = set()
    for name, count in zip(names, counts, strict=True):
        place = f"{path}: user {name!r}"
        if name in seen:
            raise ValueError(f'{place} comes twice in "users"')
        seen.add(name)
        if name not in user_data:
            raise ValueError(f'{place} is in "users" but not in "user_data"')
        user = _user(name, place, user_data.pop(name))
        if count != len(user.y):
            raise ValueError(f'{place} has {len(user.y)} labels, but "num_samples" says {reprlib.repr(count)}')
        yield user


def _user(name: str, place: str, data: object) -> _LeafUser:
    user = _LeafUser(name, place, _entry(data, "x", list, place), _entry(data, "y", list, place))
    if len(user.x) != len(user.y):
        raise ValueError(f"{place} has {len(user.x)} examples in x, but {len(user.y)} labels in y")
    return user


def _load_json(path: Path) -> object:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, object_pairs_hook=_unique_keys)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object; of a key that comes twice, Python would drop the first value without a word."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice in an object")
    return result


def _entry(holder: object, key: str, kind: type, place: str) -> Any:
    if not isinstance(holder, dict) or key not in holder:
        raise ValueError(f'{place} has no "{key}"')
    if not isinstance(holder[key], kind):
        expected = "an object" if kind is dict else "a list"
        raise ValueError(f'{place}: "{key}" is {reprlib.repr(holder[key])}, not {expected}')
    return holder[key]


def _images(user: _LeafUser) -> NDArray[np.uint8]:
    for index, row in enumerate(user.x):
        if not isinstance(row, list) or len(row) != NUM_PIXELS:
            what = f"has {len(row)} pixels" if isinstance(row, list) else f"is {reprlib.repr(row)}"
            raise ValueError(f"{user.place}: x[{index}] {what}, not a list of {NUM_PIXELS}")
        # Types are looked at, because an array would take "0.5" and true for numbers.
        if not set(map(type, row)) <= {float, int} or not all(0 <= pixel <= 1 for pixel in row):
            column = next(column for column, pixel in enumerate(row) if not _is_brightness(pixel))
            raise ValueError(
                f"{user.place}: x[{index}][{column}] is {reprlib.repr(row[column])}, not a finite number in 0..1"
            )
    brightness = np.array(user.x, dtype=np.float64).reshape(-1, *IMAGE_SHAPE)
    return np.rint(255 * (1 - brightness)).astype(np.uint8)


def _is_brightness(pixel: object) -> bool:
    return type(pixel) in (float, int) and isinstance(pixel, (float, int)) and 0 <= pixel <= 1


def _image_labels(user: _LeafUser) -> NDArray[np.int64]:
    for index, label in enumerate(user.y):
        if type(label) is not int or not 0 <= label < FEMNIST_CLASSES:
            raise ValueError(
                f"{user.place}: y[{index}] is {reprlib.repr(label)}, not a whole number in 0..{FEMNIST_CLASSES - 1}"
            )
    return np.array(user.y, dtype=np.int64)


def _sequences(user: _LeafUser) -> NDArray[np.uint8]:
    return _tokens(user.x, SEQUENCE_LENGTH, f"{user.place}: x")


def _next_characters(user: _LeafUser) -> NDArray[np.int64]:
    return _tokens(user.y, 1, f"{user.place}: y")[:, 0].astype(np.int64)


def _tokens(texts: Sequence[Any], length: int, place: str) -> NDArray[np.uint8]:
    """(len(texts), length) indices into VOCABULARY."""
    for index, text in enumerate(texts):
        if not isinstance(text, str) or len(text) != length:
            what = f"has {len(text)} characters" if isinstance(text, str) else f"is {reprlib.repr(text)}"
            raise ValueError(f"{place}[{index}] {what}, not a string of {length}")
    # JSON can hold halves of surrogate pairs, which are no characters of the vocabulary either.
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    tokens: NDArray[np.uint8] = _TOKEN_OF_CODE[np.minimum(codes, len(_TOKEN_OF_CODE) - 1)]
    unknown = np.flatnonzero(tokens == _UNKNOWN)
    if len(unknown):
        index, column = divmod(int(unknown[0]), length)
        raise ValueError(
            f"{place}[{index}][{column}] is {texts[index][column]!r}, not among LEAF's {len(VOCABULARY)} characters"
        )
    return tokens.reshape(-1, length)


class _EncodedImage(NamedTuple):
    """One row of a parquet file. place: the file and the row, for messages."""

    content: bytes
    label: int
    path: Path
    row: int


def _clients_of_parquet(files: Sequence[Path]) -> Iterator[NamedClient]:
    """Clients in the order of their names. Images wait for their writer as they are in the file: decoded, they would
    take three times as much memory."""
    rows_of: defaultdict[str, list[_EncodedImage]] = defaultdict(list)
    for path in files:
        for writer, image in _parquet_rows(path):
            rows_of[writer].append(image)
    for writer in sorted(rows_of):
        rows = rows_of.pop(writer)
        images = np.stack(
            [
                read_image(io.BytesIO(image.content), f"{image.path}: the image of row {image.row}", True)
                for image in rows
            ]
        )
        yield NamedClient(writer, images, np.array([image.label for image in rows], dtype=np.int64))


def _parquet_rows(path: Path) -> Iterator[tuple[str, _EncodedImage]]:
    """(writer, image) of each row, with writers and labels checked and images not yet decoded."""
    row = -1
    for contents, writers, labels in _parquet_batches(path):
        for content, writer, label in zip(contents, writers, labels, strict=True):
            row += 1
            if content is None or writer in (None, "") or label is None:
                empty = "image" if content is None else "character" if writer not in (None, "") else "writer_id"
                raise ValueError(f"{path}: row {row} has no {empty}")
            if not 0 <= label < FEMNIST_CLASSES:
                raise ValueError(f"{path}: row {row} has character {label}, not in 0..{FEMNIST_CLASSES - 1}")
            yield str(writer), _EncodedImage(content, label, path, row)
    if row < 0:
        raise ValueError(f"{path} has no rows")


def _parquet_batches(path: Path) -> Iterator[tuple[list[Any], list[Any], list[Any]]]:
    """(encoded images, writers, labels) of some rows after the other; an empty cell is None."""
    # Only the process that builds the cache pays for this import.
    import pyarrow as pa
    import pyarrow.parquet as pq

    # One thread: the decoder is the slow part, and other processes of the machine wait for their share.
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow, path)
            of_bytes = not pa.types.is_struct(file.schema_arrow.field("image").type)
            columns = ["image" if of_bytes else "image.bytes", "writer_id", "character"]
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=columns, use_threads=False):
                batch.validate(full=True)
                contents = batch.column("image") if of_bytes else batch.column("image").flatten()[0]
                yield contents.to_pylist(), batch.column("writer_id").to_pylist(), batch.column("character").to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or no parquet file: {reason}") from error


def _check_columns(schema: Any, path: Path) -> None:
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def is_image(kind: Any) -> bool:
        has_bytes = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return is_bytes(kind.field("bytes").type if has_bytes else kind)

    def is_name(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind))

    for name, fits, expected in (
        ("image", is_image, "bytes, or a struct with binary bytes"),
        ("writer_id", is_name, "a string or an integer"),
        ("character", types.is_integer, "an integer, the label"),
    ):
        if schema.get_field_index(name) < 0:
            raise ValueError(
                f"{path} has no column {name!r}; its columns are {schema.names}; rename the one that has it"
            )
        if not fits(schema.field(name).type):
            raise ValueError(f"{path}: column {name!r} is {str(schema.field(name).type)!r}, not {expected}")
