"""A user's own .npz file: images and numbers of any kind, and what is said where the arrays are not right."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from datasets import DatasetRequest, load_federated_dataset
from perfedavg.own_files import OwnFiles

CLIENT = np.repeat(["anna", "ben", "cleo", "dora", "emil"], 10)
Y = np.tile([0, 1], 25)


def load(path: Path, **how: Any) -> Any:
    files = OwnFiles(**{"standardize": False, **how})
    request = DatasetRequest(str(path), None, lambda count: max(1, count // 5), None, 0, own_files=files)
    return load_federated_dataset(request, path.parent)


def write(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **{"x": np.zeros((50, 3)), "y": Y, "client": CLIENT, **arrays})
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own.npz"


def numbered(*shape: int, kind: type = np.uint8) -> NDArray[Any]:
    """50 inputs, each unlike any other."""
    values = np.arange(50 * int(np.prod(shape))).reshape(50, *shape) % 251
    values[:, ..., 0] = np.arange(50).reshape(50, *[1] * (len(shape) - 1))
    return values.astype(kind)


SHAPES = {
    "grey": (numbered(8, 6), lambda x: x[:, None] / 255),
    "grey, channel behind": (numbered(8, 6, 1), lambda x: x.transpose(0, 3, 1, 2) / 255),
    "colour, channels behind": (numbered(8, 6, 3), lambda x: x.transpose(0, 3, 1, 2) / 255),
    "colour, channels before": (numbered(3, 8, 6), lambda x: x / 255),
    "floating-point images": (numbered(8, 6, kind=np.float64) / 7, lambda x: x[:, None]),
    "many channels": (numbered(12, 8, 6, kind=np.float32), lambda x: x),
    "features": (numbered(5, kind=np.float64), lambda x: x),
    "whole numbers": (numbered(5, kind=np.int64), lambda x: x),
    "bytes": (numbered(5), lambda x: x),
    "one feature": (numbered(1)[:, 0], lambda x: x[:, None]),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_inputs_of_every_shape(kind: str, path: Path) -> None:
    """Each client's inputs, channels first and in the units that a model takes, stay with their labels."""
    x, expected = SHAPES[kind]
    dataset = load(write(path, x=x))
    everything = torch.from_numpy(np.ascontiguousarray(expected(x))).float()
    for client in range(5):
        data = dataset.client_data(client)
        inputs, labels = (
            torch.cat([data.train_inputs, data.test_inputs]),
            torch.cat([data.train_labels, data.test_labels]),
        )
        own = np.flatnonzero(dataset.client_name(client) == CLIENT)
        order = [int(torch.isclose(everything[own], one).flatten(1).all(1).nonzero()[0]) for one in inputs]
        assert sorted(order) == list(range(10))
        assert labels.tolist() == Y[own][order].tolist()
        assert inputs.dtype == torch.float32


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (Y * 5, ("0", "5")),
        (np.where(Y, "no", "yes"), ("no", "yes")),
        (np.where(Y, b"no", b"yes"), ("no", "yes")),
        (Y[:, None], ("0", "1")),
        (Y.astype(bool), ("False", "True")),
        (Y.astype(np.float32), ("0", "1")),
        (Y * 2 - 1, ("-1", "1")),
    ],
)
def test_classes_by_name_or_number(labels: NDArray[Any], names: tuple[str, ...], path: Path) -> None:
    assert load(write(path, y=labels)).class_names == names


def test_several_targets(path: Path) -> None:
    targets = np.stack([np.arange(50) / 3, -np.arange(50)], axis=1)
    dataset = load(write(path, x=np.arange(50.0), y=targets))
    data = dataset.client_data(2)
    assert (dataset.num_classes, dataset.class_names) == (2, None)
    assert torch.allclose(data.test_labels, torch.cat([data.test_inputs / 3, -data.test_inputs], dim=1))


def test_usual_and_other_names(path: Path) -> None:
    np.savez(path, Images=numbered(8, 6), Label=Y, user=np.repeat(np.arange(5), 10), notes=np.array("of May"))
    dataset = load(path)
    assert {dataset.client_name(client) for client in range(5)} == set("01234")
    assert "passed over: notes" in dataset.about
    np.savez(path, x=numbered(8, 6), species=Y, writer=CLIENT)
    assert load(path, client_column="writer", label_column="species").num_classes == 2


def test_images_are_not_standardized(path: Path) -> None:
    """Their values mean the same at every place."""
    x = numbered(8, 6)
    assert load(write(path, x=x), standardize=True).client_data(0).train_inputs.max() <= 1


def test_a_split_of_its_own(path: Path) -> None:
    split = np.where(np.arange(50) % 10 < 4, "test", "train")
    data = load(write(path, x=np.arange(50.0), split=split)).client_data(0)
    assert len(data.test_labels) == 4
    assert (data.test_inputs % 10 < 4).all()


def test_a_mapped_file_is_shared(path: Path) -> None:
    """What the clients' examples are read from is a file, which all processes of a machine map."""
    dataset = load(write(path, x=numbered(8, 6)))
    assert isinstance(dataset._clients._clients._inputs, np.memmap)


def objects() -> NDArray[Any]:
    return np.array([{"a": 1}] * 50, dtype=object)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "pickled": (
        {"client": objects()},
        "'client' holds Python objects, which are not read, because reading",
    ),
    "pickled inputs": ({"x": objects()}, "'x' holds Python objects"),
    "another number of rows": ({"y": Y[:-1]}, "array 'x' has 50 rows and 'y' 49; give each row one"),
    "clients with two values": (
        {"client": np.zeros((50, 2))},
        r"'client' has the shape \(50, 2\); give one value a row",
    ),
    "one-hot": ({"y": np.eye(2)[Y]}, r"nothing but 0 and 1, as one-hot classes do; store the classes \(y.argmax"),
    "whole numbers in two columns": ({"y": np.zeros((50, 2), int)}, "give one class a row, or floating-point targets"),
    "complex": ({"x": np.zeros((50, 2), complex)}, "'x' is complex128"),
    "dates": ({"client": np.zeros(50, "datetime64[s]")}, "'client' is datetime64"),
    "records": ({"x": np.zeros(50, [("a", int)])}, "'x' is .*'a'"),
    "NaN": ({"x": np.where(np.arange(100).reshape(50, 2) == 7, np.nan, 0)}, "array 'x' has no value in row 3"),
    "a label NaN": ({"y": np.where(np.arange(50) == 9, np.nan, 0.5)}, "array 'y' has no value in row 9"),
    "infinite pixels": ({"x": np.full((50, 4, 4), np.inf)}, "array 'x' holds inf in row 0"),
    "too large": ({"x": np.full((50, 2), 1e300)}, "too large for 32 bits"),
    "a client with a fraction": ({"client": np.arange(50) / 2}, "array 'client' holds 0.5 in row 1, which is no whole"),
    "a client NaN": ({"client": np.full(50, np.nan)}, "array 'client' has no value in row 0"),
    "images of wide integers": ({"x": numbered(8, 6, kind=np.int32)}, "store images as uint8"),
    "empty": ({"x": np.zeros((0, 2)), "y": Y[:0], "client": CLIENT[:0]}, "array 'x' has no rows"),
    "no pixels": ({"x": np.zeros((50, 0))}, "an example must have a value"),
    "texts as inputs": ({"x": CLIENT}, "array 'x' holds <U4; let it hold numbers"),
    "a single number": ({"x": np.float64(1)}, "store numbers or texts, a row an example"),
    "two arrays of inputs": ({"data": np.zeros((50, 2))}, "one array of inputs must be called .* there is 2"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_one_line_with_the_file_and_the_place(kind: str, path: Path) -> None:
    arrays, reason = WRONG[kind]
    with pytest.raises(ValueError, match=reason) as refusal:
        load(write(path, **arrays))
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_nothing_is_unpickled(path: Path) -> None:
    """Not even where the header says that the array holds numbers."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("it was unpickled",)

    content = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (50,)}
    np.lib.format.write_array_header_1_0(content, header)  # type: ignore[no-untyped-call]
    content.write(pickle.dumps(Bomb()))
    write(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data.npy", content.getvalue())
    with pytest.raises(ValueError, match="'data' holds Python objects"):
        load(path, ignore_columns="x")


def test_what_would_fill_the_memory_is_refused_before_it_is_unpacked(path: Path) -> None:
    """A few kilobytes whose header asks for a petabyte, with a size in the archive that fits it or does not."""
    content = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (50, 10**12)}
    np.lib.format.write_array_header_1_0(content, header)  # type: ignore[no-untyped-call]
    np.savez(path, y=Y, client=CLIENT)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x.npy", content.getvalue())
    with pytest.raises(ValueError, match="'x' should have 400000000000000 bytes of values and has 0; write it anew"):
        load(path)
    whole = path.read_bytes()
    at = whole.rindex(b"x.npy") - 46  # of the entry in the archive's directory
    claimed = whole[: at + 24] + (2**32 - 2).to_bytes(4, "little") + whole[at + 28 :]
    path.write_bytes(claimed)
    with pytest.raises(ValueError, match="should have 400000000000000 bytes"):
        load(path)


def test_more_than_the_machine_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 100))
    with pytest.raises(ValueError, match=r"unpacks to .* GiB, more than the .* GiB of this machine"):
        load(path)


def test_damaged_files_are_one_line(path: Path) -> None:
    """Whatever byte is turned: a refusal of one line, or data, and never another error."""
    write(path, x=numbered(4, 4))
    content = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))])
        refusal = refusal_of(path)
        refused += refusal is not None
        assert refusal is None or ("own.npz" in refusal and "\n" not in refusal)
    assert refused > 30


def refusal_of(path: Path) -> str | None:
    try:
        load(path)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("content", [b"", b"no archive", pickle.dumps([1, 2])])
def test_bytes_that_are_no_archive(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"own\.npz is damaged or no \.npz file"):
        load(path)
