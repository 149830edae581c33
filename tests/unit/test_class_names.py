"""Labels are numbers; what they stand for must be right, or a person's images are learned as other characters."""

from __future__ import annotations

import pytest
from helpers import ROOT, import_torchvision

from datasets import DatasetRequest, load_federated_dataset
from datasets.clients.person import label_of
from datasets.sources.class_names import BALANCED, BYCLASS, FASHION, LETTERS
from datasets.sources.mnist_family import SOURCES


def test_names_are_those_of_the_libraries_that_know_the_data() -> None:
    """torchvision lists them independently of this project."""
    import_torchvision()
    from torchvision.datasets import EMNIST, FashionMNIST

    assert list(BYCLASS) == EMNIST.classes_split_dict["byclass"]
    assert list(BALANCED) == EMNIST.classes_split_dict["balanced"]
    assert [name.lower() for name in LETTERS] == EMNIST.classes_split_dict["letters"][1:], "0 is no letter there"
    assert list(FASHION) == FashionMNIST.classes


@pytest.mark.parametrize(("name", "num_classes"), [("digits", 10), ("synthetic_writers", 62)])
def test_a_data_set_brings_a_name_for_each_class(name: str, num_classes: int) -> None:
    request = DatasetRequest(name, 20, lambda total: total // 5, None, 0)
    dataset = load_federated_dataset(request, ROOT / "nowhere")
    assert (dataset.num_classes, len(dataset.class_names or ())) == (num_classes, num_classes)
    assert (dataset.class_names or ())[:10] == tuple("0123456789")


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("emnist", "0", "z"),
        ("emnist_balanced", "0", "t"),
        ("emnist_letters", "A", "Z"),
        ("emnist_digits", "0", "9"),
        ("mnist", "0", "9"),
        ("fashion_mnist", "T-shirt/top", "Ankle boot"),
    ],
)
def test_each_source_has_its_own_names(name: str, first: str, last: str) -> None:
    assert (SOURCES[name].class_names[0], SOURCES[name].class_names[-1]) == (first, last)


@pytest.mark.parametrize(
    ("folder", "class_names", "label"),
    [
        ("7", BYCLASS, 7),  # the digit, which is label 7 too
        ("A", BYCLASS, 10),
        ("a", BYCLASS, 36),
        ("10", BYCLASS, 10),  # for A, where a file system takes `a` and `A` for one folder
        ("36", BYCLASS, 36),
        ("62", BYCLASS, None),
        ("-1", BYCLASS, None),
        ("07", BYCLASS, None),
        ("c", BALANCED, 12),  # there the small letter belongs to the capital's class
        ("a", BALANCED, 36),
        ("z", LETTERS, 25),
        ("25", LETTERS, 25),
        ("trouser", FASHION, 1),
        ("T-shirt-top", FASHION, 0),  # no folder's name can hold a slash
        ("Shirt", FASHION, 6),
        ("shoe", FASHION, None),
        ("cafe\u0301", ("tea", "caf\u00e9"), 1),  # as another system composes the accent
        ("3", ("3", "7"), 0),
        ("0", ("3", "7"), None),  # a digit that is no class, and not the class of the threes
        ("1", ("1", "2"), 0),  # the class's name comes first
        ("0", ("1", "2"), None),  # where a number may mean either
        ("A", ("a", "\u00e0"), 0),
        ("AB", ("ab", "aB"), None),
    ],
)
def test_which_class_a_folder_is_named_after(folder: str, class_names: tuple[str, ...], label: int | None) -> None:
    assert label_of(folder, class_names) == label


def test_every_class_can_be_named_by_its_name_and_by_its_number() -> None:
    for class_names in (BYCLASS, BALANCED, LETTERS, FASHION):
        for label, name in enumerate(class_names):
            assert label_of(name.replace("/", "-"), class_names) == label
            assert label_of(str(label), class_names) == label
