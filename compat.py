"""Makes torchvision and fedlab import, and keep to themselves while they do, wherever this project runs.

It imports nothing of the project, so that every package may use it before it imports either library.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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

    It imports torchvision. It sets up the root logger to print at level INFO. And it imports pandas and sklearn, which
    load pyarrow wherever it is installed, at some 35 MB in each process; here only the reader of parquet files needs
    it, and imports it itself.
    """
    import_torchvision()
    root = logging.getLogger()
    level, handler = root.level, logging.NullHandler()
    root.addHandler(handler)  # logging.basicConfig leaves a root logger with a handler alone
    with _without("pyarrow"):
        importlib.import_module(module)
    root.removeHandler(handler)
    root.setLevel(level)


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Let the import of a package fail, as if it were not installed, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules[package]
