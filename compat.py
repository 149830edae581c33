"""Makes torchvision and fedlab import, and keep to themselves while they do, wherever this project runs.

It imports nothing of the project, so that every package may use it before it imports either library.
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

# torch imports the pynvml package, a requirement of fedlab, and then warns that it is deprecated.
warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)

import torch  # noqa: E402

_TORCHVISION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_registered: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision, registering its operator schemas when, and only when, its compiled ones are absent.

    A torchvision built for CUDA beside a torch built for the CPU cannot load its compiled operators, and then fails
    at import, because it describes two of them to torch (`operator torchvision::nms does not exist`). Only its data
    sets are used here, which are plain Python, so a schema without a kernel is enough. With a matching build the
    first import succeeds and nothing is registered.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    else:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left half-loaded
    library = torch.library.Library("torchvision", "DEF")
    for schema in _TORCHVISION_OPERATORS:
        library.define(schema)
    _registered.append(library)  # the schemas live as long as this object
    import torchvision  # noqa: F401


def import_fedlab(module: str) -> None:
    """Import a module of fedlab for the first time, without what the import does besides.

    It sets up the root logger to print at level INFO. And its trainers import one light class from a package,
    `fedlab.contrib.dataset`, whose other modules import torchvision, sklearn and pandas: 180 MB and two seconds in each
    process, of which nothing is used. So that package's own code waits until somebody imports the package itself, and
    pandas, in which fedlab's partitions write reports, until it is used.
    """
    root = logging.getLogger()
    level, handler = root.level, logging.NullHandler()
    root.addHandler(handler)  # logging.basicConfig leaves a root logger with a handler alone
    with _only_promised("pandas"), _without_its_own_code("fedlab.contrib.dataset"):
        importlib.import_module(module)
    root.removeHandler(handler)
    root.setLevel(level)


class _Promised(types.ModuleType):
    """Stands for a module that is imported when something in it is first used."""

    def __getattr__(self, attribute: str) -> object:
        return getattr(importlib.import_module(self.__name__), attribute)


@contextmanager
def _only_promised(name: str) -> Iterator[None]:
    """Let imports of a module get no more than a promise of it, unless it was imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = _Promised(name)
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _without_its_own_code(package: str) -> Iterator[None]:
    """Let modules of a package be imported without the package's `__init__`, unless that was run already."""
    if package in sys.modules:
        yield
        return
    top, *below = package.split(".")
    spec = importlib.util.find_spec(top)
    assert spec is not None, f"{top} is installed"
    stand_in = types.ModuleType(package)
    stand_in.__path__ = [str(Path(folder, *below)) for folder in spec.submodule_search_locations or ()]
    sys.modules[package] = stand_in
    try:
        yield
    finally:
        del sys.modules[package]
