"""FEMNIST and Shakespeare of the LEAF benchmark (Caldas et al. 2018, arXiv 1812.01097), read from the user's files.

Nothing is downloaded. The files are other people's: everything in them is checked, with the file and the place in it
in every message, and nothing in them is executed. They are read once, into a cache, and again when they change.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.clients.stored import NamedClient, NewClients, StoredClients, stored_clients
from datasets.sources.class_names import BYCLASS
from datasets.sources.femnist_parquet import clients_of_parquet
from datasets.storage import tell

LEAF_FILES = "all_data*.json"
"""LEAF names FEMNIST's files all_data_0.json and on, and Shakespeare's all_data.json or, sampled, all_data_*.json."""

PARQUET_FILES = "*.parquet"

NUM_PIXELS = 28 * 28
VOCABULARY = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""LEAF's 80 characters of Shakespeare; a token is an index into them."""

SEQUENCE_LENGTH = 80

_UNKNOWN = 255
_TOKEN_OF_CODE = np.full(128, _UNKNOWN, dtype=np.uint8)
_TOKEN_OF_CODE[[ord(character) for character in VOCABULARY]] = np.arange(len(VOCABULARY))


@dataclass(frozen=True)
class _LeafFile:
    """A file with users' examples, or a pair of files with LEAF's split of each user's examples.

    whole: the file, or the one with the training parts.  test: the one with the test parts, or None.
    """

    whole: Path
    test: Path | None = None


@dataclass(frozen=True)
class _LeafUser:
    """What LEAF's JSON says of one user, not yet checked. place: the file and the user, for messages."""

    name: str
    place: str
    x: list[Any]
    y: list[Any]


def load_femnist(data_root: Path) -> StoredClients:
    """One client a writer, with images (28, 28), 0 for background and 255 for ink, and labels 0..61.

    Read from data_root/femnist: LEAF's files (see `_leaf_files`; writers in the order of the files), or the .parquet
    files of the public `femnist` data set (writers in the order of their names). Both hold black ink on white, which is
    inverted here to look like MNIST. Labels: the digits, A to Z, a to z.
    Raises ValueError, with the file and the place in it, where files are missing, damaged or of both kinds.
    """
    folder = data_root / "femnist"
    sources = _leaf_files(folder, data_root)
    parquet_files = files_in(folder, PARQUET_FILES, data_root) or files_in(folder / "data", PARQUET_FILES, data_root)
    if sources and parquet_files:
        raise ValueError(
            f"{folder} has both {sources[0].whole.name} and {parquet_files[0].name}, which hold the same writers; keep "
            "one"
        )
    if not (sources or parquet_files):
        raise _missing(folder, "all_data_*.json of LEAF's FEMNIST, or the *.parquet of the femnist data set")
    clients = _clients(sources, _images, _image_labels) if sources else clients_of_parquet(parquet_files)
    files, new = _paths(sources) or parquet_files, NewClients(clients, BYCLASS)
    return stored_clients(data_root / "cache", "femnist", files, lambda: new)


def load_shakespeare(data_root: Path) -> StoredClients:
    """One client a speaking role, with tokens (80,), consecutive characters, and the token that follows as the label.

    Read from LEAF's files in data_root/shakespeare (see `_leaf_files`). Clients and examples keep the order of the
    files, which is that of the play. A token is an index into VOCABULARY.
    Raises ValueError, with the file and the place in it, where files are missing or damaged.
    """
    folder = data_root / "shakespeare"
    sources = _leaf_files(folder, data_root)
    if not sources:
        raise _missing(folder, "all_data*.json of LEAF's Shakespeare")
    if sources[0].test is not None:
        tell(
            f"shakespeare: {sources[0].test.name} is of LEAF's own split, which draws windows at random: roles are "
            "scored on text that they trained on; LEAF's files from before its split are cut here with a gap"
        )
    clients = _clients(sources, _sequences, _next_characters)
    # LEAF's windows begin at every character, so that one and its label end where the window 80 places on begins.
    new = NewClients(clients, VOCABULARY, overlap=SEQUENCE_LENGTH)
    return stored_clients(data_root / "cache", "shakespeare", _paths(sources), lambda: new)


def _paths(sources: Sequence[_LeafFile]) -> list[Path]:
    return [path for source in sources for path in (source.whole, source.test) if path is not None]


def _leaf_files(folder: Path, data_root: Path) -> list[_LeafFile]:
    """LEAF's files of a data set, where its scripts leave them or a user puts them; none where there are none.

    Looked for in the folder, then in its folder `data`, as in LEAF's own tree: all_data*.json in that folder; or else
    the split that LEAF makes (`preprocess.sh -t sample`), from its folders `train` and `test`, or from the folder
    itself; or else all_data*.json in its folder `all_data`.
    Raises ValueError where there are some of these files twice, or one of a pair.
    """
    for place in (folder, folder / "data"):
        own = files_in(place, LEAF_FILES, data_root)
        split = files_in(place / "train", LEAF_FILES, data_root) + files_in(place / "test", LEAF_FILES, data_root)
        if own and split:
            raise ValueError(f"{place} has both {own[0].name} and {split[0]}, which hold the same users; keep one")
        found = own or split or files_in(place / "all_data", LEAF_FILES, data_root)
        if found:
            return _paired(found)
    return []


def _paired(files: Sequence[Path]) -> list[_LeafFile]:
    """Files with LEAF's split in pairs. Raises ValueError where one lacks its other, or some files are not split."""
    whole, pairs = [], []
    for path in files:
        train, test = _counterpart(path, "test", "train"), _counterpart(path, "train", "test")
        other = train or test
        if other is None:
            whole.append(_LeafFile(path))
        elif other not in files:
            raise ValueError(
                f"{path} lacks {other}, the other part of the same users; put it there or, if LEAF split by user "
                "(-t user), use its files from before the split"
            )
        elif test is not None:
            pairs.append(_LeafFile(path, test))
    if whole and pairs:
        raise ValueError(
            f"{whole[0].whole} and {pairs[0].whole} hold the same users, one before LEAF's split; keep one"
        )
    return whole or pairs


def _counterpart(path: Path, part: str, other: str) -> Path | None:
    """Where a file of that part of LEAF's split, known by its folder or its name, has its other part; else None."""
    folder = path.parent.with_name(other) if path.parent.name == part else path.parent
    name = re.sub(rf"_{part}(_\d+)?\.json$", rf"_{other}\1.json", path.name)
    return None if folder / name == path else folder / name


def _missing(folder: Path, files: str) -> ValueError:
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    instead = f" (there is {', '.join(others[:3])}{', ...' if others[3:] else ''})" if others else ""
    return ValueError(
        f"--dataset {folder.name} has no files: put {files}, into {folder.absolute()}{instead}; "
        "--dataset digits and --dataset synthetic_writers need no download"
    )


def files_in(folder: Path, pattern: str, data_root: Path) -> list[Path]:
    """The files of a folder in the order of their names; a link out of data_root could make a user's file public."""
    files = sorted(folder.glob(pattern))
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is no file that can be read; remove it or replace it with the file itself")
        if not path.resolve().is_relative_to(data_root.resolve()):
            raise ValueError(
                f"{path} leads out of {data_root}, to {path.resolve()}; put the file itself there, not a link"
            )
    return files


def _clients(
    sources: Sequence[_LeafFile],
    read_x: Callable[[_LeafUser], NDArray[np.uint8]],
    read_y: Callable[[_LeafUser], NDArray[np.int64]],
) -> Iterator[NamedClient]:
    file_of: dict[str, Path] = {}
    for source in sources:
        for parts in _users_in_parts(source):
            name, num_train = parts[0].name, len(parts[0].y)
            if name in file_of:
                raise ValueError(
                    f"{parts[0].place} comes twice, first in {file_of[name]}; keep one of the two files there"
                )
            file_of[name] = source.whole
            inputs = np.concatenate([read_x(part) for part in parts])
            labels = np.concatenate([read_y(part) for part in parts])
            yield NamedClient(name, inputs, labels, None if source.test is None else num_train)


def _users_in_parts(source: _LeafFile) -> Iterator[list[_LeafUser]]:
    """Each user of a file; or the two parts of each user of a pair of files, one of which may be empty."""
    if source.test is None:
        yield from ([user] for user in _users_of(source.whole))
        return
    tests = {user.name: user for user in _users_of(source.test)}
    num_tests = len(tests)
    for train in _users_of(source.whole):
        yield [train, tests.pop(train.name, _LeafUser(train.name, train.place, [], []))]
    if len(tests) == num_tests:
        raise ValueError(
            f"{source.whole} and {source.test} have no user in common: LEAF split them by user (-t user), while here "
            "--unseen_fraction says how many never train; use LEAF's files from before the split, or split by sample"
        )
    for name, test in tests.items():
        yield [_LeafUser(name, test.place, [], []), test]


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
        if name not in user_data:
            raise ValueError(f'{place} is in "users" but not in "user_data"')
        seen.add(name)
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
        if not (set(map(type, row)) <= {float, int} and all(0 <= pixel <= 1 for pixel in row)):
            column = next(column for column, pixel in enumerate(row) if not _is_brightness(pixel))
            shown = reprlib.repr(row[column])
            raise ValueError(f"{user.place}: x[{index}][{column}] is {shown}, not a finite number in 0..1")
    brightness = np.array(user.x, dtype=np.float64).reshape(-1, 28, 28)
    return np.rint(255 * (1 - brightness)).astype(np.uint8)


def _is_brightness(pixel: Any) -> bool:
    """Types are looked at, because an array would take "0.5" and true for numbers."""
    return type(pixel) in (float, int) and 0 <= pixel <= 1


def _image_labels(user: _LeafUser) -> NDArray[np.int64]:
    for index, label in enumerate(user.y):
        if type(label) is not int or not 0 <= label < len(BYCLASS):
            shown = reprlib.repr(label)
            raise ValueError(f"{user.place}: y[{index}] is {shown}, not a whole number in 0..{len(BYCLASS) - 1}")
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
