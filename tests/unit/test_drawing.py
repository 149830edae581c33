"""A picture is the same whatever settings, files and folders the user has for matplotlib."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

DRAW = """
import os, sys
sys.path.insert(0, {root!r})
from reporting.drawing import png

def draw():
    from matplotlib.figure import Figure
    figure = Figure(figsize=(2, 1.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1, 2], [0, 3, 1], label="a line")
    axes.set(title="title", xlabel="round")
    axes.legend()
    return figure

before = os.getcwd(), dict(os.environ)
image = png(draw, 50)
assert (os.getcwd(), dict(os.environ)) == before, "the process is left as it was"
sys.stdout.buffer.write(image)
"""


def drawn(cwd: Path, **environment: str) -> bytes:
    """What a fresh process draws in a folder."""
    command = [sys.executable, "-c", DRAW.format(root=str(ROOT))]
    answer = subprocess.run(command, capture_output=True, cwd=cwd, env={**os.environ, **environment})
    assert answer.returncode == 0, answer.stderr.decode()
    assert answer.stderr == b"", "nor does matplotlib say a word about them"
    return answer.stdout


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    image = drawn(tmp_path_factory.mktemp("empty"))
    assert image.startswith(b"\x89PNG")
    return image


def test_settings_in_the_environment_and_in_files_change_nothing(tmp_path: Path, usual: bytes) -> None:
    """A notebook's backend, another style, TeX, a font that is not there: a run must not look or end otherwise."""
    settings = tmp_path / "settings"
    settings.write_text("text.usetex: True\nfont.family: Nowhere\nlines.linewidth: 9\nsavefig.format: pdf\nnonsense\n")
    folder = tmp_path / "config"
    (folder / "stylelib").mkdir(parents=True)
    (folder / "matplotlibrc").write_text("axes.facecolor: red\nbackend: TkAgg\n")
    for backend, named in (("module://matplotlib_inline.backend_inline", settings), ("no such", tmp_path / "nowhere")):
        variables = {"MPLBACKEND": backend, "MATPLOTLIBRC": str(named), "MPLCONFIGDIR": str(folder)}
        assert drawn(tmp_path, **variables) == usual


def test_a_damaged_settings_file_in_the_current_folder_changes_nothing(tmp_path: Path, usual: bytes) -> None:
    (tmp_path / "matplotlibrc").write_bytes(b"lines.linewidth: 9 # \xff\xfe no UTF-8\n")
    assert drawn(tmp_path, PYTHONWARNINGS="error") == usual


def test_no_folder_to_write_in_changes_nothing(tmp_path: Path, usual: bytes) -> None:
    """Nor is a folder left behind in its place."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "tmp").mkdir()
    image = drawn(tmp_path, MPLCONFIGDIR=str(tmp_path / "file" / "config"), TMPDIR=str(tmp_path / "tmp"))
    assert image == usual
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_user_without_a_home(tmp_path: Path, usual: bytes) -> None:
    """As a container has it that is run under a number which its list of users lacks."""
    nobody = "import pwd\ndef unknown(number): raise KeyError(number)\npwd.getpwuid = unknown\n"
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", nobody + DRAW.format(root=str(ROOT))]
    answer = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert (answer.returncode, answer.stdout) == (0, usual), answer.stderr.decode()
