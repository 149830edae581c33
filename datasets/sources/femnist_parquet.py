"""FEMNIST from the .parquet files of the public `femnist` data set. Everything in them is checked, nothing executed."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.clients.stored import NamedClient
from datasets.sources.class_names import BYCLASS
from datasets.sources.image_files import read_image

ROWS_PER_BATCH = 1024

_NAME = r"(large_)?string|u?int\d+"
COLUMNS = {
    "image": (r"(large_)?binary|struct<.*\bbytes: (large_)?binary\b.*>", "bytes, or a struct with binary bytes"),
    "writer_id": (rf"{_NAME}|dictionary<values=({_NAME}),.*>", "a string or an integer"),
    "character": (r"u?int\d+", "an integer, the label"),
}
"""The types, as pyarrow writes them, that each column may have, and what they are in words."""


class _EncodedImage(NamedTuple):
    """One row.  place: the file and the row, for messages."""

    content: bytes
    label: int
    place: str


def clients_of_parquet(files: Sequence[Path]) -> Iterator[NamedClient]:
    """Clients in the order of their names, with images that are inverted here to bright ink on a dark ground.

    Images wait for their writer as they are in the file: decoded, they would take three times as much memory.
    Raises ValueError, with the file and the place in it, for damaged files.
    """
    rows_of: defaultdict[str, list[_EncodedImage]] = defaultdict(list)
    for path in files:
        for writer, image in _rows(path):
            rows_of[writer].append(image)
    for writer in sorted(rows_of):
        rows = rows_of.pop(writer)
        images = [read_image(io.BytesIO(image.content), image.place, ink_is_dark=True) for image in rows]
        yield NamedClient(writer, np.stack(images), np.array([image.label for image in rows], dtype=np.int64))


def _rows(path: Path) -> Iterator[tuple[str, _EncodedImage]]:
    """(writer, image) of each row, with writers and labels checked and images not yet decoded."""
    row = -1
    for row, (content, writer, label) in enumerate(_cells(path)):
        place = f"{path}: row {row} has"
        for name, is_there in (("image", content is not None), ("writer_id", writer not in (None, ""))):
            if not is_there:
                raise ValueError(f"{place} no {name}")
        if label is None:
            raise ValueError(f"{place} no character")
        if not 0 <= label < len(BYCLASS):
            raise ValueError(f"{place} character {label}, not in 0..{len(BYCLASS) - 1}")
        yield str(writer), _EncodedImage(content, label, f"{path}: the image of row {row}")
    if row < 0:
        raise ValueError(f"{path} has no rows")


def _cells(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """(encoded image, writer, label) of each row; an empty cell is None."""
    # Only the process that builds the cache pays for this import.
    import pyarrow as pa
    import pyarrow.parquet as pq

    # One thread: the decoder is the slow part, and other processes of the machine wait for their share.
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_columns(schema, path)
            image = "image.bytes" if pa.types.is_struct(schema.field("image").type) else "image"
            columns = [image, "writer_id", "character"]
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=columns, use_threads=False):
                batch.validate(full=True)
                contents = batch.column("image") if image == "image" else batch.column("image").flatten()[0]
                cells = (contents, batch.column("writer_id"), batch.column("character"))
                yield from zip(*(column.to_pylist() for column in cells), strict=True)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or no parquet file: {reason}") from error


def _check_columns(schema: Any, path: Path) -> None:
    for name, (pattern, expected) in COLUMNS.items():
        if schema.get_field_index(name) < 0:
            raise ValueError(
                f"{path} has no column {name!r}; its columns are {schema.names}; rename the one that has it"
            )
        kind = str(schema.field(name).type)
        if not re.fullmatch(pattern, kind):
            raise ValueError(f"{path}: column {name!r} is {kind!r}, not {expected}")
