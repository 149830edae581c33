"""Makes `import torchvision` and `import fedlab` work, and keep to themselves, wherever this project runs.

It imports nothing of the project, so that every package may call it before it imports either library.
"""

from __future__ import annotations

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


@contextmanager
def _without_pyarrow() -> Iterator[None]:
    """Let pandas, which fedlab imports and does not need for anything here, do without pyarrow.

    It would load it wherever it is installed, at some 35 MB in each process; here only the reader of parquet files
    needs it, and imports it itself.
    """
    if "pyarrow" in sys.modules:
        yield
        return
    sys.modules["pyarrow"] = None  # type: ignore[assignment]  # makes `import pyarrow` fail
    try:
        yield
    finally:
        del sys.modules["pyarrow"]


def prepare_fedlab() -> None:
    """Call before importing fedlab: it imports torchvision, and sets up the root logger to print at level INFO."""
    import_torchvision()
    root = logging.getLogger()
    level, handler = root.level, logging.NullHandler()
    root.addHandler(handler)  # logging.basicConfig leaves a root logger with a handler alone
    with _without_pyarrow():
        import fedlab.utils.dataset.functional  # the first to import pandas
        import fedlab.utils.logger  # noqa: F401

    root.removeHandler(handler)
    root.setLevel(level)
