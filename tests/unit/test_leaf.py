"""FEMNIST and Shakespeare from files in their real format; with damaged ones, one clear line and no cache."""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import datasets.sources.leaf
from datasets import DatasetRequest, load_federated_dataset
from datasets.clients.split import SplitDataset
from datasets.sources.leaf import VOCABULARY, load_femnist, load_shakespeare

Document = dict[str, Any]
WHITE_IMAGE = [1.0] * 784


def leaf(users: dict[str, tuple[list[Any], list[Any]]]) -> Document:
    """What LEAF writes for users with their x and y."""
    return {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {name: {"x": x, "y": y} for name, (x, y) in users.items()},
    }


def write_json(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def femnist_document() -> Document:
    stroke = [1.0] * 784
    stroke[28 * 3 + 20], stroke[28 * 4 + 20] = 0.0, 55 / 255
    return leaf({"f1_02": ([stroke, list(WHITE_IMAGE)], [61, 0]), "f0_01": ([[0] * 784], [10])})


def shakespeare_document() -> Document:
    line = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
    role = ([line, line[1:] + "a", " " * 80], ["a", "}", "\n"])
    return leaf({"THE_PLAY_HERO": role, "THE_PLAY_FOOL": ([" " * 79 + "F"], ["o"])}) | {"hierarchies": ["p", "p"]}


def encoded(pixels: Any, file_format: str = "PNG", mode: str | None = None) -> bytes:
    picture = Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, file_format)
    return buffer.getvalue()


def white(*black: tuple[int, int]) -> Any:
    pixels = np.full((28, 28), 255, dtype=np.uint8)
    for place in black:
        pixels[place] = 0
    return pixels


IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(
    path: Path,
    contents: Sequence[bytes | None],
    writers: Sequence[str | None],
    labels: Sequence[int | None],
    **parts: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(contents)], IMAGE_TYPE)
    columns = {
        "image": images,
        "writer_id": pa.array(writers, pa.string()),
        "hsf_id": pa.array([0] * len(writers), pa.int64()),
        "character": pa.array(labels, pa.int64()),
    }
    columns = {name: column for name, column in (columns | parts).items() if column is not None}
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def refusal_of(load: Callable[[Path], object], data_root: Path) -> str:
    """The message that a load ends with: one line, and nothing is left in the cache."""
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the callers look at the message)
        load(data_root)
    cached = [path.name for path in (data_root / "cache").glob("*") if path.is_dir()]
    assert cached == [], "a cache was left behind"
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# Reading


def test_femnist_of_leaf_is_inverted_and_upright(tmp_path: Path) -> None:
    write_json(tmp_path / "femnist" / "all_data_0.json", femnist_document())
    clients = load_femnist(tmp_path)
    assert (clients.names, clients.num_classes) == (["f1_02", "f0_01"], 62)
    images, labels = clients.examples(0)
    assert (images.shape, images.dtype, labels.tolist()) == ((2, 28, 28), np.uint8, [61, 0])
    assert (images[0, 3, 20], images[0, 4, 20], images[0].sum()) == (255, 200, 455), "ink is bright, the rest is black"
    assert images[1].max() == 0
    assert clients.examples(1)[0].min() == 255


def test_every_grey_of_an_8_bit_image_survives(tmp_path: Path) -> None:
    """LEAF divides by 255; rounding has to bring back every one of the 256 values."""
    row = [grey / 255 for grey in range(256)] + [1.0] * (784 - 256)
    write_json(tmp_path / "femnist" / "all_data_0.json", leaf({"w": ([row], [0])}))
    images, _ = load_femnist(tmp_path).examples(0)
    assert images.ravel()[:256].tolist() == list(range(255, -1, -1))


def test_clients_come_in_the_order_of_the_files_names_and_then_of_their_users(tmp_path: Path) -> None:
    for name, users in (("all_data_1.json", ["d", "a"]), ("all_data_0.json", ["c", "b"])):
        write_json(tmp_path / "femnist" / name, leaf({user: ([WHITE_IMAGE], [0]) for user in users}))
    assert load_femnist(tmp_path).names == ["c", "b", "d", "a"]


def image_of(grey: int) -> list[float]:
    """One pixel of that grey on white, as LEAF has it; here it is the only one that is not black, 255 - grey."""
    return [grey / 255, *WHITE_IMAGE[1:]]


SPLIT = {
    "train": leaf({"a": ([image_of(1), image_of(2), image_of(3)], [1, 2, 3]), "b": ([image_of(4)], [4])}),
    "test": leaf({"a": ([image_of(5)], [5]), "b": ([image_of(6), image_of(7)], [6, 7])}),
}
NAMES = {part: f"all_data_0_niid_1_keep_0_{part}_9.json" for part in ("train", "test")}


def greys(inputs: torch.Tensor) -> list[int]:
    """Of `image_of`, from what a client trains on."""
    return [255 - round(255 * float(image.max())) for image in inputs]


@pytest.mark.parametrize("layout", ["{name}", "{part}/{name}", "data/{part}/{name}", "{part}/all_data.json"])
def test_the_split_that_leaf_publishes_is_the_clients_split(layout: str, tmp_path: Path) -> None:
    """LEAF's scripts leave a pair of files, in folders of its own or, as its mirrors do, beside each other."""
    for part, document in SPLIT.items():
        write_json(tmp_path / "femnist" / layout.format(part=part, name=NAMES[part]), document)
    dataset = SplitDataset("femnist", load_femnist(tmp_path), 1, 1, seed=0)
    a, b = dataset.client_data(0), dataset.client_data(1)
    assert (greys(a.train_inputs), greys(a.test_inputs)) == ([1, 2, 3], [5])
    assert (greys(b.train_inputs), greys(b.test_inputs)) == ([4], [6, 7])
    assert (a.train_labels.tolist(), b.test_labels.tolist()) == ([1, 2, 3], [6, 7])
    assert [dataset.num_train_examples(client) for client in (0, 1)] == [3, 1]


def test_another_split_of_the_same_examples_is_other_data(tmp_path: Path) -> None:
    """Or a worker could train on what the server's clients are scored on."""
    examples, fingerprints = [(image_of(grey), grey) for grey in range(4)], set()
    for num_train in (1, 2, 3):
        folder = tmp_path / str(num_train) / "femnist"
        for part, own in (("train", examples[:num_train]), ("test", examples[num_train:])):
            write_json(folder / NAMES[part], leaf({"a": ([x for x, _ in own], [y for _, y in own])}))
        fingerprints.add(load_femnist(folder.parent).fingerprint)
    write_json(
        tmp_path / "whole" / "femnist" / "all_data_0.json", leaf({"a": ([x for x, _ in examples], [0, 1, 2, 3])})
    )
    fingerprints.add(load_femnist(tmp_path / "whole").fingerprint)
    assert len(fingerprints) == 4


def test_a_published_split_is_not_cut_again(tmp_path: Path) -> None:
    for part, document in SPLIT.items():
        write_json(tmp_path / "femnist" / NAMES[part], document)
    request = DatasetRequest("femnist", None, lambda _: 1, None, 0, "tail")
    with pytest.raises(ValueError, match="--local_split tail has no meaning for femnist: its files hold a split"):
        load_federated_dataset(request, tmp_path)


def test_a_user_in_one_part_only_is_left_out_and_counted(tmp_path: Path) -> None:
    train, test = copy.deepcopy(SPLIT["train"]), copy.deepcopy(SPLIT["test"])
    train["users"].insert(0, "only trains")
    train["num_samples"].insert(0, 1)
    train["user_data"]["only trains"] = {"x": [WHITE_IMAGE], "y": [0]}
    test["users"].append("is only scored")
    test["num_samples"].append(1)
    test["user_data"]["is only scored"] = {"x": [WHITE_IMAGE], "y": [0]}
    for part, document in (("train", train), ("test", test)):
        write_json(tmp_path / "femnist" / NAMES[part], document)
    clients = load_femnist(tmp_path)
    assert clients.names == ["only trains", "a", "b", "is only scored"]
    dataset = SplitDataset("femnist", clients, 2, 2, seed=0)
    assert (dataset.train_client_ids, dataset.unseen_client_ids, dataset.num_left_out) == ([1], [2], 2)


def test_users_without_data_are_left_out_and_counted(tmp_path: Path) -> None:
    """LEAF writes such users, its split also some that are not among `users`."""
    document = leaf({"empty": ([], []), "a": ([WHITE_IMAGE] * 2, [1, 2]), "b": ([WHITE_IMAGE] * 3, [1, 2, 3])})
    document["user_data"]["unlisted"] = {"x": [], "y": []}
    write_json(tmp_path / "femnist" / "all_data_0.json", document)
    dataset = SplitDataset("femnist", load_femnist(tmp_path), 2, 1, seed=0)
    assert (dataset.train_client_ids, dataset.unseen_client_ids, dataset.num_left_out) == ([1], [2], 1)


def test_files_with_users_without_data_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "femnist" / "all_data_0.json", leaf({"empty": ([], [])}))
    assert "there is no client with an example" in refusal_of(load_femnist, tmp_path)


def test_roles_of_a_published_split_keep_all_their_windows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No gap is made in a test part that LEAF made; that its windows overlap is said."""
    windows = [letter * 80 for letter in "abcdef"]
    for part, own in (("train", windows[:4]), ("test", windows[4:])):
        role = (own, [window[0] for window in own])
        write_json(tmp_path / "shakespeare" / part / f"all_data_{part}_8.json", leaf({"HERO": role, "FOOL": role}))
    dataset = SplitDataset("shakespeare", load_shakespeare(tmp_path), 1, 1, seed=0)
    data = dataset.client_data(1)
    assert [VOCABULARY[label] for label in data.train_labels.tolist()] == list("abcd")
    assert [VOCABULARY[label] for label in data.test_labels.tolist()] == list("ef")
    assert "all_data_test_8.json is of LEAF's own split, which draws windows at random" in capfd.readouterr().err


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = write_json(tmp_path / "femnist" / "all_data_0.json", femnist_document())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_femnist(tmp_path).num_clients == 2


@pytest.mark.parametrize("name", ["all_data_0_niid_1_keep_0.json", "data/all_data/all_data_0.json"])
def test_what_leaf_calls_the_files_before_its_split(name: str, tmp_path: Path) -> None:
    write_json(tmp_path / "femnist" / name, femnist_document())
    assert load_femnist(tmp_path).num_clients == 2


def test_femnist_of_parquet_is_grouped_by_writer(tmp_path: Path) -> None:
    """Writers lie scattered over rows, row groups, batches and files; examples keep the order of the files."""
    folder = tmp_path / "femnist"
    write_parquet(
        folder / "train-00000-of-00002.parquet",
        [encoded(white((3, 20))), encoded(white((0, 0))), encoded(white((0, 1))), encoded(white(), "JPEG")],
        ["w2", "w1", "w2", "w1"],
        [61, 1, 2, 3],
    )
    modes = [encoded(white((5, 6)), mode=mode) for mode in ("1", "RGB", "P")]
    write_parquet(folder / "train-00001-of-00002.parquet", modes, ["w0", "w2", "w1"], [4, 5, 6])
    clients = load_femnist(tmp_path)
    assert (clients.names, clients.num_classes) == (["w0", "w1", "w2"], 62)
    assert [clients.examples(client)[1].tolist() for client in range(3)] == [[4], [1, 3, 6], [61, 2, 5]]
    images, _ = clients.examples(2)
    assert (images.shape, images.dtype) == ((3, 28, 28), np.uint8)
    assert [tuple(np.argwhere(image)[0]) for image in images] == [(3, 20), (0, 1), (5, 6)]
    assert [int(image.sum()) for image in images] == [255, 255, 255]
    assert int(clients.examples(1)[0][1].max()) == 0


@pytest.mark.parametrize(
    "parts",
    [
        {"image": pa.array([encoded(white((3, 4)))] * 3)},
        {"image": pa.array([encoded(white((3, 4)))] * 3, pa.large_binary())},
        {"writer_id": pa.array(["1", "0", "1"]).dictionary_encode()},
        {"writer_id": pa.array([1, 0, 1])},
        {"character": pa.array([5, 6, 7], pa.int8())},
    ],
    ids=["bytes", "large bytes", "categories", "numbers", "small numbers"],
)
def test_columns_as_other_programs_write_them(parts: dict[str, Any], tmp_path: Path) -> None:
    """A table that went through pandas, say, has the same data in columns of other types."""
    contents = [encoded(white((3, 4)))] * 3
    write_parquet(tmp_path / "femnist" / "a.parquet", contents, ["1", "0", "1"], [5, 6, 7], **parts)
    clients = load_femnist(tmp_path)
    assert clients.names == ["0", "1"]
    images, labels = clients.examples(1)
    assert labels.tolist() == [5, 7]
    assert [np.argwhere(image).tolist() for image in images] == [[[3, 4]]] * 2


def test_more_rows_than_a_batch(tmp_path: Path) -> None:
    content = encoded(white())
    writers = [f"w{row % 3}" for row in range(2500)]
    write_parquet(tmp_path / "femnist" / "a.parquet", [content] * 2500, writers, [row % 62 for row in range(2500)])
    clients = load_femnist(tmp_path)
    assert [clients.num_examples(client) for client in range(3)] == [834, 833, 833]
    assert clients.examples(1)[1].tolist() == [row % 62 for row in range(1, 2500, 3)]


def test_both_forms_of_femnist_give_the_same_clients(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    rows = [(image / 255).ravel().tolist() for image in pixels]
    write_json(tmp_path / "json" / "femnist" / "all_data_0.json", leaf({"a": (rows[:1], [7]), "b": (rows[1:], [8, 9])}))
    path = tmp_path / "parquet" / "femnist" / "train.parquet"
    write_parquet(path, [encoded(pixels[row]) for row in (1, 0, 2)], ["b", "a", "b"], [8, 7, 9])
    assert load_femnist(tmp_path / "json").fingerprint == load_femnist(tmp_path / "parquet").fingerprint


def test_shakespeare_becomes_tokens_of_leafs_vocabulary(tmp_path: Path) -> None:
    write_json(tmp_path / "shakespeare" / "all_data_0.json", shakespeare_document())
    clients = load_shakespeare(tmp_path)
    assert (clients.names, clients.num_classes) == (["THE_PLAY_HERO", "THE_PLAY_FOOL"], 80)
    tokens, labels = clients.examples(0)
    assert (tokens.shape, tokens.dtype, labels.dtype) == ((3, 80), np.uint8, np.int64)
    assert tokens[0].tolist() == list(range(80))
    assert tokens[1].tolist() == [*range(1, 80), 53]
    assert labels.tolist() == [53, 79, 0]
    assert [VOCABULARY[token] for token in clients.examples(1)[0][0, -2:]] == [" ", "F"]


def test_shakespeare_before_it_is_sampled_is_one_file(tmp_path: Path) -> None:
    write_json(tmp_path / "shakespeare" / "all_data.json", shakespeare_document())
    assert load_shakespeare(tmp_path).num_clients == 2


def test_the_vocabulary_is_leafs() -> None:
    """80 characters, of which the order is part of every model that was trained."""
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 80
    assert [VOCABULARY.index(character) for character in "\n 0:A[a}"] == [0, 1, 11, 21, 25, 51, 53, 79]


# The cache


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_second_load_reads_the_cache_and_a_changed_file_is_read_anew(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the files were read again")

    if form == "json":
        path = write_json(tmp_path / "femnist" / "all_data_0.json", femnist_document())
    else:
        path = write_parquet(tmp_path / "femnist" / "a.parquet", [encoded(white())] * 2, ["w0", "w1"], [1, 2])
    first = load_femnist(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(json, "load", refuse)
        patch.setattr(pq, "ParquetFile", refuse)
        again = load_femnist(tmp_path)
        assert (again.fingerprint, again.names) == (first.fingerprint, first.names)
        os.utime(path, ns=(1, 1))
        with pytest.raises(AssertionError, match="read again"):
            load_femnist(tmp_path)
    if form == "json":
        write_json(path, leaf({"new": ([WHITE_IMAGE], [3])}))
    else:
        write_parquet(path, [encoded(white())], ["new"], [3])
    assert load_femnist(tmp_path).names == ["new"]


def test_a_data_root_that_cannot_be_written(
    tmp_path: Path, make_read_only: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a read-only mount of a shared disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    root = tmp_path / "root"
    write_json(root / "femnist" / "all_data_0.json", femnist_document())
    make_read_only(root)
    assert load_femnist(root).names == ["f1_02", "f0_01"]
    assert [path.name for path in root.iterdir()] == ["femnist"]


def test_only_parquet_files_need_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes time and memory in every process, of which at most one builds the cache."""
    write_json(tmp_path / "femnist" / "all_data_0.json", femnist_document())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert importlib.reload(datasets.sources.leaf).load_femnist(tmp_path).num_clients == 2


# Refusals


@pytest.mark.parametrize(("name", "load"), [("femnist", load_femnist), ("shakespeare", load_shakespeare)])
@pytest.mark.parametrize("folder_is_there", [False, True])
def test_missing_files(name: str, load: Callable[[Path], object], folder_is_there: bool, tmp_path: Path) -> None:
    if folder_is_there:
        (tmp_path / name).mkdir()
    message = refusal_of(load, tmp_path)
    for part in (f"--dataset {name}", str(tmp_path / name), "all_data", ".json", "--dataset digits"):
        assert part in message
    assert "--dataset synthetic_writers" in message
    assert ("*.parquet" in message) == (name == "femnist")


def test_both_kinds_of_files(tmp_path: Path) -> None:
    write_json(tmp_path / "femnist" / "all_data_0.json", femnist_document())
    write_parquet(tmp_path / "femnist" / "a.parquet", [encoded(white())], ["w"], [1])
    assert "femnist has both all_data_0.json and a.parquet" in refusal_of(load_femnist, tmp_path)


def test_half_a_split(tmp_path: Path) -> None:
    path = write_json(tmp_path / "femnist" / "train" / NAMES["train"], SPLIT["train"])
    message = refusal_of(load_femnist, tmp_path)
    assert f"{path} lacks {tmp_path / 'femnist' / 'test' / NAMES['test']}, the other part of the same users" in message


def test_a_split_by_user(tmp_path: Path) -> None:
    """LEAF's test users never train; here --unseen_fraction says who they are, so that files must not contradict it."""
    write_json(tmp_path / "femnist" / NAMES["train"], leaf({"a": ([WHITE_IMAGE], [1])}))
    write_json(tmp_path / "femnist" / NAMES["test"], leaf({"b": ([WHITE_IMAGE], [1])}))
    message = refusal_of(load_femnist, tmp_path)
    assert "have no user in common: LEAF split them by user (-t user)" in message
    assert "use LEAF's files from before the split" in message


@pytest.mark.parametrize("name", ["all_data_0.json", "train/all_data_0_train_9.json"])
def test_files_from_before_and_after_the_split(name: str, tmp_path: Path) -> None:
    for other, document in ((name, SPLIT["train"]), (f"{name}".replace("train", "test"), SPLIT["test"])):
        write_json(tmp_path / "femnist" / other, document)
    for part, document in SPLIT.items():
        write_json(tmp_path / "femnist" / NAMES[part], document)
    message = refusal_of(load_femnist, tmp_path)
    assert "hold the same users" in message
    assert "keep one" in message


def test_files_of_another_name_are_listed(tmp_path: Path) -> None:
    write_json(tmp_path / "femnist" / "mytrain.json", femnist_document())
    assert f"into {tmp_path / 'femnist'} (there is mytrain.json);" in refusal_of(load_femnist, tmp_path)


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_link_out_of_the_data_root(linked: str, tmp_path: Path) -> None:
    secret = write_json(tmp_path / "elsewhere" / "all_data_0.json", femnist_document())
    root = tmp_path / "root"
    if linked == "file":
        (root / "femnist").mkdir(parents=True)
        (root / "femnist" / "all_data_0.json").symlink_to(secret)
    else:
        root.mkdir()
        (root / "femnist").symlink_to(secret.parent)
    message = refusal_of(load_femnist, root)
    assert f"{root / 'femnist' / 'all_data_0.json'} leads out of {root}, to {secret}" in message


def test_links_that_stay_inside(tmp_path: Path) -> None:
    """A data root that is itself a link, and a link within it, lead nowhere else."""
    write_json(tmp_path / "root" / "store" / "0.json", femnist_document())
    (tmp_path / "root" / "femnist").mkdir()
    (tmp_path / "root" / "femnist" / "all_data_0.json").symlink_to("../store/0.json")
    (tmp_path / "link").symlink_to("root")
    assert load_femnist(tmp_path / "link").num_clients == 2


@pytest.mark.parametrize("target", ["nowhere", "all_data_0.json"])
def test_a_link_to_nothing(target: str, tmp_path: Path) -> None:
    (tmp_path / "femnist").mkdir()
    (tmp_path / "femnist" / "all_data_0.json").symlink_to(target)
    assert "all_data_0.json is no file that can be read" in refusal_of(load_femnist, tmp_path)


NO_JSON = {
    "truncated": ('{"users": ["a"], "num_sa', "Unterminated string starting at: line 1 column 18"),
    "cut between values": ('{"users": ["a"],\n "num_samples": [1', "line 2 column 19"),
    "empty": ("", "Expecting value: line 1 column 1"),
    "html": ("<html>", "Expecting value: line 1 column 1"),
    "not utf-8": ('{"users": ["\udcff"]}', "can't decode byte 0xff in position 12"),
    "deep": ("[" * 200_000, "recursion"),
    "key twice": ('{"users": [], "users": []}', "the key 'users' comes twice"),
}


@pytest.mark.parametrize("damage", NO_JSON)
def test_a_file_that_is_no_json(damage: str, tmp_path: Path) -> None:
    content, reason = NO_JSON[damage]
    (tmp_path / "femnist").mkdir()
    path = tmp_path / "femnist" / "all_data_3.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    message = refusal_of(load_femnist, tmp_path)
    assert f"{path} is damaged or no JSON: " in message
    assert reason in message


def setting(*keys: Any, to: Any) -> Callable[[Document], object]:
    """A change of one place in a document."""

    def change(document: Document) -> None:
        holder: Any = document
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = to

    return change


def without(*keys: str) -> Callable[[Document], object]:
    def change(document: Document) -> None:
        holder = document
        for key in keys[:-1]:
            holder = holder[key]
        del holder[keys[-1]]

    return change


X = ("user_data", "f1_02", "x")
Y = ("user_data", "f1_02", "y")
USER = ": user 'f1_02'"
BAD_FEMNIST: dict[str, tuple[Callable[[Document], object], str]] = {
    "no users": (without("users"), ' has no "users"'),
    "no num_samples": (without("num_samples"), ' has no "num_samples"'),
    "no user_data": (without("user_data"), ' has no "user_data"'),
    "no x": (without(*X), f'{USER} has no "x"'),
    "no y": (without(*Y), f'{USER} has no "y"'),
    "users no list": (setting("users", to="f1_02"), ": \"users\" is 'f1_02', not a list"),
    "user_data no object": (setting("user_data", to=[]), ': "user_data" is [], not an object'),
    "user no object": (setting("user_data", "f1_02", to=[1]), f'{USER} has no "x"'),
    "user no name": (setting("users", 1, to=["f0_01"]), ": users[1] is ['f0_01'], not a name"),
    "no user": (setting("users", to=[]), ': "users" is empty'),
    "counts": (setting("num_samples", to=[2]), ': "users" has 2 entries, "num_samples" has 1'),
    "user without data": (without("user_data", "f1_02"), f'{USER} is in "users" but not in "user_data"'),
    "data without user": (
        setting("user_data", "f9_99", to={"x": [WHITE_IMAGE], "y": [3]}),
        ': user \'f9_99\' is in "user_data" but not in "users"',
    ),
    "num_samples": (setting("num_samples", 0, to=3), f'{USER} has 2 labels, but "num_samples" says 3'),
    "num_samples no number": (setting("num_samples", 0, to=None), f'{USER} has 2 labels, but "num_samples" says None'),
    "x and y": (setting(*Y, to=[1]), f"{USER} has 2 examples in x, but 1 labels in y"),
    "short row": (setting(*X, 1, to=[1.0] * 783), f"{USER}: x[1] has 783 pixels, not a list of 784"),
    "row no list": (setting(*X, 1, to="white"), f"{USER}: x[1] is 'white', not a list of 784"),
    "above 1": (setting(*X, 1, 5, to=1.5), f"{USER}: x[1][5] is 1.5, not a finite number in 0..1"),
    "below 0": (setting(*X, 0, 783, to=-0.01), f"{USER}: x[0][783] is -0.01, not a finite number in 0..1"),
    "nan": (setting(*X, 1, 5, to=float("nan")), f"{USER}: x[1][5] is nan, not a finite number in 0..1"),
    "infinite": (setting(*X, 1, 5, to=float("inf")), f"{USER}: x[1][5] is inf, not a finite number in 0..1"),
    "huge": (setting(*X, 1, 5, to=10**400), f"{USER}: x[1][5] is 1000"),
    "null": (setting(*X, 1, 5, to=None), f"{USER}: x[1][5] is None, not a finite number in 0..1"),
    "text": (setting(*X, 1, 5, to="0.5"), f"{USER}: x[1][5] is '0.5', not a finite number in 0..1"),
    "true": (setting(*X, 1, 5, to=True), f"{USER}: x[1][5] is True, not a finite number in 0..1"),
    "label above": (setting(*Y, 1, to=62), f"{USER}: y[1] is 62, not a whole number in 0..61"),
    "label below": (setting(*Y, 1, to=-1), f"{USER}: y[1] is -1, not a whole number in 0..61"),
    "label no whole number": (setting(*Y, 1, to=1.0), f"{USER}: y[1] is 1.0, not a whole number in 0..61"),
    "label true": (setting(*Y, 1, to=True), f"{USER}: y[1] is True, not a whole number in 0..61"),
}


@pytest.mark.parametrize("damage", BAD_FEMNIST)
def test_bad_content_of_femnist(damage: str, tmp_path: Path) -> None:
    """In the second of two files, so that what was read of the first must not stay."""
    change, expected = BAD_FEMNIST[damage]
    write_json(tmp_path / "femnist" / "all_data_0.json", leaf({"intact": ([WHITE_IMAGE], [0])}))
    document = femnist_document()
    change(document)
    path = write_json(tmp_path / "femnist" / "all_data_1.json", document)
    assert f"{path}{expected}" in refusal_of(load_femnist, tmp_path)


def test_a_file_that_holds_no_object(tmp_path: Path) -> None:
    path = write_json(tmp_path / "femnist" / "all_data_0.json", [1, 2])
    assert f'{path} has no "users"' in refusal_of(load_femnist, tmp_path)


def test_a_user_twice_in_one_file(tmp_path: Path) -> None:
    document = femnist_document()
    document["users"] = ["f1_02", "f0_01", "f1_02"]
    document["num_samples"] = [2, 1, 2]
    path = write_json(tmp_path / "femnist" / "all_data_0.json", document)
    assert f'{path}{USER} comes twice in "users"' in refusal_of(load_femnist, tmp_path)


def test_a_user_in_two_files(tmp_path: Path) -> None:
    first = write_json(tmp_path / "femnist" / "all_data_0.json", femnist_document())
    second = write_json(tmp_path / "femnist" / "all_data_1.json", leaf({"f0_01": ([WHITE_IMAGE], [0])}))
    assert f"{second}: user 'f0_01' comes twice, first in {first}; keep one of the two files there" in refusal_of(
        load_femnist, tmp_path
    )


HERO = ": user 'THE_PLAY_HERO'"
HERO_X = ("user_data", "THE_PLAY_HERO", "x")
HERO_Y = ("user_data", "THE_PLAY_HERO", "y")
BAD_SHAKESPEARE: dict[str, tuple[Callable[[Document], object], str]] = {
    "unknown character": (
        setting(*HERO_X, 2, to=" " * 17 + "{" + " " * 62),
        f"{HERO}: x[2][17] is '{{', not among LEAF's 80 characters",
    ),
    "accent": (setting(*HERO_X, 1, to="é" * 80), f"{HERO}: x[1][0] is 'é', not among LEAF's 80 characters"),
    "half a character": (setting(*HERO_Y, 1, to="\ud800"), f"{HERO}: y[1][0] is '\\ud800', not among LEAF's"),
    "unknown label": (setting(*HERO_Y, 1, to="\t"), f"{HERO}: y[1][0] is '\\t', not among LEAF's 80 characters"),
    "short": (setting(*HERO_X, 1, to="brief"), f"{HERO}: x[1] has 5 characters, not a string of 80"),
    "no string": (setting(*HERO_X, 1, to=[1]), f"{HERO}: x[1] is [1], not a string of 80"),
    "long label": (setting(*HERO_Y, 1, to="ab"), f"{HERO}: y[1] has 2 characters, not a string of 1"),
    "label no string": (setting(*HERO_Y, 1, to=7), f"{HERO}: y[1] is 7, not a string of 1"),
    "count": (setting("num_samples", 0, to=4), f'{HERO} has 3 labels, but "num_samples" says 4'),
}


@pytest.mark.parametrize("damage", BAD_SHAKESPEARE)
def test_bad_content_of_shakespeare(damage: str, tmp_path: Path) -> None:
    change, expected = BAD_SHAKESPEARE[damage]
    document = shakespeare_document()
    change(document)
    path = write_json(tmp_path / "shakespeare" / "all_data_0.json", document)
    assert f"{path}{expected}" in refusal_of(load_shakespeare, tmp_path)


def png_that_claims(width: int, height: int) -> bytes:
    """The bytes of a PNG with another size in its header, its check sum put right."""
    content = bytearray(encoded(white()))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


GOOD = encoded(white())
BAD_IMAGES = {
    "no image": (b"no image", "the image of row 3 is damaged or no PNG"),
    "empty": (b"", "the image of row 3 is damaged or no PNG"),
    "cut": (GOOD[: len(GOOD) // 2], "the image of row 3 is damaged or no PNG"),
    "check sum": (GOOD[:45] + bytes([GOOD[45] ^ 255]) + GOOD[46:], "the image of row 3 is damaged or no PNG"),
    "another format": (encoded(white(), "TIFF"), "the image of row 3 is damaged or no PNG, JPEG, BMP or GIF"),
    "size": (encoded(np.zeros((28, 32))), "the image of row 3 is 32x28, not 28x28; scale it"),
    "claims 81 million pixels": (png_that_claims(9000, 9000), "the image of row 3 is 9000x9000"),
    "claims 900 million pixels": (png_that_claims(30_000, 30_000), "the image of row 3 is damaged or no PNG"),
    "missing": (None, "row 3 has no image"),
}


@pytest.mark.parametrize("damage", BAD_IMAGES)
def test_bad_images_of_parquet(damage: str, tmp_path: Path) -> None:
    content, expected = BAD_IMAGES[damage]
    write_parquet(tmp_path / "femnist" / "a.parquet", [GOOD], ["w0"], [0])
    path = write_parquet(tmp_path / "femnist" / "b.parquet", [GOOD] * 3 + [content], ["w0", "w1"] * 2, [0] * 4)
    assert f"{path}: {expected}" in refusal_of(load_femnist, tmp_path)


@pytest.mark.parametrize(
    ("writers", "labels", "expected"),
    [
        (["a", None, "a"], [0, 0, 0], ": row 1 has no writer_id"),
        (["a", "", "a"], [0, 0, 0], ": row 1 has no writer_id"),
        (["a", "a", "a"], [0, 0, None], ": row 2 has no character"),
        (["a", "a", "a"], [0, 0, 62], ": row 2 has character 62, not in 0..61"),
        (["a", "a", "a"], [-1, 0, 0], ": row 0 has character -1, not in 0..61"),
    ],
)
def test_bad_rows_of_parquet(
    writers: list[str | None], labels: list[int | None], expected: str, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "femnist" / "a.parquet", [GOOD] * 3, writers, labels)
    assert f"{path}{expected}" in refusal_of(load_femnist, tmp_path)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            {"image": None},
            " has no column 'image'; its columns are ['writer_id', 'hsf_id', 'character']; rename the one",
        ),
        ({"writer_id": None}, " has no column 'writer_id'; its columns are ['image', 'hsf_id', 'character']"),
        ({"character": None}, " has no column 'character'; its columns are ['image', 'writer_id', 'hsf_id']"),
        ({"image": pa.array(["text"])}, ": column 'image' is 'string', not bytes, or a struct with binary bytes"),
        (
            {"image": pa.array([{"path": "0.png"}])},
            ": column 'image' is 'struct<path: string>', not bytes, or a struct",
        ),
        (
            {"image": pa.array([{"bytes": "text"}])},
            ": column 'image' is 'struct<bytes: string>', not bytes, or a struct",
        ),
        ({"writer_id": pa.array([7.5])}, ": column 'writer_id' is 'double', not a string or an integer"),
        ({"character": pa.array(["7"])}, ": column 'character' is 'string', not an integer, the label"),
    ],
)
def test_bad_columns_of_parquet(parts: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "femnist" / "a.parquet", [GOOD], ["w"], [0], **parts)
    assert f"{path}{expected}" in refusal_of(load_femnist, tmp_path)


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "femnist" / "a.parquet", [], [], [])
    assert f"{path} has no rows" in refusal_of(load_femnist, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "no parquet", "empty", "overwritten", "no utf-8"])
def test_a_damaged_parquet_file(damage: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "femnist" / "a.parquet", [GOOD] * 9, ["writer"] * 9, [0] * 9)
    content = path.read_bytes()
    damaged = {
        "truncated": content[:-100],
        "no parquet": b"<html>not found</html>",
        "empty": b"",
        "overwritten": content[:4] + b"\xff" * 600 + content[604:],
        "no utf-8": content.replace(b"writer\x00", b"writ\xffr\x00").replace(b"\x00writer", b"\x00writ\xffr"),
    }[damage]
    assert damaged != content
    path.write_bytes(damaged)
    assert f"{path} is damaged or no parquet file: " in refusal_of(load_femnist, tmp_path)


def test_no_role_is_scored_on_text_that_it_trained_on(tmp_path: Path) -> None:
    """The text is such that each window is unlike any other, so shared text would show as a shared character run."""
    letters = np.random.default_rng(0).choice(list(VOCABULARY), 450 + 81)
    text = "".join(letters)
    windows = {"x": [text[i : i + 80] for i in range(450)], "y": [text[i + 80] for i in range(450)]}
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    content = {"users": ["A", "B"], "num_samples": [450, 450], "user_data": {"A": windows, "B": windows}}
    (folder / "all_data.json").write_text(json.dumps(content))
    dataset = SplitDataset("shakespeare", load_shakespeare(tmp_path), 1, 1, seed=0)
    data = dataset.client_data(1)
    assert (len(data.train_labels), len(data.test_labels)) == (360, 450 - 360 - 80)

    def trigrams(inputs: torch.Tensor, labels: torch.Tensor) -> set[tuple[int, ...]]:
        rows = torch.cat([inputs, labels.unsqueeze(1)], dim=1).unfold(1, 3, 1).reshape(-1, 3)
        return set(map(tuple, rows.tolist()))

    shared = trigrams(data.train_inputs, data.train_labels) & trigrams(data.test_inputs, data.test_labels)
    assert len(shared) <= 2, "of 512,000 possible ones, two random texts of 440 and 90 share 0.07 on average"
