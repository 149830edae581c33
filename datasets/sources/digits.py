"""The real handwritten digits that scikit-learn ships (UCI Optical Recognition of Handwritten Digits). No download."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from datasets.clients.partitioned import ImageSplits
from datasets.sources.class_names import DIGITS

LARGEST_VALUE = 16
"""A pixel counts the dark points of a 4x4 block."""


def _table_file() -> Path:
    """A line a digit: 64 pixels, label. `sklearn.datasets` would read it too, but takes a second to import."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None, "scikit-learn is installed"
    assert spec.submodule_search_locations is not None, "and is a package"
    return Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")


def load_digits_images(test_share: Fraction = Fraction(1, 5)) -> ImageSplits:
    """1,797 digits, 8x8 scaled bilinearly to 28x28.

    They are published without a split that all use. So each class gives the test split the share that is asked for, at
    even distances: every fifth of a class, which are 355 digits, of 1/5.
    """
    table = np.loadtxt(_table_file(), delimiter=",")
    small = torch.from_numpy(table[:, :-1]).view(-1, 1, 8, 8) / LARGEST_VALUE
    large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False).squeeze(1)
    images = (large * 255).round().to(torch.uint8).numpy()
    labels = table[:, -1].astype(np.int64)
    in_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        places = np.flatnonzero(labels == label)
        counts = np.arange(len(places) + 1) * test_share.numerator // test_share.denominator
        in_test[places[np.diff(counts) > 0]] = True
    return ImageSplits(images[~in_test], labels[~in_test], images[in_test], labels[in_test], 10, DIGITS)
