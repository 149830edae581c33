"""Pictures, drawn by matplotlib as its makers ship it, whatever settings, files and folders the user has for it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VARIABLES = ("MPLBACKEND", "MATPLOTLIBRC", "MPLCONFIGDIR")
"""By which a user's settings reach matplotlib."""


def png(draw: Callable[[], Figure], dots_per_inch: int, settings: Mapping[str, Any] | None = None) -> bytes:
    """The content of a PNG file. Any thread may draw: the figure belongs to no window and no global state.

    draw: makes the figure; matplotlib is imported before, which takes half a second.
    settings: matplotlib's rcParams that differ from its own defaults.
    Raises whatever matplotlib fails with.
    """
    image = io.BytesIO()
    with _quiet(), _own_variables():
        with _own_folder():
            import matplotlib
            import matplotlib.backends.backend_agg  # which draws PNG files, whatever the backend
        defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
        with matplotlib.rc_context({**defaults, **(settings or {})}):
            draw().savefig(image, format="png", dpi=dots_per_inch)
    return image.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without matplotlib's warnings, which are about the settings and folders that are passed over."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _own_variables() -> Iterator[None]:
    """Without the user's variables, and with a folder for the list of fonts: where the user's programs keep theirs, or
    where that cannot be written one for the moment.
    """
    folder = _users_cache_folder()
    users = {name: os.environ.pop(name) for name in _VARIABLES if name in os.environ}
    with contextlib.ExitStack() as stack:
        if folder is None:
            made = tempfile.TemporaryDirectory(prefix="matplotlib-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
        os.environ["MPLCONFIGDIR"] = str(folder)
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]
            os.environ.update(users)


def _users_cache_folder() -> Path | None:
    try:
        named, cache = os.environ.get("MPLCONFIGDIR"), os.environ.get("XDG_CACHE_HOME")
        folder = (Path(named) if named else Path(cache or Path.home() / ".cache") / "matplotlib").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return folder if os.access(folder, os.W_OK | os.X_OK) else None
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None


@contextlib.contextmanager
def _own_folder() -> Iterator[None]:
    """Let matplotlib be imported in its own folder: it reads matplotlibrc of the current one before any other file.

    This project's threads, of which there may be others, name files from the root.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ImportError("matplotlib is not installed")
    here = None
    with contextlib.suppress(OSError):  # it may be entered, but not read, or has been removed
        here = os.open(".", os.O_PATH | os.O_DIRECTORY)
    try:
        os.chdir(Path(spec.origin).parent / "mpl-data")
        yield
    finally:
        if here is not None:
            os.fchdir(here)
            os.close(here)
