"""Makes fedlab import quickly and quietly, wherever this project runs.

It imports nothing of the project, so that every package may use it before it imports fedlab.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def import_fedlab(module: str) -> None:
    """Import a module of fedlab for the first time, without what the import does besides.

    It sets up the root logger to print at level INFO. And its trainers import one light class from a package,
    `fedlab.contrib.dataset`, whose other modules import torchvision, sklearn and pandas: 180 MB and two seconds in each
    process, of which nothing is used. So that package's own code waits until somebody imports the package itself, and
    pandas, in which fedlab's partitions write reports, until it is used.
    """
    # torch imports the pynvml package, a requirement of fedlab, and then warns that it is deprecated.
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
    import torch  # noqa: F401 (before pandas is only promised: what torch imports looks into it)

    root = logging.getLogger()
    level, handler = root.level, logging.NullHandler()
    root.addHandler(handler)  # logging.basicConfig leaves a root logger with a handler alone
    with _in_place_of(_Promised("pandas")), _in_place_of(_bare_package("fedlab.contrib.dataset")):
        importlib.import_module(module)
    root.removeHandler(handler)
    root.setLevel(level)


class _Promised(types.ModuleType):
    """Stands for a module that is imported when something in it is first used."""

    def __getattr__(self, attribute: str) -> object:
        return getattr(importlib.import_module(self.__name__), attribute)


def _bare_package(name: str) -> types.ModuleType:
    """A package whose modules can be imported, without the code of its `__init__`."""
    top, *below = name.split(".")
    spec = importlib.util.find_spec(top)
    assert spec is not None, f"{top} is installed"
    package = types.ModuleType(name)
    package.__path__ = [str(Path(folder, *below)) for folder in spec.submodule_search_locations or ()]
    return package


@contextmanager
def _in_place_of(stand_in: types.ModuleType) -> Iterator[None]:
    """Let imports find the stand-in by its name, unless that was imported already."""
    name = stand_in.__name__
    if name in sys.modules:
        yield
        return
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]
