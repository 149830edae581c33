"""The main job on data with natural clients, and the description of a data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, Launched, finish, one_phase, read_result

from datasets import describe as describing

SHORT = ["--model", "mlp", "--client_num_per_round", "4", "--rounds", "1", "--local_epochs", "1"]
SHORT += ["--fine_tune_rounds", "1", "--fine_tune_local_epochs", "1", "--personalization_epochs", "1"]


def test_the_main_job_on_200_synthetic_writers(launched: Launched, tmp_path: Path) -> None:
    flags = ["--dataset", "synthetic_writers", "--client_num_in_total", "200", *SHORT]
    process = launched.start("quick_start.py", *flags, "--run_dir", tmp_path / "run")
    status, output, errors = finish(process)
    assert status == 0, errors
    result = read_result(tmp_path / "run")
    assert (result["train_clients"], result["unseen_clients"]) == (160, 40)
    assert "40 unseen clients of synthetic_writers" in output
    assert "synthetic, rendered from fonts: no result on it is a result on FEMNIST" in output


def write_leaf(file: Path, users: dict[str, tuple[list[object], list[object]]]) -> None:
    """One of LEAF's JSON files: users with their inputs and labels."""
    file.parent.mkdir(parents=True)
    content = {
        "users": list(users),
        "num_samples": [len(labels) for _, labels in users.values()],
        "user_data": {user: {"x": inputs, "y": labels} for user, (inputs, labels) in users.items()},
    }
    file.write_text(json.dumps(content))


def test_femnist_by_writer_runs_with_workers(launched: Launched, tmp_path: Path) -> None:
    """Both workers and the server open the same cache, which the first of them builds."""
    generator = np.random.default_rng(0)
    writers = {
        f"f{number:04}_00": (generator.random((6, 784)).tolist(), generator.integers(0, 62, 6).tolist())
        for number in range(34)
    }
    write_leaf(tmp_path / "femnist" / "all_data_0.json", writers)
    flags = ["--dataset", "femnist", "--data_root", tmp_path, *SHORT]
    status, _, errors = finish(launched.start("quick_start.py", *flags, "--run_dir", tmp_path / "run"))
    assert status == 0, errors
    result = read_result(tmp_path / "run")
    assert (result["train_clients"], result["unseen_clients"]) == (25, 9)


def test_shakespeare_by_role_trains_the_lstm(launched: Launched, tmp_path: Path) -> None:
    text = "to be, or not to be: that is the question. whether 'tis nobler in the mind to suffer the slings " * 6
    sizes = [401, 405, 400, 401, 401, 401, 403]  # of 400 windows, none would be left after the gap
    roles = {
        f"PLAY_ROLE{number}": ([text[i : i + 80] for i in range(size)], [text[i + 80] for i in range(size)])
        for number, size in enumerate(sizes)
    }
    write_leaf(tmp_path / "shakespeare" / "all_data_0.json", roles)
    flags = ["--dataset", "shakespeare", "--data_root", tmp_path, *one_phase(SHORT[2:]), "--batch_size", "100"]
    flags += ["--client_num_per_round", "1"]
    status, _, errors = finish(launched.start("single_process.py", *flags, "--run_dir", tmp_path / "run"))
    assert status == 0, errors
    result = read_result(tmp_path / "run")
    assert (result["train_clients"], result["unseen_clients"]) == (5, 1)
    assert "left out of shakespeare, too small to train and be scored: 1 client(s)" in errors


def test_plays_by_role_run_with_workers(launched: Launched, tmp_path: Path) -> None:
    """From the files to scores over characters, clients of a group side by side; describe counts roles and windows."""
    lines = ["To be, or not to be, that is the question:", "Whether 'tis nobler in the mind to suffer", "The slings"]
    speeches = [f"{role}.\n" + "\n".join(lines * 5) for role in ("HAMLET", "OPHELIA", "FIRST CLOWN", "GHOST", "KING")]
    (tmp_path / "plays").mkdir()
    (tmp_path / "plays" / "hamlet_gut.txt").write_text("ACT I.\n\n" + "\n\n".join(speeches))
    flags = ["--dataset", "plays", "--data_root", tmp_path, "--model", "char_transformer", *SHORT[2:]]
    flags += ["--client_optimizer", "adam", "--local_lr", "0.001", "--metrics", "macro_f1"]
    status, _, errors = finish(launched.start("quick_start.py", *flags, "--run_dir", tmp_path / "run"))
    assert status == 0, errors
    result = read_result(tmp_path / "run")
    assert (result["train_clients"], result["unseen_clients"]) == (4, 1)
    assert "plays: 1 play(s) with 5 roles, of which 5 say 400 characters or more and are clients" in errors
    header, first, *_ = (tmp_path / "run" / "clients.csv").read_text().splitlines()
    assert "macro_f1" in header
    assert "hamlet:" in first
    status, output, errors = describe(launched, "--dataset", "plays", "--data_root", tmp_path)
    assert status == 0, errors
    assert "5 clients, 4 train and 1 are unseen; 80 classes" in output
    assert "examples a client, min, median, max: 5, 5, 5" in output


def describe(launched: Launched, *flags: str | Path) -> tuple[int, str, str]:
    return finish(launched.start("-m", "datasets.describe", *flags, cwd=ROOT))


def test_describe_counts_and_plots(launched: Launched, tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    status, output, errors = describe(launched, "--dataset", "digits", "--plot", picture)
    assert status == 0, errors
    for text in ("50 clients, 30 train and 20 are unseen; 10 classes", "min, median, max: 35, 36, 37", "left out"):
        assert text in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_describe_says_what_is_synthetic_and_samples_where_there_are_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(describing, "MAX_SAMPLE", 10)  # in place of 1,000 clients, whose images take a while to draw
    flags = ("--dataset", "synthetic_writers", "--client_num_in_total", "1000000")
    monkeypatch.setattr("sys.argv", ["describe", *flags])
    describing.main()
    output = capsys.readouterr().out
    assert "1000000 clients, 800000 train" in output
    assert "no result on it is a result on FEMNIST" in output
    assert "(of 10 clients)" in output


@pytest.mark.parametrize("flags", [["--dataset", "cifar"], ["--partition", "cards"], ["--dataset", "femnist"]])
def test_describe_says_what_is_wrong_in_one_line(flags: list[str], launched: Launched, tmp_path: Path) -> None:
    status, _, errors = describe(launched, *flags, "--data_root", tmp_path)
    assert status == 2
    assert flags[-1] in errors
    assert "error: " in errors.splitlines()[-1]
    assert "Traceback" not in errors
