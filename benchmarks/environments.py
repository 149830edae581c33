"""Environments of their own for the rivals of `round.py` that cannot share this project's: made on first use, kept."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".environments"
PIP_TIMEOUT_SECONDS = 1800


class EnvironmentMissingError(Exception):
    """An environment cannot be had. The message is the reason, in one line."""


def interpreter(name: str) -> Path:
    """The Python of the environment `rivals/requirements-<name>.txt`, which is built if it is absent or outdated.

    The file's `# python: any` lets pip ignore which versions of Python its packages say they are for.
    Raises EnvironmentMissingError where it cannot be built.
    """
    requirements = HERE / "rivals" / f"requirements-{name}.txt"
    content = requirements.read_text()
    wanted = hashlib.sha256(f"{sys.version}\n{content}".encode()).hexdigest()
    folder = FOLDER / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"building the environment {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    options = ["--ignore-requires-python"] if "# python: any" in content else []
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([*install, "-r", str(requirements)])
    stamp.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentMissingError(str(error)) from error
    if answer.returncode:
        lines = [line for line in answer.stderr.splitlines() if line.strip()] or [f"status {answer.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise EnvironmentMissingError((errors or lines)[-1])
