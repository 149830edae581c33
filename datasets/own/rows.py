"""Examples of a user's own file, one a row, and what is made of them: clients, with classes or targets.

Files are checked whole, and nothing in them is executed. Every message has the file, the column, the row and the value.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.clients.stored import NamedClient, NewClients, StoredClients, stored_clients
from perfedavg.own_files import OwnFiles

CACHE = ".perfedavg-cache"
"""Folder beside the file in which its clients are kept."""
CLIENT_NAMES = ("client", "client_id", "user", "user_id")
LABEL_NAMES = ("y", "label", "target", "class")
SPLIT_NAMES = ("split",)
MOST_CLASSES = 1000
"""Of labels that are whole numbers, where the user does not say that they are classes."""
SHOWN_NAMES = 20


@dataclass(frozen=True)
class Column:
    """A column by its name, or an array.

    values: (num_rows,), or of labels (num_rows, num_targets); without missing ones where they are texts.
    """

    name: str
    values: NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """What a file holds.

    kind: what a column of it is called: `column` or `array`.
    row_place: what a row, counted from 0, is called in messages.
    inputs: (num_rows, ...), as `RawClients.examples` has them.
    of: what an input is, in words, such as `13 features`.
    left_out: what was passed over, in words; empty for nothing.
    """

    path: Path
    kind: str
    row_place: Callable[[int], str]
    inputs: NDArray[Any]
    of: str
    client: Column
    label: Column
    split: Column | None
    left_out: str = ""

    def to_clients(self, files: OwnFiles) -> NewClients:
        """Clients in the order of their names, whose examples are in the order of the rows.

        Of clients with a split of their own, the training part comes first.
        """
        names, client_of_row = self._clients()
        labels, class_names = self._labels(files.labels)
        in_test = np.zeros(len(client_of_row), dtype=bool) if self.split is None else self._in_test(self.split)
        order = np.lexsort((in_test, client_of_row))
        ends = np.cumsum(np.bincount(client_of_row, minlength=len(names))).tolist()
        num_train = None if self.split is None else np.bincount(client_of_row[~in_test], minlength=len(names)).tolist()
        if num_train is not None and not any(0 < own < end - start for own, start, end in _parts(num_train, ends)):
            raise self._fault(
                f"{self._named(self.split)} puts each client into one part as a whole; --unseen_fraction says how many "
                f"never train, so leave it out (--ignore_columns {self.split.name if self.split else ''})"
            )

        def clients() -> Iterator[NamedClient]:
            for client, name in enumerate(names):
                own = order[ends[client - 1] if client else 0 : ends[client]]
                yield NamedClient(name, self.inputs[own], labels[own], None if num_train is None else num_train[client])

        return NewClients(clients(), class_names, about=self._about(len(names), class_names))

    def _about(self, num_clients: int, class_names: Sequence[str] | None) -> str:
        targets = "numbers to predict" if class_names is None else f"{len(class_names)} classes"
        split = "" if self.split is None else f", train and test from {self._named(self.split)}"
        left_out = f"; passed over: {self.left_out}" if self.left_out else ""
        return (
            f"{self.path.name}: {len(self.inputs):,} rows of {num_clients:,} clients ({self._named(self.client)}), "
            f"{self.of}, {targets} ({self._named(self.label)}){split}{left_out}"
        )

    def _clients(self) -> tuple[list[str], NDArray[np.int64]]:
        """The clients' names in order, and the number of each row's client."""
        values = self.client.values
        if values.dtype.kind == "f":
            values = self._whole(self.client, "a client's name or number")
        if values.dtype.kind not in "iuUb":
            raise self._fault(f"{self._named(self.client)} holds {values.dtype}; let it hold names or whole numbers")
        self._refuse_empty(self.client, values)
        return _numbered(values)

    def _labels(self, kind: str | None) -> tuple[NDArray[Any], list[str] | None]:
        """Classes and their names, or targets (num_rows, num_targets) and None."""
        column, values = self.label, self.label.values
        if values.dtype.kind not in "iufUb":
            raise self._fault(f"{self._named(column)} holds {values.dtype}; let it hold classes or numbers")
        is_text = values.dtype.kind == "U"
        if is_text:
            self._refuse_empty(column, values)
            if kind == "numbers":
                raise self._fault(
                    f"{self._named(column)} holds text, {str(values[0])!r:.50} in {self.row_place(0)}, and --labels "
                    "numbers asks for numbers; write numbers, or leave the flag out"
                )
        elif values.dtype.kind == "f":
            self.refuse_not_finite(column)
        if values.ndim == 2 or kind == "numbers":
            return self._targets(values), None
        if values.dtype.kind == "f":
            if kind is None and (values != np.floor(values)).any():
                return self._targets(values), None
            values = self._whole(column, "a class")
        names, labels = _numbered(values)
        if len(names) < 2:
            raise self._fault(f"{self._named(column)} holds nothing but {names[0]!r:.50}; there must be two classes")
        if len(names) > MOST_CLASSES and kind is None and not is_text:
            raise self._fault(
                f"{self._named(column)} holds {len(names):,} different whole numbers; say whether they are numbers to "
                "predict or classes, by --labels numbers or --labels classes"
            )
        return labels, names

    def _targets(self, values: NDArray[Any]) -> NDArray[np.float32]:
        if self.label.values.ndim == 2 and values.shape[1] > 1 and ((values == 0) | (values == 1)).all():
            raise self._fault(
                f"{self._named(self.label)} has the shape {values.shape} and holds nothing but 0 and 1, as one-hot "
                f"classes do; store the classes ({self.label.name}.argmax(axis=1))"
            )
        with np.errstate(over="ignore"):
            targets = values.reshape(len(values), -1).astype(np.float32)
        return self._refuse_too_large(self.label, targets)

    def _in_test(self, split: Column) -> NDArray[np.bool_]:
        names = np.char.lower(np.char.strip(split.values.astype(str)))
        odd = np.flatnonzero(~np.isin(names, ("train", "test")))
        if len(odd):
            raise self._fault(
                f"{self._named(split)} holds {str(split.values[odd[0]])!r:.50} in {self.row_place(int(odd[0]))}; write "
                f"train or test in each row, or leave the column out (--ignore_columns {split.name})"
            )
        return np.asarray(names == "test")

    def _whole(self, column: Column, of: str) -> NDArray[np.int64]:
        self.refuse_not_finite(column)
        odd = np.flatnonzero((column.values != np.floor(column.values)) | (np.abs(column.values) >= 2**53))
        if len(odd):
            raise self._fault(
                f"{self._named(column)} holds {column.values[odd[0]]} in {self.row_place(int(odd[0]))}, which is no "
                f"whole number, and so not {of}"
            )
        return column.values.astype(np.int64)

    def _refuse_empty(self, column: Column, values: NDArray[Any]) -> None:
        empty: NDArray[np.intp] = np.flatnonzero(values == "" if values.dtype.kind == "U" else [])
        if len(empty):
            raise self._fault(
                f"{self._named(column)} is empty in {self.row_place(int(empty[0]))}; fill it in, or remove the row"
            )

    def refuse_not_finite(self, column: Column) -> None:
        """Raises ValueError where a number is missing or infinite."""
        odd = np.argwhere(~np.isfinite(column.values))
        if len(odd):
            value = column.values[tuple(odd[0])]
            what = "has no value" if np.isnan(value) else f"holds {value}"
            raise self._fault(
                f"{self._named(column)} {what} in {self.row_place(int(odd[0][0]))}; fill it in, or remove the row"
            )

    def _refuse_too_large(self, column: Column, values: NDArray[np.float32]) -> NDArray[np.float32]:
        odd = np.argwhere(~np.isfinite(values))
        if len(odd):
            place = tuple(odd[0])
            raise self._fault(
                f"{self._named(column)} holds {column.values.reshape(values.shape)[place]} in "
                f"{self.row_place(int(place[0]))}, which is too large for 32 bits; scale the column"
            )
        return values

    def _named(self, column: Column | None) -> str:
        return "" if column is None else f"{self.kind} {column.name!r:.80}"

    def _fault(self, fault: str) -> ValueError:
        return ValueError(f"{self.path}: {fault}")


def stored_rows(file: Path, files: OwnFiles, read: Callable[[Path, OwnFiles], Rows]) -> StoredClients:
    """The clients of a file, which is read once for each way of reading it, and again when it changes."""
    way = json.dumps({name: value for name, value in asdict(files).items() if name != "standardize"})
    name = f"{file.name}-{hashlib.blake2b(way.encode(), digest_size=4).hexdigest()}"
    return stored_clients(file.parent / CACHE, name, [file], lambda: read(file, files).to_clients(files))


def as_numbers(path: Path, column: Column, kind: str, row_place: Callable[[int], str]) -> NDArray[np.float32]:
    """A feature's or inputs' values as they are kept. Raises ValueError where one is missing, infinite or too large."""
    values = column.values
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32, copy=False)
    odd = np.argwhere(~np.isfinite(numbers))
    if not len(odd):
        return numbers
    place = tuple(odd[0])
    what = "has no value" if np.isnan(values[place]) else f"holds {values[place]}"
    fix = "fill it in, or remove the row" if not np.isfinite(values[place]) else "it is too large for 32 bits; scale it"
    raise ValueError(
        f"{path}: {kind} {column.name!r:.80} {what} in {row_place(int(place[0]))}; {fix}, or leave the {kind} out "
        f"(--ignore_columns {column.name})"
    )


@dataclass(frozen=True)
class Layout:
    """Which column is what. others: neither client nor label nor split, nor to be ignored."""

    client: str
    label: str
    split: str | None
    others: list[str]


def layout_of(path: Path, kind: str, names: Sequence[str], files: OwnFiles) -> Layout:
    """Columns as the flags name them, or else by their usual names.

    Raises ValueError where two have one name, one is not there, or one may be either of two things.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has two {kind}s {twice[0]!r:.80}; rename one")
    shown = ", ".join(f"{name!r:.40}" for name in names[:SHOWN_NAMES])
    listed = f"there are the {kind}s {shown}{', ...' if len(names) > SHOWN_NAMES else ''}"
    ignored = [] if files.ignore_columns is None else [name.strip() for name in files.ignore_columns.split(",")]

    def find(flag: str, asked: str | None, usual: Sequence[str]) -> str | None:
        if asked is not None and asked not in names:
            raise ValueError(f"{path}: --{flag} {asked} is not there; {listed}")
        if asked is not None:
            return asked
        found = [name for name in names if name.lower() in usual and name not in ignored]
        if len(found) > 1:
            raise ValueError(
                f"{path}: {' and '.join(map(repr, found))} may each be meant; name the right one by --{flag}"
            )
        return found[0] if found else None

    def need(flag: str, asked: str | None, usual: Sequence[str], of: str) -> str:
        name = find(flag, asked, usual)
        if name is None:
            raise ValueError(
                f"{path}: no {kind} is called {', '.join(usual[:-1])} or {usual[-1]}; name the one with {of} by "
                f"--{flag}; {listed}"
            )
        return name

    for name in ignored:
        find("ignore_columns", name, ())
    client = need("client_column", files.client_column, CLIENT_NAMES, "each row's client")
    label = need("label_column", files.label_column, LABEL_NAMES, "the labels")
    split = find("split_column", files.split_column, SPLIT_NAMES)
    used = [client, label, *([] if split is None else [split])]
    twice = [name for name, count in Counter([*used, *set(ignored)]).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: {kind} {twice[0]!r} is named for two things; name another, or leave a flag out")
    return Layout(client, label, split, [name for name in names if name not in (*used, *ignored)])


def refuse_larger_than_memory(path: Path, num_bytes: int) -> None:
    """Raises ValueError where the content cannot be held, as of a small file that unpacks to a huge one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        raise ValueError(
            f"{path} unpacks to {num_bytes / 2**30:.1f} GiB, more than the {memory / 2**30:.1f} GiB of this machine; "
            "split it, or store smaller numbers (uint8 images, float32)"
        )


def _numbered(values: NDArray[Any]) -> tuple[list[str], NDArray[np.int64]]:
    """Different values as texts, in the order of the numbers or of the texts, and each row's place among them."""
    different, places = np.unique(values, return_inverse=True)
    names = [str(value) for value in different.tolist()]
    if different.dtype.kind == "U" and all(name.isdecimal() and name.isascii() for name in names):
        order = sorted(range(len(names)), key=lambda place: (int(names[place]), names[place]))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        return [names[place] for place in order], rank[places.reshape(-1)]
    return names, places.reshape(-1).astype(np.int64)


def _parts(num_train: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(size of the training part, first row, row behind the last) of each client."""
    return zip(num_train, [0, *ends[:-1]], ends, strict=True)
