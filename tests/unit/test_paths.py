"""Every path flag of every entry point reads what a user may name in the same way."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
from helpers import TINY, Launched, assert_one_clear_line, finish, read_result

import paths
import personalize
import report
import reproduce
import sine
import utils

PARSERS = {
    "server": utils.build_parser("server"),
    "worker": utils.build_parser("worker"),
    "single": utils.build_parser("single"),
    "quick_start": utils.build_parser("quick_start"),
    "describe": utils.build_parser("describe"),
    "reproduce": reproduce.build_parser(),
    "report": report.build_parser(),
    "personalize": personalize.build_parser(),
    "sine": sine.build_parser(),
}
READERS = {paths.path, paths.folder, paths.file, utils.path_as_text}
PATH_FLAGS = {"run_dir", "resume", "data_root", "token_file", "plot", "initial_model", "results", "runs", "output"}
PATH_FLAGS |= {"models", "run", "images", "folder"}


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_that_names_a_path_is_read_here(name: str) -> None:
    actions = {action.dest: action.type for action in PARSERS[name]._actions}
    read_here = {dest for dest, reader in actions.items() if reader in READERS}
    assert Path not in actions.values()
    assert read_here == PATH_FLAGS & actions.keys()
    assert read_here


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
        (paths.path, "", "'' is no path"),
        (paths.path, "a\0b", r"'a\x00b' is no path"),
        (paths.path, "x" * 300, "(File name too long)"),
        (paths.path, str(tmp_path / "loop"), "symbolic links"),
        (paths.folder, str(tmp_path / "dangling"), "is a link to 'nowhere', which is not there"),
        (paths.folder, str(tmp_path / "file"), "is a file; name a folder"),
        (paths.file, str(tmp_path), "is a folder; name a file"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError) as refusal:
            read(text)
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(argparse.ArgumentTypeError, match="the current folder, which has been removed"):
        paths.path("runs")
    assert paths.path("/somewhere") == Path("/somewhere")


def test_the_data_folder_of_the_environment_is_read_as_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PERFEDAVG_DATA", "~/data")
    assert utils.get_args("single", []).data_root == tmp_path / "data"
    (tmp_path / "data").write_text("")
    with pytest.raises(SystemExit):
        utils.get_args("worker", ["--rank", "1"])
    assert "error: argument --data_root: '~/data' is a file; name a folder" in capsys.readouterr().err


def test_a_run_in_a_folder_whose_name_is_no_text(launched: Launched, tmp_path: Path) -> None:
    """Every file that names it must be written all the same, and its report too."""
    folder = tmp_path / os.fsdecode(b"caf\xe9 \n x")
    status, _, errors = finish(launched.start("single_process.py", *TINY, "--run_dir", folder, draws_plots=True))
    assert status == 0, errors
    assert read_result(folder)["after_fine_tune"]
    assert {path.name for path in (folder / "plots").iterdir()} == {"accuracy.png", "clients.png"}
    status, _, errors = finish(launched.start("report.py", folder))
    assert status == 0, errors
    assert (folder / "report" / "report.html").stat().st_size > 1000
    assert_one_clear_line(launched.start("single_process.py", *TINY, "--run_dir", folder), "caf", "already holds a run")
