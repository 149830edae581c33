"""What a run is computed with, for whoever wants to repeat it: versions of Python and packages, and the commit."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("fedlab", "torch", "torchvision", "numpy")


@functools.cache
def describe_environment() -> Mapping[str, Any]:
    """By name; `commit` is None outside a git checkout. Looked up once, as it takes 50 ms."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The project's commit, with `+changes` where the work tree differs from it."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
