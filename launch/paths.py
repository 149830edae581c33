"""The project's root; and the paths that users name, which every entry point reads in the same way.

The functions raise ValueError with what is wrong, to be read behind the path. A path becomes absolute, so that it means
the same wherever it is printed, kept or used; `~` is the home folder also where the shell left it.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_DATA_ROOT = ROOT / "datasets" / "data"


def path(text: str) -> Path:
    """A file or a folder, which need not be there. Raises ValueError where nothing can be, now or later."""
    if not text.strip() or "\0" in text:
        raise ValueError("is no path; name a file or a folder")
    try:
        named = Path(os.path.expanduser(text)).absolute()
    except FileNotFoundError as error:
        raise ValueError("is relative to the current folder, which has been removed; name it from the root") from error
    try:
        named.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        if named.is_symlink():
            target = os.readlink(named)
            raise ValueError(
                f"is a link to {target!r}, which is not there; mend the link, or name another path"
            ) from error
    except OSError as error:
        raise ValueError(f"cannot be used ({error.strerror}); name another path") from error
    return named


def folder(text: str) -> Path:
    """As `path`, of a folder."""
    named = path(text)
    if named.exists() and not named.is_dir():
        raise ValueError("is a file; name a folder")
    return named


def file(text: str) -> Path:
    """As `path`, of a file."""
    named = path(text)
    if named.is_dir():
        raise ValueError("is a folder; name a file")
    return named


def shown(named: Path) -> Path:
    """As a person would type it here: relative to the current folder, where it lies in it."""
    return named.relative_to(Path.cwd()) if named.is_relative_to(Path.cwd()) else named
