"""MNIST and its kin from files in their real format; without network, and with damaged files, one clear line."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import EMNIST_PREFIXES, MNIST_PREFIXES, write_idx, write_image_files

from datasets import DatasetRequest, load_federated_dataset
from datasets.sources import download
from datasets.sources.digits import load_digits_images
from datasets.sources.mnist_family import SOURCES, load_images


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(download, "PAUSES_SECONDS", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    write_image_files(tmp_path / "MNIST" / "raw", MNIST_PREFIXES, (300, 100), num_classes=10)
    return tmp_path


def test_mnist_files_are_read(mnist: Path) -> None:
    splits = load_images("mnist", mnist)
    assert splits.train_images.shape == (300, 28, 28)
    assert splits.test_labels.tolist() == [index % 10 for index in range(100)]
    assert splits.num_classes == 10


def test_emnist_images_stand_upright(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    write_image_files(raw, EMNIST_PREFIXES, (186, 124), num_classes=62)
    transposed = np.zeros((124, 28, 28), dtype=np.uint8)
    transposed[0, 3, 20] = 255
    write_idx(raw / "emnist-byclass-test-images-idx3-ubyte", transposed)
    splits = load_images("emnist", tmp_path)
    assert splits.test_images[0, 20, 3] == 255
    assert splits.test_images.sum() == 255
    assert (splits.train_labels.min(), splits.train_labels.max(), splits.num_classes) == (0, 61, 62)


@pytest.mark.parametrize(
    ("name", "folder", "prefix", "num_classes", "first_label"),
    [
        ("emnist", "EMNIST", "emnist-byclass-", 62, 0),
        ("emnist_balanced", "EMNIST", "emnist-balanced-", 47, 0),
        ("emnist_letters", "EMNIST", "emnist-letters-", 26, 1),
        ("emnist_digits", "EMNIST", "emnist-digits-", 10, 0),
        ("fashion_mnist", "FashionMNIST", "", 10, 0),
        ("mnist", "MNIST", "", 10, 0),
    ],
)
def test_every_data_set_has_its_files_and_labels_from_0(
    name: str, folder: str, prefix: str, num_classes: int, first_label: int, tmp_path: Path
) -> None:
    raw = tmp_path / folder / "raw"
    prefixes = (f"{prefix}train", f"{prefix}test") if prefix else MNIST_PREFIXES
    write_image_files(raw, prefixes, (130, 70), num_classes)
    in_file = (np.arange(130) % num_classes + first_label).astype(np.uint8)
    for split, size in zip(prefixes, (130, 70), strict=True):
        write_idx(raw / f"{split}-labels-idx1-ubyte", in_file[:size])
    splits = load_images(name, tmp_path)
    assert splits.num_classes == num_classes
    assert splits.train_labels.tolist() == [index % num_classes for index in range(130)]
    assert splits.test_labels.max() == num_classes - 1
    assert isinstance(splits.train_images, np.memmap), "a copy in each process would not be shared"
    assert splits.train_images.shape == (130, 28, 28)


def test_letters_with_label_0_are_damaged(tmp_path: Path) -> None:
    write_image_files(tmp_path / "EMNIST" / "raw", ("emnist-letters-train", "emnist-letters-test"), (60, 60), 26)
    with pytest.raises(
        ValueError, match=r"emnist-letters-train-labels-idx1-ubyte is damaged: label 0 is 0, not in 1\.\.26"
    ):
        load_images("emnist_letters", tmp_path)


def test_an_emnist_folder_without_the_split(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    write_image_files(raw, EMNIST_PREFIXES, (62, 62), num_classes=62)
    with pytest.raises(ValueError, match="could not be downloaded") as refusal:
        load_images("emnist_letters", tmp_path)
    assert (
        f"put its files, emnist-letters-train-images-idx3-ubyte and so on, as they are or packed as .gz, into {raw}"
        in (str(refusal.value))
    )


def test_a_file_that_links_out_of_the_data_root_is_refused(
    mnist: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "labels"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(ValueError, match="is a symbolic link to") as refusal:
        load_images("mnist", mnist)
    assert str(refusal.value).startswith(f"{path} is a symbolic link to {elsewhere}, outside of {mnist}; ")


def test_links_within_the_data_root_are_followed(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.symlink_to(path.rename(mnist / "labels"))
    linked_root = tmp_path_factory.mktemp("links") / "root"
    linked_root.symlink_to(mnist)
    assert len(load_images("mnist", linked_root).test_labels) == 100


def test_a_data_set_s_folder_may_be_a_link(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data_root = tmp_path_factory.mktemp("root")
    (data_root / "MNIST").symlink_to(mnist / "MNIST")
    assert len(load_images("mnist", data_root).test_labels) == 100


@pytest.mark.parametrize("name", SOURCES)
def test_missing_files_without_network(name: str, tmp_path: Path) -> None:
    raw = SOURCES[name].raw(tmp_path)
    with pytest.raises(ValueError, match="could not be downloaded") as refusal:
        load_images(name, tmp_path)
    for part in (name, str(raw), "no network in this test", "--data_root", "--dataset digits", "synthetic_writers"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not raw.parent.exists(), "nothing half-written is left behind"


def test_an_unwritable_data_root(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(ValueError, match="could not be downloaded"):
        load_images("mnist", blocked / "data")


DAMAGES = {
    "truncated": "t10k-images-idx3-ubyte is damaged: its header asks for 78416 bytes, it has 77416",
    "not idx": "t10k-images-idx3-ubyte is no IDX file of 3 dimensions: it begins with 3c 68 74 6d",
    "label": "t10k-labels-idx1-ubyte is damaged: label 7 is 10, not in 0..9",
    "count": "t10k-labels-idx1-ubyte is damaged: it has 99 labels for 100 images",
    "shape": "t10k-images-idx3-ubyte is damaged: its images are (14, 14), not (28, 28)",
    "empty": "t10k-labels-idx1-ubyte is empty",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_the_place_and_the_fix(damage: str, mnist: Path) -> None:
    raw = mnist / "MNIST" / "raw"
    images, labels = raw / "t10k-images-idx3-ubyte", raw / "t10k-labels-idx1-ubyte"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-1000])
    elif damage == "not idx":
        images.write_bytes(b"<html>not found</html>" * 100)
    elif damage == "label":
        write_idx(labels, np.array([*range(7), *[10] * 93], dtype=np.uint8))
    elif damage == "count":
        write_idx(labels, np.zeros(99, dtype=np.uint8))
    elif damage == "shape":
        write_idx(images, np.zeros((100, 14, 14), dtype=np.uint8))
    else:
        write_idx(labels, np.zeros(0, dtype=np.uint8))
    with pytest.raises(ValueError, match=f"replace that file, or move {raw} elsewhere to have mnist downl") as refusal:
        load_images("mnist", mnist)
    assert f"{raw}/{DAMAGES[damage]}" in str(refusal.value)


NAMES = [f"{prefix}-{kind}" for prefix in MNIST_PREFIXES for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
"""As torchvision calls the unpacked files."""


def published(layout: str, mnist: Path, target: Path) -> None:
    """Put the files of a data root to where, and how, somebody else has them. layout: of each file's name."""
    for name in NAMES:
        path = target / layout.format(name=name, dotted=name.replace("-idx", ".idx"))
        path.parent.mkdir(parents=True, exist_ok=True)
        content = (mnist / "MNIST" / "raw" / name).read_bytes()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize(
    "layout",
    [
        "MNIST/raw/{name}.gz",
        "MNIST/raw/{dotted}",
        "MNIST/raw/{dotted}.gz",
        "MNIST/{name}",
        "mnist/{name}.gz",
        "mnist/MNIST/raw/{name}",
        "Mnist_/{dotted}",
    ],
)
def test_files_as_their_makers_and_others_publish_them(
    layout: str, mnist: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("root")
    published(layout, mnist, root)
    before, after = load_images("mnist", mnist), load_images("mnist", root)
    assert np.array_equal(before.train_images, after.train_images)
    assert np.array_equal(before.test_labels, after.test_labels)
    assert isinstance(after.train_images, np.memmap), "a copy in each process would not be shared"


@pytest.mark.parametrize("root", ["mnist", "MNIST/raw"])
def test_the_data_root_may_be_the_data_set_s_own_folder(
    root: str, mnist: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("target") / root
    published("{name}", mnist, target)
    assert len(load_images("mnist", target).train_labels) == 300


def test_files_of_which_the_name_does_not_say_whose_they_are(
    mnist: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """MNIST read as Fashion-MNIST would train, and nobody would know."""
    root = tmp_path_factory.mktemp("root")
    published("{name}", mnist, root)
    for name, folder in (("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")):
        with pytest.raises(ValueError, match="may be of MNIST or of Fashion-MNIST") as refusal:
            load_images(name, root)
        assert f"move those of {name} into {root / folder / 'raw'}" in str(refusal.value)
    published("MNIST/raw/{name}", mnist, root)
    assert len(load_images("mnist", root).train_labels) == 300


def test_emnist_as_its_archive_has_it(tmp_path: Path) -> None:
    """The archive's folder `gzip`, unpacked by hand into the data root."""
    write_image_files(tmp_path / "made", EMNIST_PREFIXES, (62, 62), num_classes=62)
    (tmp_path / "root" / "gzip").mkdir(parents=True)
    for path in (tmp_path / "made").iterdir():
        (tmp_path / "root" / "gzip" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    splits = load_images("emnist", tmp_path / "root")
    assert (len(splits.train_labels), splits.num_classes) == (62, 62)


def test_packed_files_beside_unpacked_ones_are_left_alone(mnist: Path) -> None:
    """As torchvision leaves them."""
    for name in NAMES:
        (mnist / "MNIST" / "raw" / f"{name}.gz").write_bytes(b"not looked at")
    assert len(load_images("mnist", mnist).train_labels) == 300
    assert not (mnist / "cache").exists()


def test_names_that_say_packed_of_plain_files_and_the_reverse(mnist: Path) -> None:
    """Some browsers unpack what they download, and some mirrors' files keep the plain name."""
    raw = mnist / "MNIST" / "raw"
    (raw / NAMES[0]).rename(raw / f"{NAMES[0]}.gz")
    (raw / NAMES[1]).write_bytes(gzip.compress((raw / NAMES[1]).read_bytes()))
    splits = load_images("mnist", mnist)
    assert (splits.train_images.shape, len(splits.train_labels)) == ((300, 28, 28), 300)


def test_packed_files_are_unpacked_once_and_anew_when_they_change(mnist: Path) -> None:
    raw = mnist / "MNIST" / "raw"
    for name in NAMES:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
    load_images("mnist", mnist)
    (cached,) = (mnist / "cache").glob("mnist-*")
    before = (cached / NAMES[0]).stat().st_mtime_ns
    load_images("mnist", mnist)
    assert (cached / NAMES[0]).stat().st_mtime_ns == before
    write_image_files(mnist / "new", MNIST_PREFIXES, (310, 100), num_classes=10)
    for name in NAMES:
        (raw / f"{name}.gz").write_bytes(gzip.compress((mnist / "new" / name).read_bytes()))
    assert len(load_images("mnist", mnist).train_labels) == 310
    assert len(list((mnist / "cache").glob("mnist-*"))) == 1


def test_packed_files_on_a_disk_that_cannot_be_written(mnist: Path, make_read_only: Callable[[Path], None]) -> None:
    raw = mnist / "MNIST" / "raw"
    (raw / f"{NAMES[3]}.gz").write_bytes(gzip.compress((raw / NAMES[3]).read_bytes()))
    (raw / NAMES[3]).unlink()
    make_read_only(mnist)
    assert len(load_images("mnist", mnist).test_labels) == 100


@pytest.mark.parametrize("damage", ["cut", "check sum"])
def test_a_packed_file_that_is_damaged(damage: str, mnist: Path) -> None:
    raw = mnist / "MNIST" / "raw"
    packed = gzip.compress((raw / NAMES[2]).read_bytes())
    (raw / NAMES[2]).unlink()
    (raw / f"{NAMES[2]}.gz").write_bytes(packed[:-20] if damage == "cut" else packed[:-8] + b"\0" * 4 + packed[-4:])
    with pytest.raises(ValueError, match=f"{NAMES[2]}.gz is damaged .*; replace it"):
        load_images("mnist", mnist)
    assert not list((mnist / "cache").glob("mnist-*"))


def test_what_is_wrong_in_a_packed_file_is_said_of_that_file(mnist: Path) -> None:
    raw = mnist / "MNIST" / "raw"
    (raw / NAMES[3]).unlink()
    (raw / f"{NAMES[3]}.gz").write_bytes(gzip.compress(b"<html>"))
    with pytest.raises(ValueError, match=f"{raw / NAMES[3]}.gz is no IDX file of 1 dimensions"):
        load_images("mnist", mnist)


def test_a_file_that_is_missing_among_others(mnist: Path) -> None:
    """The others are good and nobody is told to delete them."""
    raw = mnist / "MNIST" / "raw"
    (raw / NAMES[2]).unlink()
    with pytest.raises(ValueError, match=f"{raw} has no {NAMES[2]}, as it is or packed as {NAMES[2]}.gz; put it there"):
        load_images("mnist", mnist)


def test_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--dataset cifar is unknown; use one of emnist, .*mnist, .*digits"):
        load_federated_dataset(DatasetRequest("cifar", 20, lambda total: total // 5, None, 0), tmp_path)


def test_digits_are_the_real_ones_in_two_balanced_splits() -> None:
    splits = load_digits_images()
    assert len(splits.train_labels) + len(splits.test_labels) == 1797
    assert np.bincount(splits.test_labels).min() >= 34
    assert splits.train_images.shape[1:] == (28, 28)
    assert 200 < splits.train_images.max() <= 255
    zeros = splits.train_images[splits.train_labels == 0].mean(axis=0)
    ones = splits.train_images[splits.train_labels == 1].mean(axis=0)
    assert zeros[14, 14] < 30 < 150 < ones[14, 14], "a zero is empty in the middle, a one is not"


def test_the_real_mnist_is_complete(mnist_root: Path) -> None:
    splits = load_images("mnist", mnist_root)
    assert (len(splits.train_labels), len(splits.test_labels)) == (60_000, 10_000)
