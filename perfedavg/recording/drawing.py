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

_VARIABLES = ("MPLBACKEND", "MATPLOTLIBRC")
"""By which a user's settings reach matplotlib when it is imported."""


def png(draw: Callable[[], Figure], dots_per_inch: int, settings: Mapping[str, Any] | None = None) -> bytes:
    """The content of a PNG file. Any thread may draw: the figure belongs to no window and no global state.

    draw: makes the figure; matplotlib is imported before, which takes half a second.
    settings: matplotlib's rcParams that differ from its own defaults.
    Raises whatever matplotlib fails with.
    """
    image = io.BytesIO()
    with _quiet(), _cache_folder():
        with _away_from_settings():
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
def _away_from_settings() -> Iterator[None]:
    """Let matplotlib be imported where the first settings that it finds are its own defaults.

    It reads the file matplotlibrc of the current folder before any other, and fails where it cannot; so the current
    folder is that of its own for the moment. This project's threads, of which there may be others, name files from the
    root.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ImportError("matplotlib is not installed")
    kept = {name: os.environ.pop(name) for name in _VARIABLES if name in os.environ}
    here = _open_current_folder()
    try:
        os.chdir(Path(spec.origin).parent / "mpl-data")
        yield
    finally:
        os.environ.update(kept)
        if here is not None:
            os.fchdir(here)
            os.close(here)


def _open_current_folder() -> int | None:
    """None where it may be entered, but not read, or has been removed."""
    try:
        return os.open(".", os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return None


@contextlib.contextmanager
def _cache_folder() -> Iterator[None]:
    """Let matplotlib keep its list of fonts where the user's programs keep theirs, or where that cannot be written in a
    folder for the moment.
    """
    named = os.environ.get("MPLCONFIGDIR")
    with contextlib.ExitStack() as stack:
        folder = _users_cache_folder()
        if folder is None:
            made = tempfile.TemporaryDirectory(prefix="matplotlib-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
        os.environ["MPLCONFIGDIR"] = str(folder)
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]
            if named is not None:
                os.environ["MPLCONFIGDIR"] = named


def _users_cache_folder() -> Path | None:
    try:
        named, cache = os.environ.get("MPLCONFIGDIR"), os.environ.get("XDG_CACHE_HOME")
        folder = (Path(named) if named else Path(cache or Path.home() / ".cache") / "matplotlib").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return folder if os.access(folder, os.W_OK | os.X_OK) else None
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
