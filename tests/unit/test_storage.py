"""Data that lie where nothing can be written: a finished cache there is used, a new one is built elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from datasets.clients.stored import NamedClient, NewClients, StoredClients, stored_clients
from datasets.storage import user_cache_folder

ReadOnly = Callable[[Path], None]


@pytest.fixture
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "personalized-fedavg"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with one file."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").write_text("content")
    return tmp_path / "root"


def client(grey: int) -> NamedClient:
    images = np.full((2, 28, 28), grey, dtype=np.uint8)
    images[:, 0, 0] = 255
    return NamedClient("one", images, np.array([0, 1]))


def load(root: Path, grey: int = 7) -> StoredClients:
    """The client of a data root, from its cache or else with images of that grey."""
    return stored(root, [client(grey)])


def stored(root: Path, clients: Iterable[NamedClient]) -> StoredClients:
    return stored_clients(root / "cache", "some", [root / "file"], lambda: NewClients(clients, "ab"))


def not_read() -> Iterator[NamedClient]:
    raise AssertionError("the files were read again")
    yield


def grey_of(clients: StoredClients) -> int:
    return int(clients.examples(0)[0].min())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_finished_cache_beside_the_data_is_used(root: Path, user_cache: Path, make_read_only: ReadOnly) -> None:
    load(root)
    make_read_only(root)
    again = stored(root, not_read())
    assert grey_of(again) == 7
    assert not user_cache.exists()


def test_else_it_is_built_in_the_users_cache_folder_which_is_said(
    root: Path, user_cache: Path, make_read_only: ReadOnly, capfd: pytest.CaptureFixture[str]
) -> None:
    make_read_only(root)
    assert grey_of(load(root)) == 7
    (place,) = user_cache.iterdir()
    said = capfd.readouterr().err
    expected = f"the cache of --dataset some cannot be written to {root / 'cache'} (Read-only file system); {place} is"
    assert expected in said
    assert grey_of(stored(root, not_read())) == 7
    assert capfd.readouterr().err == "", "what is built already need not be said"


def test_data_roots_do_not_share_a_place_and_changed_files_are_read_anew(
    root: Path, user_cache: Path, make_read_only: ReadOnly, tmp_path: Path
) -> None:
    """The same names, sizes and times, as copies have them, and other content."""
    other = tmp_path / "other"
    shutil.copytree(root, other)
    for folder in (root, other):
        make_read_only(folder)
    assert [grey_of(load(folder, grey)) for folder, grey in ((root, 1), (other, 2), (root, 3))] == [1, 2, 1]
    assert len(names(user_cache)) == 2
    third = tmp_path / "third"
    third.mkdir()
    (third / "file").write_text("before")
    stands_in = tmp_path / "third" / "cache"
    stands_in.write_text("a file in the way of the folder")
    assert grey_of(load(third, 4)) == 4
    (third / "file").write_text("after it was changed")
    assert grey_of(load(third, 5)) == 5
    (place,) = (path for path in user_cache.iterdir() if path.name.startswith("third"))
    assert len(names(place)) == 1, "the outdated cache is gone"


def test_a_finished_cache_is_known_wherever_the_data_are_mounted(root: Path, tmp_path: Path) -> None:
    """As in a container that sees the host's folder under another path."""
    load(root)
    root.rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere"
    assert grey_of(stored(moved, not_read())) == 7


@pytest.mark.parametrize("damage", ["cut", "missing", "no meta"])
def test_a_cache_that_is_not_whole_is_built_anew(damage: str, root: Path) -> None:
    load(root)
    (folder,) = (root / "cache").glob("some-*")
    if damage == "cut":
        (folder / "inputs").write_bytes((folder / "inputs").read_bytes()[:-1])
    elif damage == "missing":
        (folder / "labels").unlink()
    else:
        (folder / "meta.json").write_text("")
    assert grey_of(load(root, 9)) == 9


def test_a_cache_that_cannot_be_read(root: Path, user_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another user, say. Permissions do not bind root, so the refusal is made up."""
    load(root)
    is_dir = Path.is_dir

    def refuse(path: Path) -> bool:
        if path.parent == root / "cache":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    (root / "cache").rename(root / "old")
    (root / "cache").write_text("in the way")
    assert grey_of(load(root, 8)) == 8
    assert user_cache.exists()


def test_nowhere_to_write(
    root: Path, tmp_path: Path, make_read_only: ReadOnly, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for folder in (root, tmp_path / "home"):
        make_read_only(folder)
    with pytest.raises(OSError, match=r"root/cache \(Read-only file system\) or to .*home.*XDG_CACHE_HOME") as refusal:
        load(root)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("value", "expected"), [("", ".cache"), ("relative", ".cache"), ("{home}/x", "x")])
def test_the_users_cache_folder(value: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value.format(home=tmp_path))
    assert user_cache_folder() == tmp_path / expected / "personalized-fedavg"


def test_clients_whose_images_are_all_blank_are_pointed_out(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One blank image among others is nobody's mistake; nothing but blank ones may be."""
    blank = np.stack([np.full((28, 28), grey, dtype=np.uint8) for grey in (0, 255)])
    drawn = blank.copy()
    drawn[1, 3, 3] = 0
    clients = [
        NamedClient("blank", blank, np.array([0, 1])),
        NamedClient("drawn", drawn, np.array([0, 1])),
    ]
    for _ in range(2):  # also when they come from the cache
        stored(root, clients)
        said = capfd.readouterr().err
        assert "some: each image of 1 client(s), such as blank, has one and the same grey all over" in said
