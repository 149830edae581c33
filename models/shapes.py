"""Which inputs a model takes."""

from __future__ import annotations

from collections.abc import Sequence

Shape = tuple[int, ...]
"""Of the inputs of one example: (channels, height, width) of an image, (length,) of tokens or of other numbers."""


def image_of(shape: Sequence[int], least_side: int) -> tuple[int, int, int]:
    """The channels, height and width of an image. Raises ValueError where inputs are none, or too small."""
    if len(shape) != 3:
        raise ValueError(f"it takes images (channels, height, width), the inputs are {tuple(shape)}")
    channels, height, width = shape
    if min(height, width) < least_side:
        raise ValueError(f"it takes images from {least_side}x{least_side} pixels on, these have {height}x{width}")
    return channels, height, width


def length_of(shape: Sequence[int], kind: str) -> int:
    """The length of inputs that are a plain list. kind: of what, such as `tokens`. Raises ValueError for others."""
    if len(shape) != 1:
        raise ValueError(f"it takes {kind} (length,), the inputs are {tuple(shape)}")
    return shape[0]
