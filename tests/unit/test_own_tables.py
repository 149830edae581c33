"""A user's own CSV or parquet file: which client has which rows, and what is said where the file is not right."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

import utils
from datasets import DatasetRequest, load_federated_dataset
from datasets.describe import describe
from perfedavg.contracts import ClientData
from perfedavg.own_files import UNTOLD, OwnFiles

HEADER = "client,height,weight,y"


def table(num_clients: int = 5, rows: int = 10) -> list[str]:
    """Row r of client c is `c,10c+r,-r,label`: each row is told from every other by its height."""
    lines = (
        f"c{client},{10 * client + row},{-row},{'ab'[row % 2]}" for client in range(num_clients) for row in range(rows)
    )
    return [HEADER, *lines]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


def as_parquet(csv: Path) -> Path:
    pq.write_table(pa.csv.read_csv(csv), csv.with_suffix(".parquet"))
    return csv.with_suffix(".parquet")


def load(path: Path, seed: int = 0, num_clients: int | None = None, **how: Any) -> Any:
    files = OwnFiles(**{"standardize": False, **how})
    request = DatasetRequest(str(path), num_clients, lambda count: max(1, count // 5), None, seed, own_files=files)
    return load_federated_dataset(request, path.parent / "root")


def examples(data: ClientData) -> list[tuple[float, ...]]:
    """(features, label) of both parts."""
    inputs = torch.cat([data.train_inputs, data.test_inputs]).tolist()
    return [(*values, label) for values, label in zip(inputs, [*data.train_labels, *data.test_labels], strict=True)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolons", "byte order mark", "windows", "quoted", "parquet"])
def test_a_table_is_read_whatever_wrote_it(kind: str, tmp_path: Path) -> None:
    lines = table()
    path = tmp_path / "own.csv"
    if kind == "tsv":
        path = write(tmp_path / "own.TSV", [line.replace(",", "\t") for line in lines])
    elif kind == "semicolons":
        write(path, [line.replace(",", ";") for line in lines])
    elif kind == "byte order mark":
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    elif kind == "windows":
        path.write_bytes("\r\n".join(lines).encode())
    elif kind == "quoted":
        write(path, ['"' + line.replace(",", '","') + '"' for line in lines])
    else:
        write(path, lines)
    dataset = load(as_parquet(path) if kind == "parquet" else path)
    assert (dataset.num_classes, dataset.class_names) == (2, ("a", "b"))
    names = {dataset.client_name(client): client for client in range(5)}
    assert set(names) == {f"c{client}" for client in range(5)}
    data = dataset.client_data(names["c3"])
    assert (len(data.train_labels), len(data.test_labels)) == (8, 2)
    assert data.train_inputs.dtype == torch.float32
    assert sorted(examples(data)) == [(30 + row, -row, row % 2) for row in range(10)]


def test_the_order_of_the_rows_tells_nothing_of_the_clients(tmp_path: Path) -> None:
    """Rows of one client need not stand together."""
    lines = table()[1:]
    random.Random(0).shuffle(lines)
    one, other = load(write(tmp_path / "a.csv", table())), load(write(tmp_path / "b.csv", [HEADER, *lines]))
    assert [one.client_name(client) for client in range(5)] == [other.client_name(client) for client in range(5)]
    for client in range(5):
        assert sorted(examples(one.client_data(client))) == sorted(examples(other.client_data(client)))


def test_who_is_unseen_follows_from_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", table(20))

    def unseen(seed: int) -> set[str]:
        dataset = load(path, seed)
        return {dataset.client_name(client) for client in dataset.unseen_client_ids}

    assert unseen(0) == unseen(0)
    assert len({frozenset(unseen(seed)) for seed in range(4)}) > 1
    assert load(path, 0).fingerprint != load(path, 1).fingerprint
    few = load(path, num_clients=10)
    assert (len(few.train_client_ids), len(few.unseen_client_ids)) == (8, 2)


def test_it_is_read_once_and_again_when_it_or_the_reading_changes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "own.csv", table())
    before = load(path).fingerprint
    said = "own.csv: 50 rows of 5 clients (column 'client'), 2 features, 2 classes (column 'y')\n"
    assert capfd.readouterr().err == said
    assert (load(path).fingerprint, load(path).about) == (before, said.strip())
    assert load(path, label_column="weight", ignore_columns="y").num_classes == 10
    capfd.readouterr()
    assert load(path).fingerprint == before, "what is read in another way lies beside it"
    assert capfd.readouterr().err == ""
    write(path, table()[:-1])
    assert load(path).fingerprint != before


def test_columns_by_name_and_columns_left_out(tmp_path: Path) -> None:
    lines = ["id,writer,height,town,species", *(f"{row},w{row % 3},{row},York,{row % 2}" for row in range(12))]
    path = write(tmp_path / "own.csv", lines)
    dataset = load(path, client_column="writer", label_column="species", ignore_columns="id, town")
    assert dataset.client_data(0).train_inputs.shape[1:] == (1,)
    assert dataset.class_names == ("0", "1")
    assert "passed over: id, town" in dataset.about


def test_row_numbers_as_pandas_writes_them_are_no_feature(tmp_path: Path) -> None:
    lines = [f",{HEADER}", *(f"{row},{line}" for row, line in enumerate(table()[1:]))]
    dataset = load(write(tmp_path / "own.csv", lines))
    assert dataset.client_data(0).train_inputs.shape[1:] == (2,)
    assert "passed over: the column without a name" in dataset.about


def test_names_of_clients_are_as_written(tmp_path: Path) -> None:
    """007 and 7 are two clients; numbers stand in their order."""
    lines = ["user_id,x,y", *(f"{name},{row},{row % 2}" for name in ("10", "007", "7", "9") for row in range(4))]
    dataset = load(write(tmp_path / "own.csv", lines))
    assert {dataset.client_name(client) for client in range(4)} == {"007", "7", "9", "10"}


def test_labels_that_are_numbers_are_predicted(tmp_path: Path) -> None:
    lines = ["client,x,y", *(f"c{row % 4},{row},{2 * row + 0.5}" for row in range(40))]
    path = write(tmp_path / "own.csv", lines)
    dataset = load(path)
    data = dataset.client_data(0)
    assert (dataset.num_classes, dataset.class_names) == (1, None)
    assert data.train_labels.shape == (8, 1)
    assert torch.equal(data.train_labels, 2 * data.train_inputs + 0.5)
    assert dataset.loss_function(data.train_labels + 2, data.train_labels) == 4
    with pytest.raises(ValueError, match=r"column 'y' holds 0\.5 in row 1 below the header, which is no whole number"):
        load(path, labels="classes")


def test_whole_numbers_are_classes_unless_told_otherwise(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.csv", ["client,x,y", *(f"c{row % 4},{row},{(-1, 1, 30)[row % 3]}" for row in range(40))]
    )
    assert load(path).class_names == ("-1", "1", "30")
    assert load(path, labels="numbers").class_names is None
    many = write(tmp_path / "many.csv", ["client,x,y", *(f"c{row % 4},{row},{row}" for row in range(1200))])
    with pytest.raises(ValueError, match="column 'y' holds 1,200 different whole numbers; say whether"):
        load(many)
    assert load(many, labels="classes").num_classes == 1200


def test_standardized_by_the_training_clients_training_parts(tmp_path: Path) -> None:
    """Heights are of the order of 1e6; a unit of them must not decide how large a step is. Constants stay finite."""
    rng = np.random.default_rng(0)
    lines = [
        "client,height,constant,y",
        *(f"c{row % 10},{rng.normal(1e6, 1e5):.1f},7,{rng.normal(1e4, 1e3):.3f}" for row in range(400)),
    ]
    path = write(tmp_path / "own.csv", lines)
    plain, dataset = load(path), load(path, standardize=True)
    parts = [dataset.client_data(client) for client in dataset.train_client_ids]
    for values in (torch.cat([part.train_inputs[:, :1] for part in parts]), torch.cat([p.train_labels for p in parts])):
        assert values.mean().item() == pytest.approx(0, abs=1e-4)
        assert values.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert all((part.train_inputs[:, 1] == 0).all() for part in parts)
    unseen = dataset.unseen_client_ids[0]
    raw, scaled = plain.client_data(unseen).test_inputs[:, 0], dataset.client_data(unseen).test_inputs[:, 0]
    everyone = torch.cat([plain.client_data(client).train_inputs[:, 0] for client in plain.train_client_ids]).double()
    assert torch.allclose(scaled.double(), (raw.double() - everyone.mean()) / everyone.std(correction=0), atol=1e-5)
    assert dataset.note.startswith("labels are standardized")
    assert dataset.fingerprint != plain.fingerprint
    assert dataset.client_name(unseen) == plain.client_name(unseen)


def test_a_split_of_its_own_is_the_clients_split(tmp_path: Path) -> None:
    lines = [
        f"{HEADER},split",
        *(f"{line},{'test' if row % 10 < 3 else 'Train'}" for row, line in enumerate(table()[1:])),
    ]
    path = write(tmp_path / "own.csv", lines)
    dataset = load(path)
    for client in range(5):
        data = dataset.client_data(client)
        assert sorted(-weight for _, weight in data.test_inputs.tolist()) == [0, 1, 2]
        assert len(data.train_labels) == dataset.num_train_examples(client) == 7
    request = DatasetRequest(str(path), None, lambda _: 1, None, 0, "tail", UNTOLD)
    with pytest.raises(ValueError, match=r"--local_split tail has no meaning for own\.csv: its files hold a split"):
        load_federated_dataset(request, tmp_path)
    assert len(load(path, ignore_columns="split").client_data(0).train_labels) == 8


def test_examples_are_not_sorted_by_labels_that_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", ["client,a,y", *[f"c{row % 3},{row},{row + 0.5}" for row in range(30)]])
    request = DatasetRequest(str(path), None, lambda _: 1, None, 0, "tail", UNTOLD)
    with pytest.raises(ValueError, match=r"--local_split tail has no meaning for own\.csv: its labels are numbers"):
        load_federated_dataset(request, tmp_path)


def test_a_line_may_be_longer_than_what_is_read_at_a_time(tmp_path: Path) -> None:
    columns = 12_000
    lines = ["client,y," + ",".join(f"f{column}" for column in range(columns))]
    lines += [f"c{row % 2},{row % 3}," + ",".join(["0." + "1" * 98] * columns) for row in range(6)]
    assert len(lines[1]) > 2**20
    assert load(write(tmp_path / "own.csv", lines)).client_data(0).train_inputs.shape[1:] == (columns,)


def test_clients_too_small_are_left_out_and_counted(tmp_path: Path) -> None:
    dataset = load(write(tmp_path / "own.csv", [*table(), "lonely,1,2,a"]))
    assert dataset.num_left_out == 1
    assert len(dataset.train_client_ids) + len(dataset.unseen_client_ids) == 5


def test_a_file_of_that_name_in_the_data_root_is_found(tmp_path: Path) -> None:
    """As on another machine, which has it in another place."""
    (tmp_path / "root").mkdir()
    write(tmp_path / "root" / "own.csv", table())
    assert load(tmp_path / "own.csv").num_classes == 2


ONCE = ["c0,1,2,a", "c0,1,2,b"]
WRONG: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "no client": (["who,x,y", "c,1,a"], {}, "no column is called client, .* by --client_column; there are the columns"),
    "no label": (["client,x,z", "c,1,2"], {}, "name the one with the labels by --label_column"),
    "no such column": (table(), {"client_column": "writer"}, "--client_column writer is not there; there are"),
    "nothing of that name to leave out": (table(), {"ignore_columns": "no"}, "--ignore_columns no is not there"),
    "two that may be the client": (["client,user,x,y", "c,u,1,a"], {}, "'client' and 'user' may each be meant"),
    "one for two things": (table(), {"client_column": "y"}, "column 'y' is named for two things"),
    "used and left out": (
        table(),
        {"label_column": "y", "ignore_columns": "y"},
        "column 'y' is named for two things; name another, or leave a flag out",
    ),
    "two of one name": (["client,x,x,y", "c,1,2,a"], {}, "has two columns 'x'; rename one"),
    "text for a number": (
        [HEADER, *ONCE, "c1,tall,2,b"],
        {},
        "column 'height' holds text, 'tall' in row 3 below the header, .* leave the column out .--ignore_columns",
    ),
    "decimal comma": (["client;x;y", "c;1,5;a", "c;2,5;b"], {}, "'1,5' in row 1 .* write a decimal point"),
    "a missing number": ([HEADER, *ONCE, "c1,,2,b"], {}, "column 'height' has no value in row 3 below the header"),
    "NA": ([HEADER, *ONCE, "c1,NA,2,b"], {}, "column 'height' has no value in row 3"),
    "infinity": ([HEADER, *ONCE, "c1,inf,2,b"], {}, "column 'height' holds inf in row 3"),
    "too large": ([HEADER, *ONCE, "c1,1e300,2,b"], {}, "holds 1e.300 in row 3 .* too large for 32 bits"),
    "a missing client": ([HEADER, *ONCE, ",1,2,b"], {}, "column 'client' is empty in row 3"),
    "a missing label": ([HEADER, *ONCE, "c1,1,2,"], {}, "column 'y' is empty in row 3"),
    "a missing class number": (["client,x,y", "c,1,1", "c,1,"], {}, "column 'y' has no value in row 2"),
    "one class": (["client,x,y", "c,1,a", "c,1,a"], {}, "column 'y' holds nothing but 'a'; there must be two"),
    "text that is to be predicted": (table(), {"labels": "numbers"}, "column 'y' holds text, 'a' in row 1"),
    "an empty column": (["client,x,y", "c,,a", "c,,b"], {}, "column 'x' is empty; remove it"),
    "no rows": ([HEADER], {}, "has no rows"),
    "no features": (["client,y", "c,1"], {}, "has no column left for a feature"),
    "a row too short": ([HEADER, *ONCE, "c1,1"], {}, "is damaged or no CSV file .*Expected 4 columns, got 2"),
    "an empty first line": (["", HEADER, *ONCE], {}, "its first line is empty"),
    "a split by client": (
        [f"{HEADER},split", "a,1,2,a,train", "a,1,2,b,train", "b,1,2,a,test", "b,1,2,b,test"],
        {},
        "puts each client into one part as a whole; .*--ignore_columns split",
    ),
    "another split": ([f"{HEADER},split", "a,1,2,a,train", "a,1,2,b,val"], {}, "'split' holds 'val' in row 2"),
    "dates": (["client,x,y", "c,2020-01-01,a", "c,2020-01-02,b"], {}, "column 'x' is of the type date32"),
    "one client": (["client,x,y", "c,1,a", "c,2,b"], {}, "leaves 0 of 1 clients of own.csv to train"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_one_line_with_the_file_and_the_place(kind: str, tmp_path: Path) -> None:
    lines, how, reason = WRONG[kind]
    with pytest.raises(ValueError, match=reason) as refusal:
        load(write(tmp_path / "own.csv", lines), **how)
    assert "own.csv" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    if kind != "one client":
        assert not list((tmp_path / ".perfedavg-cache").glob("own*")), "nothing half-cached"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("client,x,y\nä,1,a\n".encode("latin-1") * 3, "is no text in UTF-8 .* save it as CSV in UTF-8"),
        ("client,x,y\na,1,a\n".encode("utf-16"), "is no text in UTF-8"),
        (b"client,x,y\0\n", "is no text in UTF-8"),
        (b"", "its first line is empty"),
        (b'client,x,y\n"c,1,a\n', "damaged|nothing but|has no rows|Expected"),
    ],
)
def test_bytes_that_are_no_table(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_bytes(content)
    with pytest.raises(ValueError, match=reason) as refusal:
        load(tmp_path / "own.csv")
    assert "\n" not in str(refusal.value)


Column = Callable[[], pa.Array]
COLUMNS: dict[str, tuple[Any, str]] = {
    "lists": (pa.array([[1.0], [2.0]] * 4), "is of the type list<"),
    "bytes": (pa.array([b"1", b"2"] * 4), "is of the type binary"),
    "text": (pa.array(["1.5", "x"] * 4), "holds text, 'x' in row 1"),
    "a missing number": (pa.array([1, None] * 4), "column 'x' has no value in row 1"),
    "nothing": (pa.nulls(8), "column 'x' is empty"),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_parquet_that_are_no_features(kind: str, tmp_path: Path) -> None:
    column, reason = COLUMNS[kind]
    own = pa.table({"client": ["a", "b"] * 4, "x": column, "y": [0, 0, 1, 1] * 2})
    pq.write_table(own, tmp_path / "own.parquet")
    with pytest.raises(ValueError, match=reason):
        load(tmp_path / "own.parquet")


def test_kinds_of_columns_that_parquet_has(tmp_path: Path) -> None:
    numbers = {
        "a": pa.array(range(8), pa.uint8()),
        "b": pa.array([True, False] * 4),
        "c": pa.array([float(row) for row in range(8)], pa.float16()),
        "d": pa.array(range(8)).cast(pa.decimal128(30, 2)),
    }
    texts = pa.array(["one", "two"] * 4).dictionary_encode()
    own = pa.table({"client": pa.array([3, 3, 3, 3, 20, 20, 20, 20]), **numbers, "y": texts})
    pq.write_table(own, tmp_path / "own.parquet")
    dataset = load(tmp_path / "own.parquet")
    assert dataset.class_names == ("one", "two")
    assert {dataset.client_name(0), dataset.client_name(1)} == {"3", "20"}
    first = dataset.client_data(0 if dataset.client_name(0) == "3" else 1)
    assert sorted(examples(first)) == [(row, 1 - row % 2, row, row, row % 2) for row in range(4)]


def refusal_of(path: Path) -> str | None:
    try:
        load(path)
    except ValueError as error:
        return str(error)
    return None


def test_damaged_parquet_is_one_line(tmp_path: Path) -> None:
    """Whatever byte is turned: a refusal of one line, or data, and never another error."""
    content = io.BytesIO()
    pq.write_table(pa.table({"client": ["a", "b"] * 8, "x": list(range(16)), "y": [0, 0, 1, 1] * 4}), content)
    rng = random.Random(0)
    for _ in range(40):
        damaged = bytearray(content.getvalue())
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "own.parquet").write_bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))])
        refusal = refusal_of(tmp_path / "own.parquet")
        assert refusal is None or ("own.parquet" in refusal and "\n" not in refusal)


def test_more_than_the_machine_holds_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_parquet(write(tmp_path / "own.csv", table()))
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 100))
    with pytest.raises(ValueError, match=r"more than the .* GiB of this machine"):
        load(path)


def test_settings_of_tables_have_no_meaning_elsewhere(tmp_path: Path) -> None:
    request = DatasetRequest("digits", 20, lambda count: count // 5, None, 0)
    for name, value, said in (("client_column", "a", "a"), ("standardize", False, "false"), ("image_size", "32", "32")):
        kind = "folder of images" if name == "image_size" else "table or .npz file"
        with pytest.raises(ValueError, match=f"--{name} {said} has no meaning for digits, which is no {kind}"):
            load_federated_dataset(replace(request, own_files=OwnFiles(**{name: value})), tmp_path)
    with pytest.raises(ValueError, match=r"--image_color rgb has no meaning for own\.csv"):
        load(write(tmp_path / "own.csv", table()), image_color="rgb")


def test_a_path_means_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("own.csv", "./own.csv", str(tmp_path / "own.csv")):
        assert utils.get_args("single", ["--dataset", text]).experiment.dataset == str(tmp_path / "own.csv")
    assert utils.get_args("single", ["--dataset", "images/"]).experiment.dataset == str(tmp_path / "images")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"--dataset photos is no data set; to read the folder here, name its path"):
        utils.get_args("single", ["--dataset", "photos"])
    with pytest.raises(ValueError, match=r"ends in \.csv, \.tsv, \.parquet, \.npz, or package\.module:factory"):
        utils.get_args("single", ["--dataset", "own.xlsx"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.csv", "is not there, nor is none.csv in --data_root"),
        ("./none", "is not there"),
        ("a.csv", "is a folder"),
    ],
)
def test_a_path_that_leads_to_nothing(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(ValueError, match=reason):
        load(tmp_path / name)
    (tmp_path / "own.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match="neither a folder of images nor a file that ends in"):
        load(tmp_path / "own.xlsx")


def test_it_is_described(tmp_path: Path) -> None:
    text = describe("own.csv", load(write(tmp_path / "own.csv", table()))).text()
    assert text.startswith("own.csv: 50 rows of 5 clients (column 'client'), 2 features, 2 classes (column 'y')\n")
    assert "own.csv: 5 clients, 4 train and 1 are unseen; 2 classes" in text
