"""The IDX file format of MNIST and its kin, mapped into memory: processes of one machine share one copy."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

UNSIGNED_BYTE = 8


def map_idx(path: Path, num_dimensions: int, origin: Path) -> NDArray[np.uint8]:
    """The array of unsigned bytes in a file, read-only, paged in as it is used.

    The format: two zero bytes, the type, the number of dimensions, each size as 32 bits big-endian, the data.
    origin: the file that messages name, which may be the one that it was unpacked from.
    Raises ValueError, with the file and what is wrong in it, where the file is missing, damaged or something else.
    """
    header_size = 4 + 4 * num_dimensions
    try:
        file_size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(header_size)
    except OSError as error:
        raise ValueError(f"{origin} cannot be read ({error.strerror})") from error
    if len(header) < header_size or header[:4] != bytes((0, 0, UNSIGNED_BYTE, num_dimensions)):
        raise ValueError(
            f"{origin} is no IDX file of {num_dimensions} dimensions: it begins with {header[:4].hex(' ')}"
        )
    shape = struct.unpack(f">{num_dimensions}I", header[4:])
    expected = header_size + int(np.prod(shape, dtype=object))
    if file_size != expected:
        raise ValueError(f"{origin} is damaged: its header asks for {expected} bytes, it has {file_size}")
    if 0 in shape:
        raise ValueError(f"{origin} is empty: its shape is {shape}")
    return np.memmap(path, dtype=np.uint8, mode="r", offset=header_size, shape=shape)
