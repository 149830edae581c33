"""How entry points are started: their flags, from dataclasses of settings, and the commands that start them again."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from launch.paths import ROOT, shown
from perfedavg.terminal.console import command_line

_PACKAGES = ("torch", "fedlab", "numpy", "safetensors")
"""Some of requirements.txt, without which no entry point gets far."""


def _end_without_packages() -> None:
    """End an entry point that was started with a Python that lacks the packages it needs, with one line."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").absolute()
    if missing and script.resolve().parent == ROOT:
        command = command_line([shown(ROOT / ".venv" / "bin" / "python"), shown(script), *sys.argv[1:]])
        line = (
            f"error: {sys.executable} has no {missing[0]}; use the Python of .venv, which `sh quick_start.sh` sets up"
        )
        sys.stderr.write(f"{line}: {command}\n")
        sys.exit(2)


_end_without_packages()
