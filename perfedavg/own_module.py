"""What users bring of their own, named as `package.module:name`: data sets, models, methods and metrics.

How the module is found and imported, and in which of its lines an error arose. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

PROJECT = Path(__file__).resolve().parents[1]
_NAMES = """
benchmarks datasets examples experiments launch models multi_process over_ssh perfedavg python_api reporting tests
tuning client_worker cluster compat make_keys personalize quick_start report reproduce server server_or_worker
single_process tune utils
"""
PROJECT_MODULES = frozenset(_NAMES.split())
"""Names by which this project's modules are imported; they come before a user's and before installed ones.

They are not read from the folder, because a user's own modules may lie there too.
"""

Result = TypeVar("Result")

_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_PAGE = "docs/your-own-data.md says more"


class OwnModuleError(ValueError):
    """A user's own code cannot be had, or fails."""


def import_own(
    flag: str, name: str, kind: str, fits: Callable[[Any], bool] = callable, asked: str = "can be called"
) -> Any:
    """What `package.module:name` stands for, given with a flag such as `--dataset`.

    kind: what the name is of, such as `factory`.  fits, asked: what it must be, as a function and in words.
    The module is looked for in the current folder behind all that is installed, so that a file there cannot take the
    place of a module that this project needs. Raises ValueError, in one line with the user's file and line, where it
    cannot be imported, or where the name means another module than the file in the current folder.
    """
    module_name, _, own_name = name.partition(":")
    what, meant = f"{flag} {name} cannot be imported", f"it means package.module:{kind}"
    if name in _given:
        return _checked(_given[name], fits, f"{what} (what was given as {own_name} is none that {asked}); {meant}")
    if not (module_name and own_name) or module_name.startswith("."):
        raise OwnModuleError(f"{what}; {meant}")
    folder = _current_folder()
    if folder not in sys.path:
        sys.path.append(folder)
    _refuse_hidden(what, module_name.partition(".")[0], Path(folder))
    try:
        with _importing():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        is_absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if not is_absent or _users_frame(error):
            raise explained(what, error) from error
        place = f"it is neither in {folder}, where this process was started, nor installed"
        raise OwnModuleError(f"{what} ({error}): {place}; {meant}") from error
    _note_sources(module_name.partition(".")[0])
    place = _place_of(module.__spec__)
    return _checked(getattr(module, own_name, None), fits, f"{what} ({place} has no {own_name} that {asked}); {meant}")


def _checked(found: Any, fits: Callable[[Any], bool], fault: str) -> Any:
    if not fits(found):
        raise OwnModuleError(fault)
    return found


_given: dict[str, Any] = {}
_num_importing = 0


def give(name: str, value: Any) -> None:
    """Let `package.module:name` stand for an object of this process, which no other process can import by it."""
    _given[name] = value
    module_name = name.partition(":")[0]
    main = sys.modules.get("__main__")
    module = sys.modules.get(
        module_name, main if Path(getattr(main, "__file__", "") or "").stem == module_name else None
    )
    if module is not None:
        _note_source(module_name, getattr(module, "__file__", None))


def is_importing() -> bool:
    """Whether a user's module is being imported for what it brings, as by a worker."""
    return _num_importing > 0


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    global _num_importing
    _num_importing += 1
    try:
        yield
    finally:
        _num_importing -= 1


_sources: dict[str, str] = {}


def sources() -> dict[str, str]:
    """By module, the SHA-256 of the files of users' own code, as they were when they were imported.

    Of each module that `import_own` imported, and of those that lie in its folder and were imported with it.
    """
    return dict(_sources)


def is_installed(path: str) -> bool:
    """Whether it is Python's or an installed package's, and so no user's."""
    return path.startswith(_LIBRARIES)


def changed_sources(others: Mapping[str, str]) -> list[str]:
    """The modules of users' own code that another process, or an earlier one, had otherwise."""
    return sorted(name for name, digest in _sources.items() if others.get(name, digest) != digest)


def _note_sources(top: str) -> None:
    """top: name of the module or the package that was imported."""
    place = getattr(sys.modules[top], "__file__", None)
    folder = None if place is None or is_installed(place) else Path(place).parent
    if folder is not None and Path(place or "").stem == "__init__":
        folder = folder.parent
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str):
            continue
        is_beside = folder is not None and not is_installed(file) and Path(file).is_relative_to(folder)
        if is_beside or f"{name}.".startswith(f"{top}."):
            _note_source(name, file)


def _note_source(name: str, file: str | None) -> None:
    if name not in _sources and file is not None and file.endswith(".py") and not _is_ours(file):
        with contextlib.suppress(OSError):
            _sources[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()


def explained(what: str, error: BaseException) -> ValueError:
    """An error that arose in a user's code, as one line: what was done, file and line, the error, and the way out."""
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    shown = "".join(char if char.isprintable() else "?" for char in text)[:500]
    return OwnModuleError(
        f"{what}: {_users_place(error)}{type(error).__name__}{': ' * bool(shown)}{shown}{_way_out(error)}"
    )


def call_own_code(what: str, function: Callable[[], Result]) -> Result:
    """What a piece of a user's code returns. Raises ValueError, with its file and line, where it fails."""
    import torch

    try:
        return function()
    except (MemoryError, torch.OutOfMemoryError):
        raise  # not the code's fault
    except Exception as error:
        raise explained(what, error) from error


def _refuse_hidden(what: str, name: str, folder: Path) -> None:
    """Raise ValueError where another module has the name of a user's file."""
    own = next((path for path in (folder / f"{name}.py", folder / name / "__init__.py") if path.is_file()), None)
    taken = sys.modules.get(name)
    spec = PathFinder.find_spec(name, sys.path) if taken is None else taken.__spec__
    if own is None or spec is None or (spec.origin and Path(spec.origin).resolve() == own.resolve()):
        return
    raise OwnModuleError(f"{what}: {name} is {_place_of(spec)} here, not {own}; rename your file ({_PAGE})")


def _way_out(error: BaseException) -> str:
    name = _clashing_name(error)
    if name is not None:
        other = PathFinder.find_spec(name, [entry for entry in sys.path if Path(entry).resolve() != PROJECT])
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
    file = getattr(sys.modules.get(top), "__file__", None)
    return top if top in PROJECT_MODULES and file is not None and _is_ours(file) else None


def _users_place(error: BaseException) -> str:
    """`FILE, line N: ` of the innermost line that is a user's, or nothing where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: "
    frame = _users_frame(error)
    return "" if frame is None else f"{frame.filename}, line {frame.lineno}: "


def _users_frame(error: BaseException) -> traceback.FrameSummary | None:
    frames: Iterable[traceback.FrameSummary] = reversed(traceback.extract_tb(error.__traceback__))
    others = ("<", *_LIBRARIES)
    return next(
        (frame for frame in frames if not (frame.filename.startswith(others) or _is_ours(frame.filename))), None
    )


def _is_ours(file: str) -> bool:
    """Whether it is a file of this project; a user's may lie beside them."""
    path = Path(file).resolve()
    if file.startswith(_LIBRARIES) or not path.is_relative_to(PROJECT):
        return False
    return path.relative_to(PROJECT).parts[0].removesuffix(".py") in PROJECT_MODULES - {"tests"}


def _place_of(spec: ModuleSpec | None) -> str:
    if spec is None:
        return "a module without a file"
    if spec.origin in (None, "built-in", "frozen"):
        return next(iter(spec.submodule_search_locations or ()), f"Python's own {spec.name}")
    return str(spec.origin)


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise OwnModuleError(
            "the current folder, in which modules are looked for, is gone; change to another"
        ) from error
