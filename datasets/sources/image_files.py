"""Image files, read the same way wherever they come from: 28x28 greys, or a refusal that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

IMAGE_SIZE = (28, 28)
FORMATS = ("PNG", "JPEG", "BMP", "GIF")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16")
"""Pillow's, of what these formats hold. I;16 is grey with 16 bits."""

FAINT_16_BIT = 4096
"""A 16-bit image without a value so large holds values of 12 bits or fewer, and would come out all but black."""

ONE_INK = 16
"""Greys by which visible pixels may differ, by rounding or compression, and still count as ink of one colour."""

LOST_CONTRAST = 16
"""An image whose colours differ by more than this many times what its greys differ by loses its content in grey."""


def read_image(source: Path | IO[bytes], place: str, ink_is_dark: bool = False) -> NDArray[np.uint8]:
    """Greys (28, 28), with bright ink on a dark ground.

    place: what the image is called in messages.  ink_is_dark: on a bright ground; the image is inverted.
    16-bit greys are scaled to 8 bits, colours become their brightness, and an orientation in the file is followed.
    Transparent pixels are ground: of ink of one colour, whatever it is, the opacity is taken, so that black ink and
    white ink on a transparent ground are both bright ink on a dark one.
    Raises ValueError, with the place and the fix, for anything that is no such image, and where what it shows could not
    be kept: several colours beside transparency, several frames, contrast in nothing but colour, 16 bits hardly used.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            fault = _fault_of(image)  # before any pixel is decoded: few bytes can stand for pixels that fill the memory
            colours_of_16_bits = image.mode != "I;16" and any(";16" in str(tile.args) for tile in image.tile)
            turned = None if fault else ImageOps.exif_transpose(image)
    except Exception as error:  # on damaged files, Pillow raises a dozen kinds
        if isinstance(error, OSError) and error.strerror:
            raise ValueError(f"{place} cannot be read ({error.strerror})") from error
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise ValueError(f"{place} is damaged or no {formats} ({' '.join(str(error).split())})") from error
    if turned is None:
        raise ValueError(f"{place} {fault}")
    if turned.mode == "I;16":
        greys = _from_16_bits(turned, place)
    elif colours_of_16_bits and np.asarray(turned).max() < FAINT_16_BIT // 256:  # Pillow has kept their upper 8 bits
        raise ValueError(_faint(place, "its upper 8 bits hardly used"))
    elif turned.has_transparency_data and (ink := _opacity(turned, place)) is not None:
        return ink
    else:
        greys = _brightness(turned, place)
    return 255 - greys if ink_is_dark else greys


def are_blank(images: NDArray[np.uint8]) -> bool:
    """Whether each of the images (num_images, ..., height, width) has one and the same colour all over."""
    return bool((images == images[..., :1, :1]).all())


def _fault_of(image: Image.Image) -> str | None:
    """What its header says against reading it, and the fix."""
    if image.size != IMAGE_SIZE:
        return f"is {image.size[0]}x{image.size[1]}, not 28x28; scale it"
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in FORMATS:  # a JPEG with further pictures is of another one
        return f"holds {frames} frames; save the one that counts as an image of its own"
    if image.mode not in MODES:
        return f"is of Pillow's mode {image.mode}, not of {', '.join(MODES)}; save it as 8-bit grey"
    if image.mode == "I;16" and image.has_transparency_data:
        return "has 16 bits and transparency; save it as 8-bit grey without transparency"
    return None


def _from_16_bits(image: Image.Image, place: str) -> NDArray[np.uint8]:
    values = np.asarray(image).astype(np.uint32)
    brightest = int(values.max())
    if 0 < brightest < FAINT_16_BIT:
        raise ValueError(_faint(place, f"and no value above {brightest} of 65535"))
    return ((values + 128) // 257).astype(np.uint8)


def _faint(place: str, use: str) -> str:
    return f"{place} has 16 bits, {use}, and would come out all but black; save it as 8-bit grey"


def _opacity(image: Image.Image, place: str) -> NDArray[np.uint8] | None:
    """How opaque the ink is, or None where all pixels are opaque."""
    rgba = image.convert("RGBA")
    opacity = np.asarray(rgba.getchannel("A"))
    if opacity.min() == 255:
        return None
    weights = opacity / 255.0
    greys = np.asarray(rgba.convert("RGB").convert("L")).astype(np.float64)
    ink = (greys * weights).sum() / max(weights.sum(), 1.0)
    if (np.abs(greys - ink) * weights).max() > ONE_INK or (not opacity.any() and np.ptp(greys) > ONE_INK):
        raise ValueError(
            f"{place} has several colours beside transparent pixels, whose ground is not known; save it without "
            "transparency, on a dark ground"
        )
    return opacity


def _brightness(image: Image.Image, place: str) -> NDArray[np.uint8]:
    greys = np.asarray(image.convert("L"))
    bands = np.asarray(image.convert("RGB")).astype(np.int64)
    contrast = int(np.ptp(bands.reshape(-1, 3), axis=0).max())
    if contrast > LOST_CONTRAST * max(int(np.ptp(greys)), 1):
        raise ValueError(
            f"{place} shows something in its colours that has the same grey all over; save it as grey, with contrast"
        )
    return greys
