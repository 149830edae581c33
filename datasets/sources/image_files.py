"""Image files, read the same way wherever they come from: pixels of one form, or a refusal that says what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from perfedavg.own_files import OwnFiles

FORMATS = ("PNG", "JPEG", "BMP", "GIF")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16")
"""Pillow's, of what these formats hold. I;16 is grey with 16 bits."""

FAINT_16_BIT = 4096
"""A 16-bit image without a value so large holds values of 12 bits or fewer, and would come out all but black."""

MOST_PIXELS = 80_000_000
"""Of an image that is to be scaled. Few bytes can stand for pixels that fill the memory."""

ONE_INK = 16
"""Greys by which visible pixels may differ, by rounding or compression, and still count as ink of one colour."""

LOST_CONTRAST = 16
"""An image whose colours differ by more than this many times what its greys differ by loses its content in grey."""


@dataclass(frozen=True)
class ImageForm:
    """What images are brought to.

    size: (width, height).
    colour: `grey` or `rgb`.
    is_scaled: whether images of another size are scaled to this one; they are refused otherwise.
    is_chosen: whether the user could choose another one, by --image_size and --image_color.
    """

    size: tuple[int, int] = (28, 28)
    colour: str = "grey"
    is_scaled: bool = False
    is_chosen: bool = False

    @classmethod
    def of_model(cls, input_shape: tuple[int, ...], files: OwnFiles) -> ImageForm:
        """Of images for a model that takes (channels, height, width); scaled where the run's own images were.

        Raises ValueError where it takes no images in grey or colour.
        """
        if len(input_shape) != 3 or input_shape[0] not in (1, 3):
            raise ValueError(f"inputs of the shape {input_shape} are no images in grey or colour")
        channels, height, width = input_shape
        return cls((width, height), "rgb" if channels == 3 else "grey", is_scaled=files.image_size is not None)

    def __str__(self) -> str:
        return f"{shown_size(self.size)} in {'colour' if self.colour == 'rgb' else 'grey'}"

    @property
    def name(self) -> str:
        """Of a cache; equal forms, equal name, and no name is the beginning of another."""
        return f"{shown_size(self.size)}{'-scaled' if self.is_scaled else ''}-{self.colour}"

    def fault_of_size(self, size: tuple[int, int]) -> str | None:
        """What is wrong with an image of so many pixels, (width, height), and the fix."""
        if self.is_scaled or size == self.size:
            return None
        way = "scale it, or have all images scaled, such as by --image_size 32" if self.is_chosen else "scale it"
        return f"is {shown_size(size)}, not {shown_size(self.size)}; {way}"

    def fault_of(self, image: Image.Image) -> str | None:
        """What the header of an image says against reading it, and the fix; before any pixel is decoded."""
        if self.fault_of_size(image.size) and self.fault_of_size(image.size[::-1]):  # it may have to be turned
            return self.fault_of_size(image.size)
        if image.size[0] * image.size[1] > MOST_PIXELS:
            return f"is {shown_size(image.size)}, more than {MOST_PIXELS:,} pixels; scale it"
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format in FORMATS:  # a JPEG with further pictures is of another one
            return f"holds {frames} frames; save the one that counts as an image of its own"
        if image.mode not in MODES:
            return f"is of Pillow's mode {image.mode}, not of {', '.join(MODES)}; save it as 8-bit grey"
        if image.mode == "I;16" and image.has_transparency_data:
            return "has 16 bits and transparency; save it as 8-bit grey without transparency"
        return None


def shown_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


GREY_28 = ImageForm()
"""What the models of MNIST, EMNIST and FEMNIST take."""


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as it is shown. Raises ValueError where it is none that could be read."""
    any_size = ImageForm(is_scaled=True)
    return _opened(path, str(path), any_size)[0].size


def read_image(
    source: Path | IO[bytes], place: str, form: ImageForm = GREY_28, ink_is_dark: bool = False
) -> NDArray[np.uint8]:
    """Pixels of that form: greys (height, width), with bright ink on a dark ground, or (3, height, width) in colour.

    place: what the image is called in messages.  ink_is_dark: on a bright ground; the image is inverted.
    16-bit values are scaled to 8 bits, and an orientation in the file is followed. In grey, colours become their
    brightness, and transparent pixels are ground: of ink of one colour, whatever it is, the opacity is taken, so that
    black ink and white ink on a transparent ground are both bright ink on a dark one.
    Where images are scaled, all of one is kept: it is fitted into the size, and the rest is black.
    Raises ValueError, with the place and the fix, for anything that is no such image, and where what it shows could not
    be kept: several colours beside transparency, several frames, contrast in nothing but colour, 16 bits hardly used.
    """
    turned, colours_of_16_bits = _opened(source, place, form)
    if turned.mode == "I;16":
        pixels = _from_16_bits(turned, place)
    elif colours_of_16_bits and np.asarray(turned).max() < FAINT_16_BIT // 256:  # Pillow has kept their upper 8 bits
        raise ValueError(_faint(place, "its upper 8 bits hardly used"))
    elif form.colour == "rgb":
        pixels = _colours(turned, place)
    elif turned.has_transparency_data and (ink := _opacity(turned, place)) is not None:
        return _fitted(ink, form)
    else:
        pixels = _brightness(turned, place, form)
    pixels = _fitted(pixels, form)
    if form.colour == "rgb":
        pixels = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else np.stack([pixels] * 3)
    return 255 - pixels if ink_is_dark else pixels


def are_blank(images: NDArray[np.uint8]) -> bool:
    """Whether each of the images (num_images, ..., height, width) has one and the same colour all over."""
    return bool((images == images[..., :1, :1]).all())


def _opened(source: Path | IO[bytes], place: str, form: ImageForm) -> tuple[Image.Image, bool]:
    """An image as it is to be shown, and whether it has colours of 16 bits."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            fault = form.fault_of(image)
            colours_of_16_bits = image.mode != "I;16" and any(";16" in str(tile.args) for tile in image.tile)
            turned = None if fault else ImageOps.exif_transpose(image)
    except Exception as error:
        raise _unreadable(place, error) from error
    fault = fault if turned is None else form.fault_of_size(turned.size)
    if turned is None or fault:
        raise ValueError(f"{place} {fault}")
    return turned, colours_of_16_bits


def _unreadable(place: str, error: Exception) -> ValueError:
    """On damaged files, Pillow raises a dozen kinds."""
    if isinstance(error, OSError) and error.strerror:
        return ValueError(f"{place} cannot be read ({error.strerror})")
    formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    return ValueError(f"{place} is damaged or no {formats} ({' '.join(str(error).split())})")


def _fitted(pixels: NDArray[np.uint8], form: ImageForm) -> NDArray[np.uint8]:
    """(height, width) or (height, width, 3) in the form's size."""
    height, width = pixels.shape[:2]
    if (width, height) == form.size:
        return pixels
    factor = min(form.size[0] / width, form.size[1] / height)
    inner = (max(1, round(width * factor)), max(1, round(height * factor)))
    scaled = np.asarray(Image.fromarray(pixels).resize(inner, Image.Resampling.BILINEAR))
    canvas = np.zeros((form.size[1], form.size[0], *pixels.shape[2:]), dtype=np.uint8)
    left, top = (form.size[0] - inner[0]) // 2, (form.size[1] - inner[1]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = scaled
    return canvas


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


def _colours(image: Image.Image, place: str) -> NDArray[np.uint8]:
    if image.has_transparency_data and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
        raise ValueError(f"{place} has transparent pixels, whose ground is not known; save it without transparency")
    return np.asarray(image.convert("RGB"))


def _brightness(image: Image.Image, place: str, form: ImageForm) -> NDArray[np.uint8]:
    greys = np.asarray(image.convert("L"))
    bands = np.asarray(image.convert("RGB")).reshape(-1, 3)
    contrast = int((bands.max(axis=0) - bands.min(axis=0)).max())
    if contrast > LOST_CONTRAST * max(int(np.ptp(greys)), 1):
        keep = ", or keep colours by --image_color rgb" if form.is_chosen else ""
        raise ValueError(
            f"{place} shows something in its colours that has the same grey all over; save it as grey, with "
            f"contrast{keep}"
        )
    return greys
