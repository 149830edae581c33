"""Downloads from a server in this process: mirrors, retries, checksums, clean restarts, archives that climb out."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import re
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import pytest
import requests
from helpers import MNIST_PREFIXES, import_torchvision, write_image_files

from datasets.sources import download, plays
from datasets.sources.mnist_family import SOURCES, Publication, load_images
from perfedavg.contracts import MissingDataError
from utils import get_args, get_datasets

EMNIST_SPLITS = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
MNIST_FILES = [f"{prefix}-{kind}-ubyte.gz" for prefix in MNIST_PREFIXES for kind in ("images-idx3", "labels-idx1")]


class Mirror:
    """Serves `files`, by path, the way that `fault` says: "", "truncated", "altered", "unavailable" or "silent"."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fault = ""
        self.requests: list[str] = []
        self.closing = threading.Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                with contextlib.suppress(ConnectionError):  # a client that gave up
                    mirror.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = self.files[handler.path.lstrip("/")]
        handler.send_response(503 if self.fault == "unavailable" else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if self.fault in ("truncated", "silent"):
            handler.wfile.write(body[: len(body) // 2])
            if self.fault == "silent":
                self.closing.wait()
        else:
            handler.wfile.write(b"?" * len(body) if self.fault == "altered" else body)

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """The only mirror of every data set."""
    monkeypatch.setenv("no_proxy", "*")
    mirror = Mirror()
    publish(monkeypatch, "MNIST", mirrors=(mirror.url,))
    publish(monkeypatch, "FashionMNIST", mirrors=(mirror.url,))
    publish(monkeypatch, "EMNIST", mirrors=(mirror.url,))
    yield mirror
    mirror.close()


def publish(monkeypatch: pytest.MonkeyPatch, folder: str, **changes: Any) -> None:
    """Let the data sets of a publication be downloaded from elsewhere."""
    for name, source in SOURCES.items():
        if source.publication.folder == folder:
            changed: Publication = replace(source.publication, **changes)
            monkeypatch.setitem(SOURCES, name, replace(source, publication=changed))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for; none is made."""
    made: list[float] = []
    monkeypatch.setattr(download, "sleep", made.append)
    return made


@pytest.fixture
def mnist(mirror: Mirror, pauses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MNIST and Fashion-MNIST on the mirror. Returns an empty data root."""
    made = tmp_path / "made"
    write_image_files(made, MNIST_PREFIXES, (30, 20), num_classes=10)
    mirror.files = {file: gzip.compress((made / file.removesuffix(".gz")).read_bytes()) for file in MNIST_FILES}
    for folder in ("MNIST", "FashionMNIST"):
        publish(monkeypatch, folder, archives={file: md5(mirror.files[file]) for file in MNIST_FILES})
    return tmp_path / "data"


@pytest.fixture
def serve_emnist(mirror: Mirror, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def serve(archive: bytes) -> None:
        mirror.files["gzip.zip"] = archive
        publish(monkeypatch, "EMNIST", archives={"gzip.zip": md5(archive)})

    return serve


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def zip_of(members: dict[str | zipfile.ZipInfo, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return content.getvalue()


def emnist_members(folder: Path) -> dict[str | zipfile.ZipInfo, bytes]:
    """The archive's members, for all of EMNIST's splits; labels are 1 to 10."""
    for split in EMNIST_SPLITS:
        write_image_files(folder, (f"emnist-{split}-train", f"emnist-{split}-test"), (30, 20), num_classes=10)
    members: dict[str | zipfile.ZipInfo, bytes] = {"gzip/": b""}
    for file in sorted(folder.iterdir()):
        content = bytearray(file.read_bytes())
        if "labels" in file.name:
            content[8:] = bytes(byte + 1 for byte in content[8:])
        members[f"gzip/{file.name}.gz"] = gzip.compress(bytes(content))
    return members


def closed_port() -> str:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def assert_nothing_left(data_root: Path) -> None:
    assert [path.name for path in data_root.iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_a_download_leaves_the_unpacked_files_alone(
    name: str, mnist: Path, mirror: Mirror, capfd: pytest.CaptureFixture[str]
) -> None:
    splits = load_images(name, mnist)
    assert splits.train_labels.tolist() == [index % 10 for index in range(30)]
    raw = SOURCES[name].raw(mnist)
    assert sorted(path.name for path in raw.iterdir()) == sorted(file.removesuffix(".gz") for file in MNIST_FILES)
    for file in MNIST_FILES:
        assert (raw / file.removesuffix(".gz")).read_bytes() == gzip.decompress(mirror.files[file])
    output, errors = capfd.readouterr()
    assert (output, errors) == ("", f"downloading {name} to {mnist}\n"), "no progress bar outside of a terminal"
    mirror.close()
    assert np.array_equal(load_images(name, mnist).test_images, splits.test_images), "no second download"


def test_the_progress_bar_goes_to_a_terminal(
    mnist: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        load_images("mnist", mnist)
    assert "100%" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_one_emnist_archive_serves_all_splits(
    serve_emnist: Callable[[bytes], None], mirror: Mirror, tmp_path: Path
) -> None:
    serve_emnist(zip_of(emnist_members(tmp_path / "made")))
    splits = load_images("emnist_letters", tmp_path / "data")
    assert splits.train_labels.tolist() == [index % 10 for index in range(30)]
    num_requests = len(mirror.requests)
    for name in ("emnist", "emnist_balanced"):
        assert len(load_images(name, tmp_path / "data").test_images) == 20
    assert len(mirror.requests) == num_requests, "the other splits came with the first"
    raw = tmp_path / "data" / "EMNIST" / "raw"
    assert len(list(raw.iterdir())) == 4 * len(EMNIST_SPLITS), "no archive is kept"
    import_torchvision()
    from torchvision.datasets import EMNIST

    letters = EMNIST(str(tmp_path / "data"), split="letters")
    assert len(letters.data) == 30, "torchvision takes the folder for its own"


def test_the_second_mirror_stands_in_for_the_first(
    mnist: Path, mirror: Mirror, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, "MNIST", mirrors=(closed_port(), mirror.url))
    assert len(load_images("mnist", mnist).train_labels) == 30
    assert pauses == []


def test_a_silent_mirror_is_given_up(mnist: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.fault = "silent"
    second = Mirror()
    second.files = mirror.files
    publish(monkeypatch, "MNIST", mirrors=(mirror.url, second.url))
    get = requests.get

    def get_or_give_up_soon(url: str, timeout: float, **how: Any) -> requests.Response:
        """The other mirror, on a busy machine, may take its time."""
        assert timeout == download.SILENCE_SECONDS
        return get(url, timeout=0.1 if url.startswith(mirror.url) else timeout, **how)

    monkeypatch.setattr(requests, "get", get_or_give_up_soon)
    try:
        assert len(load_images("mnist", mnist).train_labels) == 30
    finally:
        second.close()


@pytest.mark.parametrize("fault", ["truncated", "altered", "unavailable"])
def test_a_broken_transfer_is_tried_again(
    fault: str, mnist: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def repair(_: float) -> None:
        mirror.fault = ""

    mirror.fault = fault
    monkeypatch.setattr(download, "sleep", repair)
    splits = load_images("mnist", mnist)
    assert splits.test_labels.tolist() == [index % 10 for index in range(20)]
    retries = [line for line in capfd.readouterr().err.splitlines() if line.endswith("; trying again in 1 s")]
    assert len(retries) == 1


@pytest.mark.parametrize("fault", ["truncated", "altered", "unavailable"])
def test_after_a_download_that_failed_the_next_one_starts_clean(
    fault: str, mnist: Path, mirror: Mirror, pauses: list[float]
) -> None:
    mirror.fault = fault
    with pytest.raises(ValueError, match=r"mnist is not in .* could not be downloaded") as refusal:
        load_images("mnist", mnist)
    assert "\n" not in str(refusal.value)
    assert f"{mirror.url}{MNIST_FILES[0]}: " in str(refusal.value)
    assert pauses == [1, 2, 4]
    assert_nothing_left(mnist)
    mirror.fault = ""
    assert len(load_images("mnist", mnist).train_labels) == 30


def test_what_a_killed_download_left_is_not_taken_for_data(mnist: Path) -> None:
    left = mnist / ".MNIST-incoming" / "raw"
    write_image_files(left, MNIST_PREFIXES, (5, 5), num_classes=5)
    assert len(load_images("mnist", mnist).train_labels) == 30
    assert not left.exists()


def test_a_data_root_that_cannot_be_written(
    mnist: Path,
    mirror: Mirror,
    make_read_only: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    mnist.mkdir()
    make_read_only(mnist)
    assert len(load_images("mnist", mnist).train_labels) == 30
    assert f"--dataset mnist cannot be written to {mnist} (Read-only file system); {tmp_path / 'xdg'}" in (
        capfd.readouterr().err
    )
    mirror.close()
    assert len(load_images("mnist", mnist).train_labels) == 30, "it is found there the next time"


def test_a_download_adds_to_a_folder_what_it_lacks(serve_emnist: Callable[[bytes], None], tmp_path: Path) -> None:
    """All EMNIST data sets share a folder, in which somebody may have put the files of one."""
    serve_emnist(zip_of(emnist_members(tmp_path / "made")))
    raw = tmp_path / "data" / "EMNIST" / "raw"
    write_image_files(raw, ("emnist-byclass-train", "emnist-byclass-test"), (7, 5), num_classes=5)
    assert len(load_images("emnist_letters", tmp_path / "data").train_labels) == 30
    assert len(load_images("emnist", tmp_path / "data").train_labels) == 7, "what was there stays"


def test_other_files_in_the_folder_survive(mnist: Path) -> None:
    (mnist / "MNIST").mkdir(parents=True)
    (mnist / "MNIST" / "notes.txt").write_text("mine")
    load_images("mnist", mnist)
    assert (mnist / "MNIST" / "notes.txt").read_text() == "mine"


def test_many_at_once_download_once(mnist: Path, mirror: Mirror) -> None:
    load_images("fashion_mnist", mnist)
    once = len(mirror.requests)
    mirror.requests.clear()
    barrier = threading.Barrier(4)

    def load(_: int) -> int:
        barrier.wait()
        return len(load_images("mnist", mnist).train_labels)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(load, range(4))) == [30] * 4
    assert len(mirror.requests) == once


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    "member",
    [
        "../climbed",
        "gzip/../../climbed.gz",
        "gzip/emnist-../../../climbed.gz",
        "..\\climbed",
        "/tmp/climbed",
        "C:/climbed",
        link("gzip/climbed"),
    ],
    ids=str,
)
def test_only_the_files_of_an_archive_are_unpacked(
    member: Any, serve_emnist: Callable[[bytes], None], tmp_path: Path
) -> None:
    """Members that lead out of the folder, and links, are passed over."""
    before = set(Path("/tmp").glob("climbed*"))
    serve_emnist(zip_of({**emnist_members(tmp_path / "made"), member: gzip.compress(b"/etc")}))
    assert len(load_images("emnist", tmp_path / "data").train_labels) == 30
    raw = tmp_path / "data" / "EMNIST" / "raw"
    assert len(list(raw.iterdir())) == 4 * len(EMNIST_SPLITS)
    assert not [*tmp_path.rglob("climbed*"), *(set(Path("/tmp").glob("climbed*")) - before)]


@pytest.mark.parametrize("damage", ["no zip", "short gzip"])
def test_an_archive_that_cannot_be_unpacked(damage: str, serve_emnist: Callable[[bytes], None], tmp_path: Path) -> None:
    members = emnist_members(tmp_path / "made")
    members["gzip/emnist-mnist-test-images-idx3-ubyte.gz"] = members["gzip/emnist-mnist-test-images-idx3-ubyte.gz"][:99]
    serve_emnist(b"<html>" if damage == "no zip" else zip_of(members))
    with pytest.raises(ValueError, match=r"emnist is not in .* could not be downloaded"):
        load_images("emnist", tmp_path / "data")
    assert_nothing_left(tmp_path / "data")


def test_addresses_and_checksums_are_those_that_torchvision_knows() -> None:
    """It lists them independently of this project."""
    import_torchvision()
    from torchvision.datasets import EMNIST, MNIST, FashionMNIST

    for name, known in (("mnist", MNIST), ("fashion_mnist", FashionMNIST)):
        publication = SOURCES[name].publication
        assert list(publication.archives.items()) == known.resources
        assert list(publication.mirrors) == known.mirrors
    emnist = SOURCES["emnist"].publication
    assert (f"{emnist.mirrors[0]}gzip.zip", emnist.archives["gzip.zip"]) == (EMNIST.url, EMNIST.md5)


@pytest.mark.parametrize("dataset", ["mnist", "plays"])
def test_whoever_only_looks_whether_data_are_there_downloads_none(
    dataset: str, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = get_args("cluster", ["--dataset", dataset]).experiment
    with pytest.raises(MissingDataError, match=f"{dataset} is not in {re.escape(str(tmp_path))}"):
        get_datasets(config, tmp_path / "data", may_download=False)
    assert not mirror.requests
    assert list(tmp_path.iterdir()) == []


def test_plays_are_downloaded_once_and_checked(
    mirror: Mirror,
    pauses: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whole or not at all: what an interrupted download or a damaged file leaves is never taken for the plays."""
    speech = "So shaken as we are, so wan with care, find we a time.\n" * 20
    text = f"ACT I.\n\nKING.\n{speech}\nFOOL.\n{speech}".encode()
    monkeypatch.setattr(plays, "MIRRORS", (mirror.url,))
    monkeypatch.setattr(plays, "FILES", {name: md5(text) for name in ("hamlet_gut.txt", "lear_gut.txt")})
    mirror.files = dict.fromkeys(plays.FILES, text)
    mirror.fault = "altered"
    with pytest.raises(ValueError, match=r"plays is not in .* and could not be downloaded"):
        plays.load_plays(tmp_path)
    assert not (tmp_path / "plays").exists()
    mirror.fault = ""
    clients = plays.load_plays(tmp_path)
    assert clients.names == ["hamlet:KING", "hamlet:FOOL", "lear:KING", "lear:FOOL"]
    assert sorted(path.name for path in (tmp_path / "plays").iterdir()) == sorted(plays.FILES)
    assert not [path for path in tmp_path.iterdir() if "incoming" in path.name]
    assert "downloading plays to" in capfd.readouterr().err
    mirror.requests.clear()
    plays.load_plays(tmp_path)
    assert not mirror.requests
