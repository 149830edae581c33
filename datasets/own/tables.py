"""A user's own table: CSV or parquet, a row an example, with a column for the client and one for the label."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.own.rows import CLIENT_NAMES, Column, Rows, as_numbers, layout_of, refuse_larger_than_memory
from perfedavg.own_files import OwnFiles

SEPARATORS = (",", ";", "\t")
ROW_NUMBERS = re.compile(r"|Unnamed: \d+(_level_\d+)?|__index_level_\d+__")
"""Names under which pandas writes the numbers of the rows."""
LONGEST_LINE = 1 << 22
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


def read_table(path: Path, files: OwnFiles) -> Rows:
    """The rows of a table: all columns but those of client, label and split are features, and must be numbers.

    Raises ValueError where the file is damaged, a column is missing or twice there, or a feature is no number.
    """
    import pyarrow as pa

    is_parquet = path.suffix.lower() == ".parquet"
    try:
        table = _read_parquet(path) if is_parquet else _read_csv(path, files)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}); save it as CSV in UTF-8") from error
    except (pa.ArrowException, OSError, csv.Error) as error:
        kind = "parquet" if is_parquet else "CSV"
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or no {kind} file ({reason:.300}); mend it, or write it anew") from error
    place = _row_of_parquet if is_parquet else _row_of_csv
    names: list[str] = table.column_names
    layout = layout_of(path, "column", names, files)
    features = [name for name in layout.others if not ROW_NUMBERS.fullmatch(name)]
    if not table.num_rows:
        raise ValueError(f"{path} has no rows")
    if not features:
        raise ValueError(f"{path} has no column left for a feature; add one with a number in each row")

    def column(name: str) -> Column:
        return Column(name, _values(path, name, table.column(name)))

    inputs = np.empty((table.num_rows, len(features)), dtype=np.float32)
    for number, name in enumerate(features):
        inputs[:, number] = _feature(path, column(name), place)
    used = (*features, layout.client, layout.label, layout.split)
    left_out = ", ".join(name or "the column without a name" for name in names if name not in used)
    of = f"{len(features)} feature{'s' if len(features) > 1 else ''}"
    split = None if layout.split is None else column(layout.split)
    return Rows(path, "column", place, inputs, of, column(layout.client), column(layout.label), split, left_out)


def _read_csv(path: Path, files: OwnFiles) -> Any:
    """The content of a CSV file, with types as all its rows have them; the clients' names as they are written."""
    import pyarrow as pa
    import pyarrow.csv

    names, separator = _header(path)
    texts = {name: pa.string() for name in names if name.lower() in CLIENT_NAMES or name == files.client_column}
    return pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(use_threads=False, block_size=LONGEST_LINE),
        parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=texts, strings_can_be_null=False),
    )


def _header(path: Path) -> tuple[list[str], str]:
    """The names in the first line, and what separates them."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        line = file.readline(LONGEST_LINE)
    if not line.strip():
        raise ValueError(f"{path}: its first line is empty; let it name the columns")
    if "\0" in line:
        raise ValueError(f"{path} is no text in UTF-8; save it as CSV in UTF-8")
    unquoted = re.sub(r'"[^"]*"', "", line)
    separator = max(SEPARATORS, key=unquoted.count)
    return next(csv.reader([line.rstrip("\r\n")], delimiter=separator)), separator


def _read_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        metadata = file.metadata
        refuse_larger_than_memory(path, 4 * metadata.num_rows * metadata.num_columns)
        refuse_larger_than_memory(
            path, sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        )
        table = file.read(use_threads=False)
        table.validate(full=True)
        return table


def _values(path: Path, name: str, cells: Any) -> NDArray[Any]:
    """A column's cells as numpy has them; a missing number is NaN, a missing text is empty."""
    import pyarrow as pa

    kind = cells.type
    if pa.types.is_dictionary(kind):
        cells = cells.cast(kind.value_type)
        kind = kind.value_type
    if pa.types.is_null(kind):
        raise ValueError(f"{path}: column {name!r:.80} is empty; remove it, or leave it out (--ignore_columns {name})")
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.array(cells.fill_null("").to_pylist(), dtype=str)
    if pa.types.is_decimal(kind) or pa.types.is_float16(kind):
        cells = cells.cast(pa.float64())
        kind = cells.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        whole = cells.null_count == 0
        return np.asarray(cells.to_numpy() if whole else cells.cast(pa.float64(), safe=False).to_numpy())
    if pa.types.is_floating(kind):
        return np.asarray(cells.to_numpy())
    raise ValueError(
        f"{path}: column {name!r:.80} is of the type {kind!s:.80}, neither numbers nor text; write numbers, or leave "
        f"it out (--ignore_columns {name})"
    )


def _feature(path: Path, column: Column, place: Callable[[int], str]) -> NDArray[np.float32]:
    if column.values.dtype.kind != "U":
        return as_numbers(path, column, "column", place)
    row = next((row for row, text in enumerate(column.values.tolist()) if not _is_number(text)), 0)
    text = str(column.values[row])
    fix = "write numbers in its place, such as a column of 0 and 1 for each value"
    if _DECIMAL_COMMA.fullmatch(text):
        fix = "write a decimal point in place of the comma"
    raise ValueError(
        f"{path}: column {column.name!r:.80} holds text, {text!r:.50} in {place(row)}, and features are numbers; "
        f"{fix}, or leave the column out (--ignore_columns {column.name})"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _row_of_csv(row: int) -> str:
    return f"row {row + 1} below the header"


def _row_of_parquet(row: int) -> str:
    return f"row {row}"
