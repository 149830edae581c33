"""Where files that are made from data are kept: beside the data or, where nothing can be written there, in the user's
cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock


def user_cache_folder() -> Path:
    """`personalized-fedavg` in XDG_CACHE_HOME or, where that is not set to an absolute path, in ~/.cache.

    Raises OSError where there is neither that nor a home folder.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if configured.is_absolute():
        return configured / "personalized-fedavg"
    try:
        return Path.home() / ".cache" / "personalized-fedavg"
    except RuntimeError as error:
        raise OSError("there is no home folder for a cache; name a folder in XDG_CACHE_HOME") from error


def places_for(folder: Path) -> list[Path]:
    """A folder beside the data, and the one in the user's cache folder that stands in for it, in order of preference.

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
    """The first of the folders that can be written, created, which no other process has under that name meanwhile.

    name: of the lock, a file `.<name>.lock` in the folder.  what: is written, for what is said where the first of the
    folders will not do. Raises OSError, with the reason and the fix, where none will.
    """
    refusals: list[str] = []
    for place in places:
        try:
            lock = _lock(place, name)
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


def tell(line: str) -> None:
    """A line on standard error. A terminal that is gone does not matter."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def _lock(folder: Path, name: str) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # a lock that is there already says nothing of the folder
        pass
    lock = FileLock(folder / f".{name}.lock")
    lock.acquire()
    return lock
