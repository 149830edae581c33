"""Sums in fewer bytes, for lines on which bytes take longer than packing: lossless, a third or two fifths are left.

An entry of a sum is a whole number of 64 bits, most of which say nothing: few updates come near the bound that the grid
leaves room for, so the top bytes are all sign; a float32 has 24 bits, so the lowest are often zero; and so is the whole
entry where no example reached a weight. docs/decisions.md has what was measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SLOW_BYTES_PER_SECOND = 12.5e6
"""Of a line, 100 Mbit/s. From some 80 MB/s on, packing and unpacking take longer than what they save."""
_LEVEL = 1
"""Of zstd. Higher ones leave as much."""
_LOWEST_63_BITS = 2**63 - 1


def pack(entries: Tensor) -> Tensor:
    """(n,) int64 to int8. `unpack` is its inverse, to the bit."""
    folded = (entries << 1) ^ (entries >> 63)  # the sign goes last, so that the top bytes of small numbers are zero
    planes = folded.view(torch.uint8).view(-1, 8).t().contiguous()  # first bytes of all entries, second ones, ...
    packed: bytes = _codec().compress(planes.numpy(), asbytes=True)
    return torch.frombuffer(bytearray(packed), dtype=torch.int8)


def unpack(packed: Tensor, num_entries: int) -> Tensor:
    """Raises ValueError where it is not so many entries that were packed."""
    try:
        content = _codec().decompress(packed.numpy(), 8 * num_entries)
    except (OSError, ValueError) as error:  # pyarrow's own
        raise ValueError("what was packed cannot be unpacked") from error
    planes = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
    if planes.numel() != 8 * num_entries:
        raise ValueError("what was packed has another size than it says")
    folded = planes.view(8, -1).t().reshape(-1).view(torch.int64)
    return ((folded >> 1) & _LOWEST_63_BITS) ^ -(folded & 1)


def _codec() -> Any:
    import pyarrow  # here, because most runs have no slow lines

    return pyarrow.Codec("zstd", compression_level=_LEVEL)
