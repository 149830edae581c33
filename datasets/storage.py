"""Where files made from data are kept: beside the data or, where nothing can be written there, in the user's cache."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

LOGGER = logging.getLogger("perfedavg.datasets")

T = TypeVar("T")


def tell(line: str) -> None:
    """A line on standard error, also into the run's log. A terminal that is gone does not matter."""
    LOGGER.info("%s", line)
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def user_cache_folder() -> Path:
    """`personalized-fedavg` in XDG_CACHE_HOME or, where that is not set to an absolute path, in ~/.cache.

    Raises OSError where there is neither that nor a home folder.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        parent = configured if configured.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError("there is no home folder for a cache; name a folder in XDG_CACHE_HOME") from error
    return parent / "personalized-fedavg"


def places_for(folder: Path) -> list[Path]:
    """A folder beside the data, and its stand-in in the user's cache, in order of preference.

    Two folders never share a stand-in.
    """
    resolved = folder.resolve()
    digest = hashlib.blake2b(os.fsencode(resolved), digest_size=8).hexdigest()
    places = [folder]
    with contextlib.suppress(OSError):
        places.append(user_cache_folder() / f"{resolved.parent.name}-{resolved.name}-{digest}")
    return places


@contextlib.contextmanager
def locked_place(places: Sequence[Path], name: str, what: str) -> Iterator[Path]:
    """The first folder that can be written, created if need be, and locked against other processes.

    name: of the lock, a file `.<name>.lock` in the folder.  what: is written, for messages.
    Raises OSError, with the reason and the fix, where no folder can be written.
    """
    refusals: list[str] = []
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):  # a lock that is there already says nothing of the folder
                pass
            lock = FileLock(place / f".{name}.lock")
            lock.acquire()
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            refusals.append(f"{place} ({getattr(error, 'strerror', None) or error})")
            continue
        try:
            if refusals:
                tell(f"{what} cannot be written to {refusals[0]}; {place} is used instead")
            yield place
        finally:
            lock.release()
        return
    raise OSError(
        f"{what} cannot be written to {' or to '.join(refusals)}; make room there, or name a folder that can be "
        "written in XDG_CACHE_HOME"
    )


def built_once(
    cache: Path,
    name: str,
    sources: Iterable[Path],
    build: Callable[[Path], None],
    open_built: Callable[[Path], T],
    version: int = 1,
) -> T:
    """The content of a folder that is built from files once, and built anew when the files change.

    cache: holds such folders, beside the data. Where it cannot be written, a finished folder in it is used all the
        same, and a new one is built in the user's cache.
    name: of the data set; begins the folder's name. Folders of that name from other files are removed.
    sources: the files; another name, size or time of one means another folder.
    build: fills an empty folder. Where it raises, no folder is left behind.
    open_built: reads a folder; raises OSError, ValueError or KeyError where it is incomplete and has to be built anew.
    version: to be raised when `build` writes other files.
    Raises OSError where nothing can be written anywhere.
    """
    folder = f"{name}-{_sources_digest(sources, cache.parent, version)}"
    places = places_for(cache)
    found = _open_first(places, folder, open_built)
    if found is None:
        with locked_place(places, name, f"the cache of --dataset {name}") as place:
            found = _open_first(places, folder, open_built)  # another process may have been faster
            if found is None:
                _build(place, name, folder, build)
                found = open_built(place / folder)
    return found


def _open_first(places: Sequence[Path], folder: str, open_built: Callable[[Path], T]) -> T | None:
    for place in places:
        # not to be read, or incomplete, as after a copy that was cut short
        with contextlib.suppress(OSError, ValueError, KeyError):
            if (place / folder).is_dir():
                return open_built(place / folder)
    return None


def _build(place: Path, name: str, folder: str, build: Callable[[Path], None]) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=place) as building:
            finished = Path(building) / "finished"
            finished.mkdir()
            build(finished)
            for old in place.glob(f"{glob.escape(name)}-*"):
                shutil.rmtree(old)
            os.replace(finished, place / folder)
    except OSError as error:
        raise OSError(
            f"the cache of --dataset {name} cannot be written to {place} ({error.strerror}); make room there"
        ) from error


def _sources_digest(sources: Iterable[Path], root: Path, version: int) -> str:
    """Names count from the root, which another machine or a container may mount elsewhere."""
    digest = hashlib.blake2b(f"version {version}".encode(), digest_size=8)
    for path in sorted(sources):
        status = path.stat()
        digest.update(os.fsencode(f"{os.path.relpath(path, root)} {status.st_size} {status.st_mtime_ns}"))
    return digest.hexdigest()
