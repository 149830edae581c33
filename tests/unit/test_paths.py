"""Every path flag of every entry point reads what a user may name in the same way."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from helpers import TINY, Launched, assert_one_clear_line, finish, read_result

import personalize
import report
import reproduce
import utils
from experiments import sine_table
from launch import paths
from launch.settings import ENTRY_POINTS
from perfedavg.fields import flags_by_name

KINDS = {
    **ENTRY_POINTS,
    "reproduce": reproduce.Reproduce,
    "report": report.Report,
    "personalize": personalize.Personalize,
    "sine_table": sine_table.SineTable,
}
READERS = {paths.path, paths.folder, paths.file}
PATH_FLAGS = {"run_dir", "resume", "data_root", "token_file", "initial_model", "results", "runs", "output"}
PATH_FLAGS |= {"models", "run", "images", "folder", "against", "hosts", "keys"}


@pytest.mark.parametrize("name", KINDS)
def test_every_flag_that_names_a_path_is_read_here(name: str) -> None:
    flags = flags_by_name(KINDS[name])
    assert {name for name, flag in flags.items() if flag.setting.parse in READERS} == PATH_FLAGS & flags.keys()
    assert {name for name, flag in flags.items() if flag.kind is Path} <= PATH_FLAGS | {"plot"}


def test_a_path_is_absolute_and_knows_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert paths.path("runs/a b") == tmp_path / "runs" / "a b"
    assert paths.path("~/data") == tmp_path / "home" / "data"
    assert paths.folder(".") == tmp_path
    assert paths.shown(tmp_path / "x") == Path("x")
    assert paths.shown(Path("/elsewhere")) == Path("/elsewhere")
    named = os.fsdecode(b"/x/\xff\n")
    assert str(paths.path(named)) == named


def test_what_cannot_be_a_path_is_refused_with_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for read, text, message in [
        (paths.path, "", "is no path"),
        (paths.path, "a\0b", "is no path"),
        (paths.path, "x" * 300, "(File name too long)"),
        (paths.path, str(tmp_path / "loop"), "symbolic links"),
        (paths.folder, str(tmp_path / "dangling"), "is a link to 'nowhere', which is not there"),
        (paths.folder, str(tmp_path / "file"), "is a file; name a folder"),
        (paths.file, str(tmp_path), "is a folder; name a file"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)) as refusal:
            read(text)
        assert "\n" not in str(refusal.value)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ValueError, match="the current folder, which has been removed"):
        paths.path("runs")
    assert paths.path("/somewhere") == Path("/somewhere")


def test_the_data_folder_of_the_environment_is_read_as_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PERFEDAVG_DATA", "~/data")
    assert utils.get_args("single", []).data_root == tmp_path / "data"
    (tmp_path / "data").write_text("")
    with pytest.raises(ValueError, match=r"^--data_root ~/data is a file; name a folder \(which PERFEDAVG_DATA says"):
        utils.get_args("worker", ["--rank", "1"])


def test_a_run_in_a_folder_whose_name_is_no_text(launched: Launched, tmp_path: Path) -> None:
    """Every file that names it must be written all the same, and its report too."""
    folder = tmp_path / os.fsdecode(b"caf\xe9 \n x")
    status, _, errors = finish(launched.start("single_process.py", *TINY, "--run_dir", folder, draws_plots=True))
    assert status == 0, errors
    assert read_result(folder)["after_fine_tune"]
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "accuracy.png",
        "clients.png",
        "trained-clients.png",
    }
    status, _, errors = finish(launched.start("report.py", folder))
    assert status == 0, errors
    assert (folder / "report" / "report.html").stat().st_size > 1000
    assert_one_clear_line(launched.start("single_process.py", *TINY, "--run_dir", folder), "caf", "already holds a run")
