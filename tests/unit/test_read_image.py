"""Every kind of image file shows the same digit to every reader of images, or is refused with its name and the fix."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from datasets.clients.person import load_person
from datasets.own.image_folder import load_image_folder
from datasets.sources.leaf import load_femnist

Greys = NDArray[np.uint8]


def stroke() -> Greys:
    """Bright ink on a dark ground, of every grey, and turned otherwise than any turn of it."""
    ink = np.zeros((28, 28), dtype=np.uint8)
    ink[2:10, 4:20] = np.arange(128, 256, dtype=np.uint8).reshape(8, 16)
    ink[20:26, 3:5] = 60
    return ink


INK = stroke()
FULL = np.full_like(INK, 255)
NONE = np.zeros_like(INK)


def from_folder(content: bytes, ending: str, folder: Path) -> Greys:
    """A client before it, in the order of the names, has an image of 28x28, whose size all must have."""
    (folder / "a" / "class").mkdir(parents=True)
    Image.new("L", (28, 28)).save(folder / "a" / "class" / "image.png")
    path = folder / "client" / "class" / f"image{ending}"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return load_image_folder(folder).examples(1)[0][0]


def from_person(content: bytes, ending: str, folder: Path) -> Greys:
    (folder / "0").mkdir(parents=True)
    for number in range(2):
        (folder / "0" / f"image{number}{ending}").write_bytes(content)
    inputs = load_person(folder, ["0"], Fraction(1, 2), seed=0).train_inputs
    return (inputs[0, 0] * 255).round().byte().numpy()


def from_parquet(content: bytes, ending: str, folder: Path) -> Greys:
    """Black ink on white in the file, as the femnist data set has it; of a transparent one only the opacity counts."""
    (folder / "femnist").mkdir(parents=True)
    images = pa.array([{"bytes": content, "path": f"image{ending}"}])
    pq.write_table(pa.table({"image": images, "writer_id": ["w"], "character": [0]}), folder / "femnist" / "a.parquet")
    return load_femnist(folder).examples(0)[0][0]


READERS: dict[str, Callable[[bytes, str, Path], Greys]] = {
    "folder": from_folder,
    "personalize": from_person,
    "parquet": from_parquet,
}


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, file_format, **options)
    return content.getvalue()


def layers(*bands: Greys, mode: str) -> Image.Image:
    return Image.merge(mode, [Image.fromarray(band) for band in bands])


def png(colour_type: int, depth: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG put together by hand, of kinds that Pillow does not write. rows: all rows, without their filter bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = len(rows) // 28
    filtered = b"".join(b"\0" + rows[size * row : size * (row + 1)] for row in range(28))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 28, depth, colour_type, 0, 0, 0))
    others = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + others + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")


def in_16_bits(values: Greys, factor: int) -> bytes:
    return (values.astype(np.uint32) * factor).astype(">u2").tobytes()


def turned() -> bytes:
    """As a phone stores it: rows are columns, and a tag says how to turn it."""
    tag = Image.Exif()
    tag[0x0112] = 6  # to be shown turned to the right by a quarter
    return encoded(Image.fromarray(np.rot90(INK)), exif=tag)


TWO_LEVELS = np.where(INK > 100, FULL, NONE)
OPAQUE = {
    "grey": (encoded(Image.fromarray(INK)), ".png", INK),
    "two levels": (encoded(Image.fromarray(TWO_LEVELS).convert("1")), ".png", TWO_LEVELS),
    "palette": (encoded(Image.fromarray(INK).convert("P")), ".png", INK),
    "colour": (encoded(layers(INK, INK, INK, mode="RGB")), ".png", INK),
    "16-bit grey": (encoded(Image.fromarray(INK.astype(np.uint16) * 257)), ".png", INK),
    "16-bit colour": (png(2, 16, in_16_bits(np.repeat(INK.ravel(), 3), 257)), ".png", INK),
    "opaque": (encoded(layers(INK, FULL, mode="LA")), ".png", INK),
    "opaque colour": (encoded(layers(INK, INK, INK, FULL, mode="RGBA")), ".png", INK),
    "turned": (turned(), ".png", INK),
    "bitmap": (encoded(Image.fromarray(INK), "BMP"), ".bmp", INK),
    "gif": (encoded(Image.fromarray(INK), "GIF"), ".GIF", INK),
    "palette with transparency of no pixel": (
        encoded(Image.fromarray(INK).convert("P"), transparency=1),
        ".png",
        INK,
    ),
    "blank": (encoded(Image.fromarray(NONE)), ".png", NONE),
    "blank with 16 bits": (encoded(Image.fromarray(NONE.astype(np.uint16))), ".png", NONE),
}


@pytest.mark.parametrize("kind", OPAQUE)
@pytest.mark.parametrize("reader", READERS)
def test_an_opaque_image_is_its_greys(reader: str, kind: str, tmp_path: Path) -> None:
    content, ending, expected = OPAQUE[kind]
    greys = READERS[reader](content, ending, tmp_path)
    assert np.array_equal(greys, 255 - expected if reader == "parquet" else expected)


SPECKLED = (np.arange(28 * 28) % 17).astype(np.uint8).reshape(28, 28)
TRANSPARENT = {
    "black ink": (layers(NONE, INK, mode="LA"), INK),
    "white ink": (layers(FULL, INK, mode="LA"), INK),
    "red ink": (layers(FULL, NONE, NONE, INK, mode="RGBA"), INK),
    "black ink, other colours where nothing shows": (layers(np.where(INK == 0, FULL, NONE), INK, mode="LA"), INK),
    "nearly black ink": (layers(SPECKLED, SPECKLED, SPECKLED, INK, mode="RGBA"), INK),
    "nothing": (layers(NONE, NONE, mode="LA"), NONE),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.parametrize("reader", READERS)
def test_ink_on_a_transparent_ground_is_bright_whatever_its_colour(reader: str, kind: str, tmp_path: Path) -> None:
    """On a black ground, which is what a plain conversion to grey puts behind it, black ink would vanish."""
    image, expected = TRANSPARENT[kind]
    assert np.array_equal(READERS[reader](encoded(image), ".png", tmp_path), expected)


@pytest.mark.parametrize("reader", READERS)
def test_a_colour_that_means_transparent(reader: str, tmp_path: Path) -> None:
    """As GIF and palette PNG have it: black ink, and white that does not show."""
    image = Image.fromarray(255 - TWO_LEVELS).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    white = int(np.asarray(image)[0, 0])
    content = encoded(image, transparency=white)
    assert np.array_equal(READERS[reader](content, ".png", tmp_path / "palette"), TWO_LEVELS)
    content = encoded(Image.fromarray(255 - TWO_LEVELS), transparency=255)
    assert np.array_equal(READERS[reader](content, ".png", tmp_path / "grey"), TWO_LEVELS)


def test_cmyk(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(INK).convert("CMYK"), "JPEG", quality=100)
    greys = from_folder(content, ".jpg", tmp_path).astype(int)
    assert np.abs(greys - INK).mean() < 8, "a JPEG loses a little"


AMBIGUOUS = {
    "several colours beside transparency": (encoded(layers(INK, TWO_LEVELS, mode="LA")), "has several colours beside"),
    "all transparent, but drawn": (encoded(layers(INK, NONE, mode="LA")), "has several colours beside"),
    "8-bit values in 16 bits": (encoded(Image.fromarray(INK.astype(np.uint16))), "no value above 255 of 65535"),
    "12-bit values in 16 bits": (encoded(Image.fromarray(INK.astype(np.uint16) * 16)), "no value above 4080 of 65535"),
    "8-bit colours in 16 bits": (png(2, 16, in_16_bits(np.repeat(INK.ravel(), 3), 1)), "has 16 bits"),
    "16 bits and a transparent grey": (
        png(0, 16, in_16_bits(INK, 257), tRNS=b"\0\0"),
        "has 16 bits and transparency; save it as 8-bit grey",
    ),
    "contrast in nothing but colour": (
        encoded(layers(np.where(INK > 0, FULL, NONE), np.where(INK > 0, NONE, np.uint8(130)), NONE, mode="RGB")),
        "shows something in its colours that has the same grey all over",
    ),
    "animated GIF": (
        encoded(Image.fromarray(INK), "GIF", save_all=True, append_images=[Image.fromarray(255 - INK)]),
        "holds 2 frames; save the one",
    ),
    "animated PNG": (
        encoded(Image.fromarray(INK), save_all=True, append_images=[Image.fromarray(255 - INK)] * 2),
        "holds 3 frames; save the one",
    ),
    "another format": (encoded(Image.fromarray(INK), "TIFF"), "is damaged or no PNG, JPEG, BMP or GIF"),
    "truncated": (encoded(Image.fromarray(INK))[:-60], "is damaged or no PNG, JPEG, BMP or GIF"),
    "broken compression": (
        png(0, 8, INK.tobytes()).replace(b"IDATx\x9c", b"IDATx\x00"),
        "is damaged or no PNG, JPEG, BMP or GIF",
    ),
    "size": (encoded(Image.fromarray(INK[:, :20])), "is 20x28, not 28x28; scale it"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_kept_is_refused_with_the_name_of_the_file(reader: str, kind: str, tmp_path: Path) -> None:
    content, reason = AMBIGUOUS[kind]
    where = {
        "folder": "client/class/image.png",
        "personalize": "0/image0.png",
        "parquet": "a.parquet: the image of row 0",
    }
    with pytest.raises(ValueError, match=f"{re.escape(where[reader])} .*{re.escape(reason)}") as refusal:
        READERS[reader](content, ".png", tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_person_whose_images_are_all_blank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No error, for a blank image may be an example of a class; but nothing can be learned from these."""
    from_person(encoded(Image.fromarray(NONE)), ".png", tmp_path / "blank")
    assert f"{tmp_path / 'blank'}: each image has one and the same grey all over" in capfd.readouterr().err
    from_person(encoded(Image.fromarray(INK)), ".png", tmp_path / "drawn")
    assert capfd.readouterr().err == ""
