"""docs/personalize.md, as it stands there: from a run to a program that needs none of this project."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY, Launched, assert_one_clear_line, finish

PAGE = (ROOT / "docs" / "personalize.md").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    with Launched() as launched:
        run = launched.start("single_process.py", *TINY, "--run_dir", path, draws_plots=True)
        status, _, errors = finish(run)
    assert status == 0, errors
    return path


def code(pattern: str, images: Path) -> str:
    """The page's code between the pattern's parentheses, for images in another folder."""
    found = re.search(pattern, PAGE, re.DOTALL)
    assert found is not None, pattern
    return found[1].replace("/tmp/my_digits", str(images))


def test_the_page_from_images_to_a_program_of_ones_own(run: Path, launched: Launched, tmp_path: Path) -> None:
    images = tmp_path / "my_digits"
    exec(code(r"<<'END'\n(.*?)END\n", images), {})  # here, where the project's modules are loaded already
    assert len(list(images.glob("*/*.png"))) == 200
    status, output, errors = finish(launched.start("personalize.py", run, images, "--epochs", "2"))
    assert status == 0, errors
    for part in ("200 images of 10 of the run's 10 classes; 160 to adapt to, 40 held out", "after 2 epochs", "of 40"):
        assert part in output, output
    folder = run / "personalized" / "my_digits"
    # Isolated: it can import nothing of the project, though the tests' path is set.
    program = launched.start(sys.executable, "-I", "-c", code(r"```python\n(.*?)```", images), cwd=folder)
    status, output, errors = finish(program)
    assert status == 0, errors
    assert re.fullmatch(r"\d \d+\.\d%\n", output), output


def test_bad_input_ends_in_one_line_and_writes_nothing(run: Path, launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "images" / "three").mkdir(parents=True)
    (tmp_path / "images" / "three" / "1.png").write_bytes((run / "plots" / "clients.png").read_bytes())
    process = launched.start("personalize.py", run, tmp_path / "images")
    assert_one_clear_line(process, "three/1.png is", "not 28x28; scale it")
    process = launched.start("personalize.py", tmp_path / "images", tmp_path / "images")
    assert_one_clear_line(process, "is not the folder of a run")
    assert not (run / "personalized" / "images").exists()
