"""A folder of images of any size, in grey or in colour: what they are brought to, and by whose choice."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from datasets import DatasetRequest, load_federated_dataset
from datasets.clients.person import load_person
from datasets.clients.split import SplitDataset
from datasets.describe import describe, plot
from datasets.sources.image_files import ImageForm
from perfedavg.own_files import UNTOLD, OwnFiles

RED, GREEN = (200, 0, 0), (0, 150, 0)


def load(folder: Path, files: OwnFiles = UNTOLD) -> SplitDataset:
    request = DatasetRequest(str(folder), None, lambda count: 1, None, 0, own_files=files)
    dataset: SplitDataset = load_federated_dataset(request, folder.parent)
    return dataset


def write(folder: Path, *sizes: tuple[int, int], mode: str = "RGB") -> Path:
    """Two clients with two classes: images of red on the left and green on the right, of these sizes."""
    for client in ("anna", "ben"):
        for label in ("cat", "dog"):
            (folder / client / label).mkdir(parents=True)
            for number, (width, height) in enumerate(sizes * 2):
                pixels = np.zeros((height, width, 3), dtype=np.uint8)
                pixels[:, : width // 2], pixels[:, width // 2 :] = RED, GREEN
                Image.fromarray(pixels).convert(mode).save(folder / client / label / f"{number}.png")
    return folder


def first(dataset: SplitDataset) -> torch.Tensor:
    return dataset.client_data(0).train_inputs[0]


def test_images_keep_the_size_that_all_have(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image = first(load(write(tmp_path / "own", (40, 20))))
    assert image.shape == (1, 20, 40)
    assert (
        "own: images are read as 40x20 in grey; --image_size and --image_color choose another" in capfd.readouterr().err
    )


def test_28x28_in_grey_needs_no_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert first(load(write(tmp_path / "own", (28, 28), mode="L"))).shape == (1, 28, 28)
    assert capfd.readouterr().err == ""


def test_colours_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    image = first(load(write(tmp_path / "own", (32, 32)), OwnFiles(image_color="rgb")))
    assert image.shape == (3, 32, 32)
    assert (image[:, 3, 3] * 255).round().tolist() == list(RED)
    assert (image[:, 3, 30] * 255).round().tolist() == list(GREEN)


def test_grey_images_have_three_equal_channels_in_colour(tmp_path: Path) -> None:
    image = first(load(write(tmp_path / "own", (32, 32), mode="L"), OwnFiles(image_color="rgb")))
    assert torch.equal(image, image[:1].expand(3, 32, 32))
    assert image.any()


@pytest.mark.parametrize("color", ["grey", "rgb"])
def test_images_of_unlike_sizes_are_fitted_whole_into_one(color: str, tmp_path: Path) -> None:
    """A wide one keeps its proportions: black above and below; the colours stay left and right."""
    dataset = load(write(tmp_path / "own", (64, 32), (16, 8)), OwnFiles(image_size="32", image_color=color))
    for image in dataset.client_data(0).train_inputs:
        assert image.shape == (3 if color == "rgb" else 1, 32, 32)
        assert not image[:, :8].any()
        assert not image[:, 24:].any()
        left, right = image[:, 8:24, :14], image[:, 8:24, 18:]
        assert (left - left[:, :1, :1]).abs().max() == (right - right[:, :1, :1]).abs().max() == 0
        assert not torch.equal(left[:, 0, 0], right[:, 0, 0])
    tall = load(write(tmp_path / "tall", (8, 16)), OwnFiles(image_size="16x16"))
    assert not first(tall)[:, :, :4].any()
    assert first(tall)[:, :, 4:12].all()


def test_width_and_height_may_differ(tmp_path: Path) -> None:
    assert first(load(write(tmp_path / "own", (64, 48)), OwnFiles(image_size="32x24"))).shape == (1, 24, 32)


def test_each_form_is_kept_beside_the_others(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", (32, 32))
    forms = [OwnFiles(image_color=color, image_size=size) for color in ("grey", "rgb") for size in ("32", None, "16")]
    assert len({load(folder, form).fingerprint for form in forms}) == 4, "32x32 need not be scaled to be so"
    assert len(list((folder / ".cache").glob("folder-*"))) == 6


def test_a_turned_photo_counts_as_it_is_shown(tmp_path: Path) -> None:
    """A phone stores 20 wide and 40 high, with a word that it is to be turned."""
    folder = write(tmp_path / "own", (40, 20), mode="L")
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.new("L", (20, 40)).save(folder / "anna" / "cat" / "turned.png", exif=tag)
    assert first(load(folder)).shape == (1, 20, 40)
    Image.new("L", (20, 40)).save(folder / "anna" / "cat" / "upright.png")
    with pytest.raises(ValueError, match=r"upright\.png is 20x40, not 40x20; scale it, or have all images scaled"):
        load(folder)


WRONG = {
    "unlike": ([(32, 32), (32, 30)], UNTOLD, r"1\.png is 32x30, not 32x32; .* by --image_size 32"),
    "large": ([(640, 480)], UNTOLD, r"0\.png is 640x480, more than 256 pixels a side; .*--image_size 640x480"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_sizes_that_need_a_word(kind: str, tmp_path: Path) -> None:
    sizes, files, reason = WRONG[kind]
    with pytest.raises(ValueError, match=reason) as refusal:
        load(write(tmp_path / "own", *sizes), files)
    assert "\n" not in str(refusal.value)
    size = str(refusal.value).rpartition("--image_size ")[2].rstrip(")")
    assert first(load(tmp_path / "own", OwnFiles(image_size=size))).ndim == 3, "the way out works"


@pytest.mark.parametrize("size", ["0", "-3", "32x", "x32", "32x32x3", "2000", "1.5", "a lot"])
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(ValueError, match=f"--image_size {size} must be WIDTHxHEIGHT in pixels, or one number for both"):
        utils.get_args("single", ["--dataset", "folder", "--image_size", size])


def test_transparent_pixels_have_no_colour(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", (32, 32), mode="RGBA")
    assert first(load(folder, OwnFiles(image_color="rgb"))).shape == (3, 32, 32), "opaque"
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(folder / "ben" / "dog" / "clear.png")
    with pytest.raises(ValueError, match=r"clear\.png has transparent pixels, whose ground is not known; save"):
        load(folder, OwnFiles(image_color="rgb"))


def test_contrast_in_colour_alone_can_be_kept(tmp_path: Path) -> None:
    """What grey would lose: two colours of one brightness. The refusal says how."""
    folder = write(tmp_path / "own", (32, 32), mode="L")
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, :16], pixels[:, 16:] = (255, 0, 0), (0, 130, 0)
    Image.fromarray(pixels).save(folder / "ben" / "dog" / "two.png")
    with pytest.raises(ValueError, match="or keep colours by --image_color rgb"):
        load(folder)
    assert load(folder, OwnFiles(image_color="rgb")).num_classes == 2


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.sources.image_files.MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"0\.png is 40x40, more than 1,000 pixels; scale it"):
        load(write(tmp_path / "own", (40, 40)), OwnFiles(image_size="8"))


def test_a_persons_images_are_brought_to_the_form_of_the_model(tmp_path: Path) -> None:
    """By the same function as the run's own, so that the same file is the same input."""
    folder = write(tmp_path / "own", (64, 32))
    files = OwnFiles(image_size="16", image_color="rgb")
    form = ImageForm.of_model((3, 16, 16), files)
    person = load_person(folder / "anna", ["cat", "dog"], Fraction(1, 5), 0, form)
    assert torch.equal(person.train_inputs[0], first(load(folder, files)))
    unscaled = ImageForm.of_model((3, 16, 16), UNTOLD)
    with pytest.raises(ValueError, match=r"is 64x32, not 16x16; scale it$"):
        load_person(folder / "anna", ["cat", "dog"], Fraction(1, 5), 0, unscaled)
    with pytest.raises(ValueError, match=r"inputs of the shape \(80,\) are no images"):
        ImageForm.of_model((80,), UNTOLD)


@pytest.mark.parametrize("color", ["grey", "rgb"])
def test_images_in_colour_are_drawn(color: str, tmp_path: Path) -> None:
    figure = plot(describe("own", load(write(tmp_path / "own", (32, 20)), OwnFiles(image_color=color))))
    drawn = np.asarray(figure.axes[-1].images[0].get_array())
    assert drawn.shape[:2] == (20, 32 * 12)
    assert (drawn.ndim == 3) == (color == "rgb")
