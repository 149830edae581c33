"""How a user's own files are read: images of a folder, arrays, tables. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePath

from perfedavg.fields import setting

TABLES = (".csv", ".tsv", ".parquet")
ARRAYS = (".npz",)
COLOURS = ("grey", "rgb")
LABEL_KINDS = ("classes", "numbers")
LARGEST_SIDE = 1024
"""Pixels of an image's side."""
_SIZE = re.compile(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?")


def _refuse_size(text: str) -> str | None:
    found = _SIZE.fullmatch(text)
    if found and all(int(side or 1) <= LARGEST_SIDE for side in found.groups()):
        return None
    return f"must be WIDTHxHEIGHT in pixels, or one number for both, up to {LARGEST_SIDE}, such as 32 or 64x48"


@dataclass(frozen=True)
class OwnFiles:
    """How a user's own files are read; other data sets refuse all but the defaults."""

    client_column: str | None = setting(
        None, "column (of an .npz: array) that says whose an example is", absent="client, client_id, user or user_id"
    )
    label_column: str | None = setting(None, "column or array with the labels", absent="y, label, target or class")
    split_column: str | None = setting(
        None,
        "column or array that says train or test of each example, where clients have a split of their own",
        absent="split, where there is one",
    )
    ignore_columns: str | None = setting(
        None, "columns that are no features, separated by commas", metavar="NAME[,NAME]", absent="none"
    )
    labels: str | None = setting(
        None,
        "what labels are: classes, or numbers to predict",
        choices=LABEL_KINDS,
        absent="numbers where any has a fraction",
    )
    standardize: bool = setting(
        True, "give each feature, and labels that are numbers, mean 0 and deviation 1 over the training clients"
    )
    image_size: str | None = setting(
        None,
        "pixels to which images of a folder are scaled, such as 32 or 64x48; black fills up where proportions differ",
        refuse=_refuse_size,
        metavar="N|WxH",
        absent="their own size, which must be the same for all",
    )
    image_color: str = setting("grey", "what images of a folder are read as", choices=COLOURS)


UNTOLD = OwnFiles()
"""Where the user says nothing of it."""


def sides(size: str) -> tuple[int, int]:
    """Width and height that an image size such as `32` or `64x48` stands for."""
    width, _, height = size.partition("x")
    return int(width), int(height or width)


def is_path(dataset: str) -> bool:
    """Whether the name of a data set is that of a file or a folder of the user's own."""
    return os.sep in dataset or dataset.lower().endswith((*TABLES, *ARRAYS))


def is_own_code(name: str) -> bool:
    """Whether the name of a data set or a model is `package.module:name`, a user's own code."""
    return ":" in name and not is_path(name)


def dataset_name(text: str) -> str:
    """The name of a data set; a path in full, so that it means the same from any folder."""
    return os.path.abspath(os.path.expanduser(text)) if is_path(text) else text


def shown_dataset(dataset: str) -> str:
    """What a data set is called in lines for people, and in names of files: of a path its last part."""
    return PurePath(dataset).name if is_path(dataset) else dataset
