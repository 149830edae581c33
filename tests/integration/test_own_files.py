"""A user's own files, as docs/your-own-data.md has them typed: to a result, in any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, Launched, finish, read_result
from PIL import Image

SHORT = ["--rounds", "2", "--local_epochs", "1", "--fine_tune_rounds", "1", "--fine_tune_local_epochs", "1"]
PAGE = (ROOT / "docs" / "your-own-data.md").read_text()


def program(name: str) -> str:
    """The one of the page that begins with a comment of that name."""
    parts = (part.partition("```")[0] for part in PAGE.split("```python\n"))
    return next(part for part in parts if f"# {name};" in part.partition("\n")[0])


def flags_of(file: str) -> list[str]:
    """Of the page's command for a file of that name."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"sh quick_start.sh --dataset {file}"))
    return line.split()[2:]


@pytest.mark.parametrize(("made_by", "file"), [("make_arrays.py", "my.npz"), ("make_table.py", "my.csv")])
def test_workers_and_one_process_end_with_the_same_model(
    made_by: str, file: str, launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program(made_by), made_by, "exec"), {})
    runs = {}
    for script in ("quick_start.py", "single_process.py"):
        run = tmp_path / script.removesuffix(".py")
        status, output, errors = finish(launched.start(script, *flags_of(file), *SHORT, "--run_dir", run, cwd=tmp_path))
        assert status == 0, errors
        assert f"6 unseen clients of {file}, uniform means" in output
        runs[script] = (read_result(run)["model_sha256"], (run / "clients.csv").read_text())
    assert runs["quick_start.py"] == runs["single_process.py"]
    assert json.loads((run / "config.json").read_text())["experiment"]["dataset"] == str(tmp_path / file)


def test_a_person_gets_a_model_of_a_run_on_images_in_colour(launched: Launched, tmp_path: Path) -> None:
    """Photos of any size, the run's and the person's, brought to the same form."""
    rng = np.random.default_rng(0)
    for client in ("anna", "ben", "cleo"):
        for label, colour in (("night", 20), ("day", 220)):
            (tmp_path / "photos" / client / label).mkdir(parents=True)
            for number in range(5):
                pixels = rng.integers(0, 30, (40, 30 + number, 3), dtype=np.uint8) + np.uint8(colour)
                Image.fromarray(pixels).save(tmp_path / "photos" / client / label / f"{number}.png")
    flags = ["--dataset", "./photos", "--image_size", "16", "--image_color", "rgb", "--client_num_per_round", "2"]
    run = tmp_path / "run"
    status, _, errors = finish(launched.start("single_process.py", *flags, *SHORT, "--run_dir", run, cwd=tmp_path))
    assert status == 0, errors
    status, output, errors = finish(launched.start("personalize.py", run, tmp_path / "photos" / "anna", cwd=tmp_path))
    assert status == 0, errors
    assert "10 images of 2 of the run's 2 classes; 8 to adapt to, 2 held out" in output
