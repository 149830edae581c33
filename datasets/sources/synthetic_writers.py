"""Synthetic writers: a 62-class stand-in for FEMNIST that is made from fonts and needs no download.

The data are not handwriting. Results on them are not results on FEMNIST, and say nothing of how far from it they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datasets.clients.raw import Examples, RawClients
from datasets.sources.class_names import BYCLASS
from perfedavg.seeding import Purpose, data_stream

_FONTS = """
    DejaVuSans-Bold DejaVuSans-BoldOblique DejaVuSans-Oblique DejaVuSans DejaVuSansMono-Bold DejaVuSansMono-BoldOblique
    DejaVuSansMono-Oblique DejaVuSansMono DejaVuSerif-Bold DejaVuSerif-BoldItalic DejaVuSerif-Italic DejaVuSerif
    STIXGeneral STIXGeneralBol STIXGeneralBolIta STIXGeneralItalic cmb10 cmmi10 cmr10 cmss10 cmtt10
"""
FONTS = tuple(f"{name}.ttf" for name in _FONTS.split())
"""Those of matplotlib's fonts that have all characters. Their order enters the writers' styles."""

ALGORITHM_VERSION = 1
"""Raised with every change that gives any writer other examples."""

MIN_EXAMPLES, MAX_EXAMPLES = 20, 400
LOG_SIZE_SPREAD = 0.5
"""Standard deviation of the logarithm of a writer's number of examples."""

IMAGE_SIDE = 28
"""Pixels; below, a pixel is one of the images' unless said otherwise."""

FONT_SIZE = 144
"""Of the first rendering, which is then scaled to GLYPH_SIDE; far above it, so that outlines stay smooth."""
GLYPH_CANVAS, GLYPH_SIDE = 64, 48
"""Side of a glyph's field and of the longer side of its ink, in field cells."""
CELLS_PER_PIXEL = 2.4
"""Puts a glyph's longer side at 20 pixels before a writer scales it, as in EMNIST."""
REACH = (GLYPH_CANVAS - GLYPH_SIDE) // 2
"""Cells up to which distances from an outline are known; as wide as the margin."""


@dataclass(frozen=True)
class WriterSpread:
    """How writers differ. Angles in degrees, lengths in pixels.

    A pair is the range of a uniform distribution; mean and std are those of a normal one, whose mean is else 0.
    main_font_share: each class of a writer is in the main font with this probability, else in the second.
    class_concentration: of the symmetric Dirichlet distribution that a writer's class mix is drawn from.
    slant: pixels to the right per pixel of height.
    width, height: factors on a glyph's own.
    bend_std, class_bend_std: of each wave's amplitude, for the bend that all of a writer's examples share and for the
    one that its examples of one class share. They add up.
    thickness: added to either side of every stroke.
    edge_width: over which ink fades out.
    roughness: standard deviation of the noise on the position of a stroke's edge.
    darkness: value of full ink, as a share of 255.
    """

    main_font_share: float = 0.75
    class_concentration: float = 1.0
    rotation_std: float = 6.0
    slant_mean: float = 0.08
    slant_std: float = 0.15
    width: tuple[float, float] = (0.7, 1.05)
    height: tuple[float, float] = (0.85, 1.1)
    bend_std: float = 0.35
    class_bend_std: float = 0.35
    thickness: tuple[float, float] = (0.0, 0.9)
    edge_width: tuple[float, float] = (0.8, 2.2)
    roughness: tuple[float, float] = (0.0, 0.25)
    darkness: tuple[float, float] = (0.75, 1.0)


@dataclass(frozen=True)
class ExampleSpread:
    """How one writer's examples of a class differ: standard deviations of normal distributions, units of WriterSpread.

    scale: of width and of height, relative to the writer's.  shift: in pixels, across and down.
    """

    rotation: float = 3.5
    slant: float = 0.05
    scale: float = 0.04
    shift: float = 0.6
    bend: float = 0.22
    thickness: float = 0.12


WRITER_SPREAD, EXAMPLE_SPREAD = WriterSpread(), ExampleSpread()

WAVES = ((0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (0.5, -0.5), (1.0, 0.0), (0.0, 1.0))
"""Cycles per IMAGE_SIDE, across and down, of the waves that make up a bend. All low, so that strokes stay whole."""


@dataclass(frozen=True)
class Style:
    """What one writer's examples have in common. Units as in WriterSpread.

    fonts: (62,) index into FONTS by class.  class_mix: (62,) probabilities.
    bends: (62, 2, 2 * len(WAVES)) amplitudes by class, of the horizontal and the vertical displacement.
    """

    fonts: NDArray[np.int64]
    class_mix: NDArray[np.float64]
    rotation: float
    slant: float
    width: float
    height: float
    bends: NDArray[np.float32]
    thickness: float
    edge_width: float
    roughness: float
    darkness: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Style:
        spread, num_classes, num_waves = WRITER_SPREAD, len(BYCLASS), 2 * len(WAVES)
        main_font, second_font = rng.choice(len(FONTS), size=2, replace=False)
        in_main_font = rng.random(num_classes) < spread.main_font_share
        bend = rng.normal(0, spread.bend_std, (2, num_waves))
        class_bends = rng.normal(0, spread.class_bend_std, (num_classes, 2, num_waves))
        return cls(
            fonts=np.where(in_main_font, main_font, second_font),
            class_mix=rng.dirichlet(np.full(num_classes, spread.class_concentration)),
            rotation=rng.normal(0, spread.rotation_std),
            slant=rng.normal(spread.slant_mean, spread.slant_std),
            width=rng.uniform(*spread.width),
            height=rng.uniform(*spread.height),
            bends=(bend + class_bends).astype(np.float32),
            thickness=rng.uniform(*spread.thickness),
            edge_width=rng.uniform(*spread.edge_width),
            roughness=rng.uniform(*spread.roughness),
            darkness=rng.uniform(*spread.darkness),
        )


class SyntheticWriters(RawClients):
    """Clients that each write in a style of their own, made on demand: nothing is stored for a client.

    A writer's number of examples, its class mix and style (see WriterSpread) and its examples (see ExampleSpread)
    follow from (seed, writer) alone, bit for bit on one machine. The number of examples is log-normal around the mean,
    cut off at MIN_EXAMPLES and MAX_EXAMPLES.
    """

    num_classes = len(BYCLASS)
    class_names = BYCLASS

    def __init__(self, num_clients: int, seed: int, mean_num_examples: float = 110) -> None:
        self.num_clients = num_clients
        self._seed = seed
        self._mean_num_examples = mean_num_examples
        self._log_size_mean = float(np.log(mean_num_examples)) - LOG_SIZE_SPREAD**2 / 2

    @cached_property
    def fingerprint(self) -> str:
        parts = {
            "clients": type(self).__name__,
            "version": ALGORITHM_VERSION,
            "seed": self._seed,
            "num_clients": self.num_clients,
            "mean_num_examples": float(self._mean_num_examples),
            "spread": [asdict(WRITER_SPREAD), asdict(EXAMPLE_SPREAD), LOG_SIZE_SPREAD, MIN_EXAMPLES, MAX_EXAMPLES],
            "glyphs": _glyphs_digest(),
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def num_examples(self, client: int) -> int:
        return self._draw_num_examples(self._generator(client))

    def smaller_than(self, minimum: int) -> Sequence[int]:
        if minimum <= MIN_EXAMPLES:
            return ()
        return [client for client in range(self.num_clients) if self.num_examples(client) < minimum]

    def examples(self, client: int) -> Examples:
        rng = self._generator(client)
        num_examples = self._draw_num_examples(rng)
        style = Style.draw(rng)
        labels = rng.choice(self.num_classes, num_examples, p=style.class_mix)
        return _write(labels, style, rng), labels

    def _generator(self, client: int) -> np.random.Generator:
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client} is not in 0..{self.num_clients - 1}")
        return np.random.Generator(np.random.PCG64(data_stream(self._seed, Purpose.WRITER, client)))

    def _draw_num_examples(self, rng: np.random.Generator) -> int:
        """The first draw from a writer's generator, so that it can be had without the others."""
        return min(max(round(rng.lognormal(self._log_size_mean, LOG_SIZE_SPREAD)), MIN_EXAMPLES), MAX_EXAMPLES)


def _write(labels: NDArray[np.int64], style: Style, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images (num_examples, 28, 28) of the labels (num_examples,), 255 for full ink and 0 for none."""
    fields = np.stack([glyph_fields(font)[label] for font, label in zip(style.fonts[labels], labels, strict=True)])
    distances = _sample(fields, *_source_cells(labels, style, rng))
    thickness = style.thickness + rng.normal(0, EXAMPLE_SPREAD.thickness, (len(labels), 1)).astype(np.float32)
    distances += thickness
    distances += np.float32(style.roughness) * rng.standard_normal(distances.shape, dtype=np.float32)
    ink = np.clip(distances / np.float32(style.edge_width) + np.float32(0.5), 0, 1)
    pixels = np.rint(ink * np.float32(255 * style.darkness)).astype(np.uint8)
    return pixels.reshape(-1, IMAGE_SIDE, IMAGE_SIDE)


def _source_cells(
    labels: NDArray[np.int64], style: Style, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Column and row of the glyph's field that each pixel shows, (num_examples, 28 * 28) each, in cells.

    A writer forms a glyph by scale, then slant, then rotation; pixels are traced back through their inverses, and bent:
    cell = center + CELLS_PER_PIXEL * (diag(1 / scale) [[1, slant], [0, 1]] R(-rotation) (pixel - shift) + bend(pixel)).
    """
    spread, count = EXAMPLE_SPREAD, len(labels)

    def varied(value: float, std: float) -> NDArray[np.float32]:
        return rng.normal(value, std, (count, 1)).astype(np.float32)

    angle = np.radians(varied(style.rotation, spread.rotation))
    slant = varied(style.slant, spread.slant)
    width, height = style.width * varied(1, spread.scale), style.height * varied(1, spread.scale)
    x, y = _PIXEL_X - varied(0, spread.shift), _PIXEL_Y - varied(0, spread.shift)
    upright_x, upright_y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    varied_bends = rng.standard_normal((count, *style.bends.shape[1:]), dtype=np.float32)
    amplitudes = style.bends[labels] + spread.bend * varied_bends
    # Not a BLAS product, whose bits may vary with its threads.
    bend = np.einsum("naw,wp->anp", amplitudes, _WAVE_FIELDS)
    center, scale = np.float32((GLYPH_CANVAS - 1) / 2), np.float32(CELLS_PER_PIXEL)
    column = center + scale * ((upright_x + slant * upright_y) / width + bend[0])  # y points down, hence the sign
    row = center + scale * (upright_y / height + bend[1])
    return column, row


def _sample(fields: NDArray[np.float32], column: NDArray[np.float32], row: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear samples (num_examples, num_points) of fields (num_examples, side, side), clamped to the border."""
    count, side, _ = fields.shape
    for position in (column, row):
        np.clip(position, 0, side - 1.001, out=position)
    left, top = column.astype(np.int32), row.astype(np.int32)
    to_right, down = column - left, row - top
    corner = top * side + left + np.arange(count, dtype=np.int32)[:, None] * (side * side)
    flat = fields.reshape(-1)
    upper = flat.take(corner)
    upper += (flat.take(corner + 1) - upper) * to_right
    corner += side
    lower = flat.take(corner)
    lower += (flat.take(corner + 1) - lower) * to_right
    upper += (lower - upper) * down
    return upper


def _wave_fields() -> NDArray[np.float32]:
    """(2 * len(WAVES), 28 * 28): sine and cosine of each wave, so that amplitudes set its phase as well."""
    phases = [2 * np.pi / IMAGE_SIDE * (across * _PIXEL_X[0] + down * _PIXEL_Y[0]) for across, down in WAVES]
    return np.stack([wave(phase) for phase in phases for wave in (np.sin, np.cos)]).astype(np.float32)


_PIXEL_Y, _PIXEL_X = np.mgrid[:IMAGE_SIDE, :IMAGE_SIDE].reshape(2, 1, -1).astype(np.float32) - np.float32(
    (IMAGE_SIDE - 1) / 2
)
_WAVE_FIELDS = _wave_fields()


@lru_cache(maxsize=len(FONTS))
def glyph_fields(font: int) -> NDArray[np.float32]:
    """A font's characters as distances from their outline in pixels, positive in the ink: (62, side, side) float32.

    A distance makes a stroke's thickness a matter of one sum. Each glyph is centered and, its proportions kept, scaled
    until its longer side fills GLYPH_SIDE, as in EMNIST: an 'o' is as tall as an 'O'. Not to be written to.
    """
    from PIL import Image, ImageDraw, ImageFont  # late, since only a process that reads examples needs it

    typeface = ImageFont.truetype(_font_path(FONTS[font]), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    ink = np.zeros((len(BYCLASS), GLYPH_CANVAS, GLYPH_CANVAS), dtype=bool)
    for label, character in enumerate(BYCLASS):
        drawn = Image.new("L", (3 * FONT_SIZE, 3 * FONT_SIZE))
        ImageDraw.Draw(drawn).text((FONT_SIZE, FONT_SIZE), character, fill=255, font=typeface)
        box = drawn.getbbox()
        assert box is not None, f"{FONTS[font]} has no ink for {character!r}"
        glyph = drawn.crop(box)
        scale = GLYPH_SIDE / max(glyph.size)
        width, height = (max(round(side * scale), 1) for side in glyph.size)
        left, top = (GLYPH_CANVAS - width) // 2, (GLYPH_CANVAS - height) // 2
        scaled = np.asarray(glyph.resize((width, height), Image.Resampling.BILINEAR))
        ink[label, top : top + height, left : left + width] = scaled >= 128
    fields = signed_distance(ink) / np.float32(CELLS_PER_PIXEL)
    fields.flags.writeable = False
    return fields


def signed_distance(ink: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Euclidean distance of cells from the edge of the ink, positive in it, at most REACH; both (n, side, side)."""
    inside, outside = np.sqrt(_squared_distance(~ink)), np.sqrt(_squared_distance(ink))
    distance = np.where(ink, inside - 0.5, 0.5 - outside)
    return np.clip(distance, -REACH, REACH).astype(np.float32)


def _squared_distance(target: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Squared distance to the nearest target cell, exact up to REACH and larger than its square beyond."""
    squared = np.where(target, 0, (REACH + 1) ** 2).astype(np.int32)
    for axis in (1, 2):
        squared = np.moveaxis(squared, axis, 0)
        nearest = squared.copy()
        for step in range(1, REACH + 1):
            np.minimum(nearest[step:], squared[:-step] + step * step, out=nearest[step:])
            np.minimum(nearest[:-step], squared[step:] + step * step, out=nearest[:-step])
        squared = np.moveaxis(nearest, 0, axis)
    return squared


def _font_path(name: str) -> Path:
    found = find_spec("matplotlib")  # and not imported, which takes most of a second
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("the synthetic writers draw with matplotlib's fonts; pip install matplotlib")
    path = Path(found.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this matplotlib lacks a font; install the version in requirements.txt")
    return path


@lru_cache(maxsize=1)
def _glyphs_digest() -> str:
    """Of what glyphs and numbers are made with: the 7 MB of all FONTS, and the versions of Pillow and NumPy."""
    digest = hashlib.blake2b(f"{version('pillow')} {np.__version__}".encode(), digest_size=16)
    for name in FONTS:
        digest.update(name.encode())
        digest.update(_font_path(name).read_bytes())
    return digest.hexdigest()
