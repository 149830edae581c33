"""A user's own module: how it is found and imported, and in which of its lines an error arose."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
_PACKAGES = ("benchmarks", "datasets", "experiments", "models", "multi_process", "perfedavg", "reporting", "tests")
_ENTRY_POINTS = (
    "client_worker",
    "personalize",
    "quick_start",
    "report",
    "reproduce",
    "server",
    "sine",
    "single_process",
)
PROJECT_MODULES = frozenset((*_PACKAGES, *_ENTRY_POINTS, "compat", "paths", "utils"))
"""Names by which this project's modules are imported; they come before a user's and before installed ones."""

_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_PAGE = "docs/your-own-data.md says more"


def import_factory(name: str) -> Callable[..., Any]:
    """What `package.module:factory` stands for.

    The module is looked for in the current folder behind all that is installed, so that a file there cannot take the
    place of a module that this project needs. Raises ValueError, in one line with the user's file and line, where it
    cannot be imported, or where the name means another module than the file in the current folder.
    """
    module_name, _, factory_name = name.partition(":")
    what = f"--dataset {name} cannot be imported"
    if not (module_name and factory_name) or module_name.startswith("."):
        raise ValueError(f"{what}; it means package.module:factory")
    folder = _current_folder()
    if folder not in sys.path:
        sys.path.append(folder)
    _refuse_hidden(what, module_name.partition(".")[0], Path(folder))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}.") or _users_frame(error):
            raise explained(what, error) from error
        raise ValueError(
            f"{what} ({error}): it is neither in {folder}, where this process was started, nor installed; it means "
            "package.module:factory"
        ) from error
    except (Exception, SystemExit) as error:
        raise explained(what, error) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ValueError(
            f"{what} ({_place_of(module.__spec__)} has no {factory_name} that can be called); it means "
            "package.module:factory"
        )
    return factory  # type: ignore[no-any-return]


def explained(what: str, error: BaseException) -> ValueError:
    """An error that arose in a user's code, as one line: what was done, file and line, the error, and the way out."""
    place = _users_place(error)
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    shown = "".join(char if char.isprintable() else "?" for char in text)[:500]
    return ValueError(f"{what}: {place}{type(error).__name__}{': ' if shown else ''}{shown}{_way_out(error)}")


def _refuse_hidden(what: str, name: str, folder: Path) -> None:
    """Raise ValueError where another module has the name of a user's file."""
    own = next((path for path in (folder / f"{name}.py", folder / name / "__init__.py") if path.is_file()), None)
    taken = sys.modules.get(name)
    spec = taken.__spec__ if taken is not None else _find(name, sys.path)
    if own is None or spec is None or (spec.origin and Path(spec.origin).resolve() == own.resolve()):
        return
    raise ValueError(f"{what}: {name} is {_place_of(spec)} here, not {own}; rename your file ({_PAGE})")


def _way_out(error: BaseException) -> str:
    name = _clashing_name(error)
    if name is not None:
        other = _find(name, [entry for entry in sys.path if Path(entry).resolve() != PROJECT])
        instead = "" if other is None else f", and not {_place_of(other)}"
        return (
            f"; {name} is this project's {_place_of(sys.modules[name].__spec__)}{instead}. Rename a file of yours, or "
            "put it in a package; use an installed package of that name in a script of its own that writes the data to "
            f"a file ({_PAGE})"
        )
    if isinstance(error, ModuleNotFoundError):
        return f"; install it for {sys.executable}, or put it in {_current_folder()}"
    if isinstance(error, ImportError) and "relative import" in str(error):
        return "; start in the folder above the package, and name the module as package.module"
    if isinstance(error, SystemExit):
        return "; a module that is imported must not end the process"
    return ""


def _clashing_name(error: BaseException) -> str | None:
    """The name by which a user's code got a module of this project and failed to find in it what it looked for."""
    name: str | None = None
    if isinstance(error, ImportError):
        name = error.name
    elif isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        name = error.obj.__name__
    top = (name or "").partition(".")[0]
    is_ours = top in PROJECT_MODULES and top in sys.modules and _is_ours(getattr(sys.modules[top], "__file__", None))
    return top if is_ours else None


def _users_place(error: BaseException) -> str:
    """`FILE, line N: ` of the innermost line that is a user's, or nothing where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: "
    frame = _users_frame(error)
    return "" if frame is None else f"{frame.filename}, line {frame.lineno}: "


def _users_frame(error: BaseException) -> traceback.FrameSummary | None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    users = [frame for frame in frames if not (_is_ours(frame.filename) or frame.filename.startswith(_LIBRARIES))]
    return users[-1] if users else None


def _is_ours(file: str | None) -> bool:
    """Whether it is a file of this project; a user's may lie beside them."""
    if file is None or file.startswith(_LIBRARIES) or not Path(file).resolve().is_relative_to(PROJECT):
        return False
    top = Path(file).resolve().relative_to(PROJECT).parts[0]
    return top.removesuffix(".py") in PROJECT_MODULES - {"tests"}


def _find(name: str, path: list[str]) -> ModuleSpec | None:
    return PathFinder.find_spec(name, path)


def _place_of(spec: ModuleSpec | None) -> str:
    if spec is None:
        return "a module without a file"
    if spec.origin in (None, "built-in", "frozen"):
        folders = list(spec.submodule_search_locations or ())
        return folders[0] if folders else f"Python's own {spec.name}"
    return str(spec.origin)


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise ValueError("the current folder, in which modules are looked for, is gone; change to another") from error
