"""A user's own arrays: an .npz file with x, y and client, as numpy.savez writes it."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from datasets.own.rows import Column, Rows, as_numbers, layout_of, refuse_larger_than_memory
from perfedavg.own_files import OwnFiles

INPUT_NAMES = ("x", "inputs", "images", "features", "data")
npy: Any = np.lib.format
CHANNELS = (1, 3)
"""Of images in grey and in colour, by which an axis of channels is told from height and width."""


def read_arrays(path: Path, files: OwnFiles) -> Rows:
    """The rows of an .npz file, of which only the arrays that are needed are read.

    x: images, uint8 or floating-point, (rows, height, width) with an axis of channels before or behind these two; or
        numbers, (rows,) or (rows, features).  y: (rows,) classes, or numbers, also (rows, targets).  client: (rows,).
    Raises ValueError where the file is damaged, or an array cannot be used; Python objects are not unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive, files)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} is damaged or no .npz file ({reason:.200}); write it anew with numpy.savez"
        ) from error


def _read(path: Path, archive: zipfile.ZipFile, files: OwnFiles) -> Rows:
    names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
    members = dict(zip(names, archive.infolist(), strict=True))
    layout = layout_of(path, "array", names, files)
    inputs = [name for name in layout.others if name.lower() in INPUT_NAMES]
    if len(inputs) != 1:
        raise ValueError(
            f"{path}: one array of inputs must be called {', '.join(INPUT_NAMES[:-1])} or {INPUT_NAMES[-1]}, and of "
            f"{', '.join(layout.others) or 'none'} there is {len(inputs)}; rename one, or use --ignore_columns"
        )

    def column(name: str) -> Column:
        return Column(name, _read_array(path, archive, members[name]))

    x, client, label = column(inputs[0]), _flat(column(layout.client)), _flat(column(layout.label))
    split = None if layout.split is None else _flat(column(layout.split))
    for name, values in ((one.name, one.values) for one in (client, split) if one is not None):
        if values.ndim != 1:
            raise ValueError(f"{path}: array {name!r} has the shape {values.shape}; give one value a row")
    kind, shape = label.values.dtype, label.values.shape
    if len(shape) > 2 or (len(shape) == 2 and kind.kind != "f"):
        raise ValueError(
            f"{path}: array {label.name!r} is {kind} of the shape {shape}; give one class a row, or floating-point "
            "targets (rows, targets)"
        )
    for other in (client, label, *([] if split is None else [split])):
        if len(other.values) != len(x.values):
            raise ValueError(
                f"{path}: array {x.name!r} has {len(x.values)} rows and {other.name!r} {len(other.values)}; give each "
                "row one"
            )
    if not len(x.values):
        raise ValueError(f"{path}: array {x.name!r} has no rows")
    unused = ", ".join(name for name in names if name not in (x.name, client.name, label.name, layout.split))
    values, of = _inputs(path, x)
    return Rows(path, "array", _row_place, values, of, client, label, split, unused)


def _read_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """An array of which the header is checked before memory is taken for it."""
    what = f"{path}: {info.filename.removesuffix('.npy')!r}"
    with archive.open(info) as file:
        shape, dtype, header_size = _header(what, file)
    if dtype.hasobject:
        raise ValueError(
            f"{what} holds Python objects, which are not read, because reading them can run code; store texts or "
            "numbers (array.astype(str), or numpy.stack for arrays in an array)"
        )
    if dtype.kind not in "biufUS" or not shape:
        raise ValueError(f"{what} is {dtype} of the shape {shape}; store numbers or texts, a row an example")
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if expected != info.file_size - header_size:
        raise ValueError(
            f"{what} should have {expected} bytes of values and has {info.file_size - header_size}; write it anew"
        )
    refuse_larger_than_memory(path, expected)
    with archive.open(info) as file:
        values: NDArray[Any] = npy.read_array(file, allow_pickle=False)
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values


def _header(what: str, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, type and size of the header of an .npy file."""
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"its version is {version}")
        shape, _, dtype = read(file)
    except ValueError as error:
        raise ValueError(
            f"{what} is no array ({' '.join(str(error).split()):.200}); write it with numpy.savez"
        ) from error
    return shape, dtype, file.tell()


def _flat(column: Column) -> Column:
    """A column of shape (rows, 1) as one of shape (rows,)."""
    values = column.values
    return Column(column.name, values[:, 0]) if values.ndim == 2 and values.shape[1] == 1 else column


def _inputs(path: Path, x: Column) -> tuple[NDArray[Any], str]:
    """The inputs as they are kept, and what they are in words."""
    values = x.values
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path}: array {x.name!r} holds {values.dtype}; let it hold numbers")
    if 0 in values.shape[1:]:
        raise ValueError(f"{path}: array {x.name!r} has the shape {values.shape}; an example must have a value")
    if values.ndim <= 2:
        numbers = as_numbers(path, x, "array", _row_place)
        numbers = numbers.reshape(len(values), -1)
        return numbers, f"{numbers.shape[1]} features"
    if values.ndim == 3:
        images = values[:, None]
    elif values.ndim == 4 and values.shape[3] in CHANNELS and values.shape[1] not in CHANNELS:
        images = values.transpose(0, 3, 1, 2)
    else:
        images = values
    of = f"inputs {'x'.join(map(str, images.shape[1:]))}"
    if values.dtype == np.uint8 and images.ndim == 4:
        return images, f"{of} of 8 bits, read as 0..1"
    if values.dtype.kind != "f":
        raise ValueError(
            f"{path}: array {x.name!r} is {values.dtype} of the shape {values.shape}; store images as uint8 (0..255) "
            "or as floating-point numbers"
        )
    return as_numbers(path, Column(x.name, images), "array", _row_place), of


def _row_place(row: int) -> str:
    return f"row {row}"
