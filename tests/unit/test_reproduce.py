"""The rows of the papers' tables, what counts as done, and what is kept of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from helpers import ROOT, TINY, read_result

import utils
from experiments import runner
from experiments.rows import select_rows, table_names
from experiments.runner import Job, Run, check_flags, keep_results, num_passes, plan_jobs, seconds_left
from perfedavg.machine.processes import SignalWatch, exit_status
from perfedavg.settings import ExperimentConfig

IMAGES = ("mnist", "emnist", "synthetic_writers")
COMPARED = ("fashion_shards", "fashion_dirichlet", "plays", "fashion_two_labels")
MAIN = {f"E{e}-C{c}": (e, c) for c in (20, 5) for e in (20, 10, 5, 2)}
EXTRA = ["tail", "local-only", "fedsgd", "joint", "fomaml", "maml"]
TINY_ROW = {name.removeprefix("--"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)}
MACHINE = ["--data_root", "data", "--device", "cpu"]


def config_of(flags: Mapping[str, str]) -> ExperimentConfig:
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return utils.get_args("single", argv).experiment


@pytest.mark.parametrize("dataset", IMAGES)
def test_the_main_rows_are_the_papers(dataset: str) -> None:
    """Another value in any of them, and the table would stand beside published figures of another experiment."""
    rows = select_rows(dataset)
    assert list(rows)[:8] == list(MAIN)
    for name, (num_epochs, num_clients) in MAIN.items():
        config = config_of(rows[name])
        assert config.fine_tune is not None
        assert (config.fedavg.num_rounds, config.fedavg.num_local_epochs, config.cohort_size) == (
            500,
            num_epochs,
            num_clients,
        )
        assert (config.fine_tune.num_rounds, config.fine_tune.num_local_epochs) == (100, 10)
        assert (config.fine_tune.method.name, config.fedavg.server_optimizer.momentum) == ("reptile", 0.9)
        assert (config.num_clients, config.unseen_fraction) == (3400, "0.2")
        assert config.partition == (None if dataset == "synthetic_writers" else "shards:2")
        assert (config.num_personalization_epochs, config.num_curve_epochs) == (5, 20 if num_clients == 20 else 0)
        assert (config.eval_every, config.eval_clients) == (20, 50)


@pytest.mark.parametrize("dataset", IMAGES)
def test_a_main_row_is_what_the_data_set_defaults_to(dataset: str) -> None:
    """Apart from how often it is measured: `--dataset mnist` alone must be the experiment of the table."""
    measured = {"dataset": dataset, "eval_every": "20", "eval_clients": "50"}
    assert config_of(select_rows(dataset)["E5-C5"]) == config_of(measured)


@pytest.mark.parametrize("dataset", IMAGES)
def test_the_extra_rows_differ_from_the_main_ones_in_what_they_are_for(dataset: str) -> None:
    rows = select_rows(dataset)
    assert list(rows)[8:] == EXTRA
    configs = {name: config_of(flags) for name, flags in rows.items()}
    reference = configs["E5-C20"]
    assert configs["tail"] == dataclasses.replace(reference, local_split="tail")
    for name in ("fomaml", "maml"):
        settings = configs[name].fine_tune
        assert settings is not None
        assert settings.method.name == name
        assert dataclasses.replace(configs[name], fine_tune=reference.fine_tune) == reference
    for name in ("local-only", "fedsgd", "joint"):
        assert configs[name].fine_tune is None
    local = configs["local-only"]
    assert (local.fedavg.num_rounds, local.num_personalization_epochs, local.num_curve_epochs) == (0, 50, 50)
    for name, num_steps, num_clients, joint in (("fedsgd", 1, 20, False), ("joint", 100, 1, True)):
        config = configs[name]
        assert (config.fedavg.num_rounds, config.fedavg.num_local_steps, config.cohort_size, config.joint) == (
            500,
            num_steps,
            num_clients,
            joint,
        )
        assert config.fedavg.server_optimizer.name == "sgd"
        assert config.num_curve_epochs == 20
    assert configs["joint"].fedavg.server_optimizer.learning_rate == 1.0


def test_the_rows_of_the_sine_task() -> None:
    """Three meta-learners from the initial weights, and joint training without one; 600 unseen tasks."""
    configs = {name: config_of(flags) for name, flags in select_rows("sine").items()}
    assert list(configs) == ["maml", "fomaml", "reptile", "joint"]
    for name, config in configs.items():
        assert (config.num_clients, config.unseen_fraction, config.batch_size) == (30600, "1/51", 10)
        assert (config.num_personalization_epochs, config.num_curve_epochs) == (10, 32)
        if name == "joint":
            assert config.joint
            assert config.fine_tune is None
        else:
            assert config.fedavg.num_rounds == 0
            assert config.fine_tune is not None
            assert config.fine_tune.method.name == name


def test_rows_are_chosen_by_name_and_by_group_in_the_tables_order() -> None:
    assert list(select_rows("mnist", ["main"])) == list(MAIN)
    assert list(select_rows("mnist", ["extra"])) == EXTRA
    assert list(select_rows("mnist", ["all"])) == [*MAIN, *EXTRA]
    assert list(select_rows("mnist", ["joint", "E2-C5", "E20-C20", "joint"])) == ["E20-C20", "E2-C5", "joint"]
    assert list(select_rows("sine", ["main"])) == list(select_rows("sine", ["all"])) == list(select_rows("sine"))
    assert table_names() == [*IMAGES, *COMPARED[:3], "sine", COMPARED[3]]


@pytest.mark.parametrize(("dataset", "name"), [("mnist", "E7-C5"), ("mnist", "reptile"), ("sine", "extra")])
def test_a_row_that_does_not_exist_is_named_with_those_that_do(dataset: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"--rows {name} is none of {dataset}'s; use main, .*all, or of .*, joint"):
        select_rows(dataset, [name])


def tiny_jobs(folder: Path, *seeds: int, **changes: str) -> list[Job]:
    rows = {"a": TINY_ROW, "b": {**TINY_ROW, "batch_size": "10"}}
    rows = {name: {**flags, **changes} for name, flags in rows.items()}
    return plan_jobs(rows, seeds, folder / "runs", folder / "results")


def leave_run(job: Job, folder: Path, argv: Sequence[str] | None = None, ends: bool = True) -> None:
    """The files that a run with these flags (the job's own unless others are given) leaves in a folder."""
    folder.mkdir(parents=True)
    experiment = utils.get_args("single", job.argv if argv is None else argv).experiment.to_dict()
    command = [str(ROOT / "single_process.py"), *job.argv, "--data_root", "/home/somebody/data", f"--run_dir={folder}"]
    inside = ["single_process.py", "--resume", str(ROOT / "runs" / "x")]
    config = {
        "experiment": {**experiment, "client_batching": 1},
        "run": {"command": command, "device": "cpu"},
        "resumed": [{"time": "2026", "run": {"command": inside}}],
    }
    (folder / "config.json").write_text(json.dumps(config))
    if ends:
        scores = [{"accuracy": n / 10} if n % 2 else None for n in range(1, 5)]
        rounds = [{"round_number": n, "seconds": 0.5 * n, "evaluation": one} for n, one in enumerate(scores, 1)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in rounds))
        (folder / "clients.csv").write_text("client_id\n7\n")
        result = {"seconds": 3.0, "rounds": 3, "train_clients": 16, "unseen_clients": 4, "after_fedavg": SUMMARY}
        (folder / "result.json").write_text(json.dumps(result))


SUMMARY = {"initial": {"loss": 0.5, "accuracy": 0.25}, "personalized": {"loss": 0.25, "accuracy": 0.75}}


def test_all_rows_have_a_seed_before_any_has_the_next(tmp_path: Path) -> None:
    """So that a table with one seed is whole as early as can be."""
    jobs = tiny_jobs(tmp_path, 0, 2, 0)
    assert [job.label for job in jobs] == ["a, seed 0", "b, seed 0", "a, seed 2", "b, seed 2"]
    assert jobs[3].run_dir == tmp_path / "runs" / "b" / "seed2"
    assert jobs[3].result_dir == tmp_path / "results" / "b" / "seed2"
    assert utils.get_args("single", jobs[3].argv).experiment.seed == 2


def test_a_command_can_be_pasted_in_any_folder(tmp_path: Path) -> None:
    job, *_ = plan_jobs({"a": TINY_ROW}, [1], ROOT / "runs" / "reproduce" / "mnist", tmp_path)
    _, script, *words = job.command(MACHINE)
    assert (script, words[-2:]) == (str(ROOT / "single_process.py"), ["--run_dir", str(job.run_dir)])
    args = utils.get_args("single", words)
    assert (args.experiment.seed, args.experiment.fedavg.num_rounds, args.device) == (1, 3, "cpu")


def test_an_unfinished_run_goes_on(tmp_path: Path) -> None:
    job = tiny_jobs(tmp_path, 0)[0]
    leave_run(job, job.run_dir, ends=False)
    tiny_jobs(tmp_path, 0)
    assert job.command(MACHINE)[-2:] == ["--resume", str(job.run_dir)]
    assert utils.get_args("single", job.command(MACHINE)[2:]).resume == job.run_dir


class NoSignals(SignalWatch):
    """Leaves the handlers of the tests' own process alone."""

    def __init__(self) -> None:
        self.received = None


def test_what_is_done_is_skipped_and_what_has_ended_is_only_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither is run again: rows take hours."""
    jobs = tiny_jobs(tmp_path, 0)
    leave_run(jobs[0], jobs[0].result_dir)
    leave_run(jobs[1], jobs[1].run_dir)
    monkeypatch.setattr(runner, "Run", lambda *arguments: pytest.fail("a run was started"))
    assert runner.run_jobs(tiny_jobs(tmp_path, 0), MACHINE, NoSignals()) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"[1/2] a, seed 0: done before, in {jobs[0].result_dir}"
    assert second == "[2/2] b, seed 0: 3 s; after FedAvg 25.00%, personalized 75.00%; about 0 s to go"
    assert jobs[1].is_done


@pytest.mark.parametrize("kept", [True, False])
def test_other_flags_are_refused_before_anything_is_started(kept: bool, tmp_path: Path) -> None:
    """Or a table would hold rows of different experiments."""
    job = tiny_jobs(tmp_path, 0)[1]
    folder = job.result_dir if kept else job.run_dir
    leave_run(job, folder, ends=kept)
    assert tiny_jobs(tmp_path, 0)
    with pytest.raises(ValueError, match=f"{folder} holds a run with --rounds 3, not 4; move it away, or name another"):
        tiny_jobs(tmp_path, 0, rounds="4")
    with pytest.raises(ValueError, match=f"--server_lr 1.0, not 0.5; .* with {'--results' if kept else '--runs'}"):
        tiny_jobs(tmp_path, 0, server_lr="0.5")


@pytest.mark.parametrize("table", sorted(folder.name for folder in (ROOT / "results").iterdir() if folder.is_dir()))
def test_the_committed_results_are_those_of_the_rows(table: str, tmp_path: Path) -> None:
    """A default that changes must not make a row another experiment than the one in the tables."""
    there = {file.parent for file in (ROOT / "results" / table).glob("*/seed*/result.json")}
    seeds = sorted({int(folder.name.removeprefix("seed")) for folder in there})
    jobs = plan_jobs(select_rows(table), seeds, tmp_path, ROOT / "results" / table)  # checks those that are done
    assert all(job.is_done for job in jobs if job.flags["seed"] == "0")
    assert there == {job.result_dir for job in jobs if job.is_done}


@pytest.mark.slow
@pytest.mark.parametrize("table", COMPARED[:3])
def test_a_row_of_the_committed_results_comes_out_the_same_again(
    table: str, fashion_and_plays_root: Path, tmp_path: Path
) -> None:
    """The quickest one; on a processor that computes as that of the committed run did."""
    (job,) = plan_jobs(select_rows(table, ["fedsgd"]), [0], tmp_path / "runs", tmp_path / "results")
    subprocess.run(
        job.command(["--data_root", str(fashion_and_plays_root), "--device", "cpu"]), check=True, capture_output=True
    )
    committed, again = (read_result(folder) for folder in (ROOT / "results" / table / "fedsgd" / "seed0", job.run_dir))
    if again["kernels"] != committed["kernels"]:
        pytest.skip(f"this processor computes with {again['kernels']}, the committed run's with {committed['kernels']}")
    assert again["model_sha256"] == committed["model_sha256"]


def test_a_flag_that_an_old_run_did_not_know_counts_as_its_default(tmp_path: Path) -> None:
    """A flag that is added later must not make all results that are there worthless, nor hide a difference."""
    job = tiny_jobs(tmp_path, 0)[0]
    leave_run(job, job.result_dir)
    config = json.loads((job.result_dir / "config.json").read_text())
    del config["experiment"]["precision"]
    (job.result_dir / "config.json").write_text(json.dumps(config))
    assert tiny_jobs(tmp_path, 0)
    with pytest.raises(ValueError, match="holds a run with --precision float32, not bf16"):
        tiny_jobs(tmp_path, 0, precision="bf16")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"experiment": 3}'])
def test_a_damaged_config_is_a_line_with_the_file(content: str | None, tmp_path: Path) -> None:
    job = tiny_jobs(tmp_path, 0)[0]
    leave_run(job, job.result_dir)
    (job.result_dir / "config.json").unlink()
    if content is not None:
        (job.result_dir / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{job.result_dir}/config.json is missing or damaged; move that folder away"):
        check_flags(job, job.result_dir, "--results")


def test_a_row_that_is_no_experiment_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--batch_size 0 must be a whole number from 1"):
        plan_jobs({"a": {**TINY_ROW, "batch_size": "0"}}, [0], tmp_path, tmp_path)


def test_what_is_kept_makes_tables_and_does_not_tell_of_the_machine(tmp_path: Path) -> None:
    job = tiny_jobs(tmp_path, 0)[0]
    leave_run(job, job.run_dir)
    (job.run_dir / "model.safetensors").write_bytes(b"large")
    assert keep_results(job)["seconds"] == 3.0
    assert {path.name for path in job.result_dir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "clients.csv",
        "result.json",
    }
    for name in ("clients.csv", "result.json"):
        assert (job.result_dir / name).read_bytes() == (job.run_dir / name).read_bytes()
    lines = [json.loads(line) for line in (job.result_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"round_number": n, "seconds": 0.5 * n, "evaluation": {"accuracy": n / 10}, "training_seconds": seconds}
        for n, seconds in ((1, 0.5), (3, 0.5 + 1.0 + 1.5))
    ]
    kept, own = (json.loads((folder / "config.json").read_text()) for folder in (job.result_dir, job.run_dir))
    assert kept["run"]["command"] == [
        "single_process.py",
        *job.argv,
        "--data_root",
        ".../data",
        "--run_dir=.../seed0",
    ]
    assert kept["resumed"][0]["run"]["command"] == ["single_process.py", "--resume", "runs/x"]
    assert (kept["experiment"], kept["run"]["device"], kept["resumed"][0]["time"]) == (own["experiment"], "cpu", "2026")
    assert all(str(path) not in (job.result_dir / "config.json").read_text() for path in (ROOT, tmp_path))


def test_a_run_without_rounds_has_no_points(tmp_path: Path) -> None:
    """Local-only training: its metrics.jsonl is empty, and no reason to stumble."""
    job = tiny_jobs(tmp_path, 0)[0]
    leave_run(job, job.run_dir)
    (job.run_dir / "metrics.jsonl").write_bytes(b"")
    keep_results(job)
    assert (job.result_dir / "metrics.jsonl").read_bytes() == b""


def test_a_row_is_done_only_when_all_of_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full disk in the middle of the copy, the next time must copy again."""
    job = tiny_jobs(tmp_path, 0)[0]
    leave_run(job, job.run_dir)

    def fill_disk(path: Path, content: bytes) -> None:
        if path.name == "clients.csv":
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "replace_file", fill_disk)
        with pytest.raises(OSError, match="No space left"):
            keep_results(job)
    assert not job.is_done
    keep_results(job)
    assert job.is_done


def test_the_rest_is_judged_by_the_work_in_it(tmp_path: Path) -> None:
    """The first row of a table takes twenty times as long as the last; a mean a row would be far off."""
    rows = {"a": {**TINY_ROW, "rounds": "300"}, "b": TINY_ROW}
    long, short = plan_jobs(rows, [0], tmp_path / "runs", tmp_path / "results")
    # cohort 5, 2 epochs; fine-tuning 2 rounds, 1 epoch; 100 clients a point, every 2 rounds; 4 unseen, twice
    assert num_passes(short, 20) == 3 * 5 * 2 + 2 * 5 * 1 + (1 + 1) * 100 + 2 * 4
    assert seconds_left([short], [(long, 60.0)], 20) == pytest.approx(
        60.0 * num_passes(short, 20) / num_passes(long, 20)
    )
    assert seconds_left([], [(long, 60.0)], 20) == 0


def test_where_there_are_no_classes_the_loss_is_told() -> None:
    scores = {"initial": {"loss": 4.5, "accuracy": None}, "personalized": {"loss": None, "accuracy": None}}
    line = runner.describe({"seconds": 3700.0, "rounds": 0, "after_fine_tune": scores})
    assert line == "1 h 1 min; after fine-tuning loss 4.5000, personalized no finite loss"


def test_a_model_without_training_is_not_called_trained() -> None:
    line = runner.describe({"seconds": 70.0, "rounds": 0, "after_fedavg": SUMMARY})
    assert line == "1 min 10 s; untrained 25.00%, personalized 75.00%"


def test_a_runs_output_and_status(tmp_path: Path) -> None:
    """It runs in the project's root, whatever the caller's folder, and a log that is there is kept."""
    job = tiny_jobs(tmp_path, 0)[0]
    job.run_dir.parent.mkdir(parents=True)
    log = job.run_dir.with_name("seed0.log")
    log.write_text("before\n")
    code = "import os, sys; print(os.getcwd(), flush=True); print('bad', file=sys.stderr); sys.exit(3)"
    run = Run("[1/1] a", job, [sys.executable, "-c", code])
    run.process.wait()
    assert exit_status(run.process) == 3
    assert log.read_text().splitlines() == ["before", str(ROOT), "bad"]
    assert run.last_words("ended:", 10) == f"a, seed 0: ended:\n{ROOT}\nbad"
    assert run.last_words("stopped", 1) == "a, seed 0: stopped\nbad"
    killed = Run("[1/1] a", job, [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    killed.process.wait()
    assert exit_status(killed.process) == 128 + 9


def test_list_says_what_is_done_and_starts_nothing(tmp_path: Path) -> None:
    """From another folder than the project's; light, so that it answers at once."""
    rows, folder = select_rows("mnist", ["joint"]), tmp_path / "mnist"
    job, *_ = plan_jobs(rows, [0], folder, folder)
    leave_run(job, job.result_dir)
    flags = ["--table", "mnist", "--rows", "joint", "maml", "--seeds", "0", "1", "--results", ".", "--runs", "r"]
    command = [sys.executable, "-X", "importtime", str(ROOT / "reproduce.py"), *flags, "--list"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    joint, joint_command, maml, _ = answer.stdout.splitlines()
    assert (joint, maml) == ("joint: seed 0 done; seed 1 to do", "maml: seed 0 to do; seed 1 to do")
    assert "single_process.py --dataset mnist" in joint_command
    assert not (tmp_path / "r").exists()
    assert not {"torch", "numpy"} & {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table", "digits"], "--table"),
        (["--table", "mnist", "--rows", "E3-C5"], "--rows E3-C5"),
        (["--table", "mnist", "--seeds", "-1"], "--seed -1"),
        (["--table", "mnist", "--nonsense", "1"], "--nonsense"),
    ],
)
def test_malformed_flags_end_with_a_line_and_status_2(flags: list[str], message: str) -> None:
    command = [sys.executable, str(ROOT / "reproduce.py"), *flags, "--list"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert "error: " in answer.stderr.splitlines()[-1]
    assert message in answer.stderr.splitlines()[-1]


def test_the_shell_script_passes_every_word_on(tmp_path: Path) -> None:
    """Also one with a space in it. With a set-up that is there already, nothing is installed."""
    for name in ("reproduce.sh", "setup_venv.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "reproduce.py").write_text("import sys; print(sys.argv[1:])")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    wanted = subprocess.run(["cksum"], input=(tmp_path / "requirements.txt").read_bytes(), capture_output=True).stdout
    (tmp_path / ".venv" / "installed-requirements.txt").write_bytes(wanted)
    command = ["sh", str(tmp_path / "reproduce.sh"), "--results", "a folder"]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert (answer.stdout, answer.stderr) == ("['--results', 'a folder']\n", "")
