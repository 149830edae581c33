"""Every flag changes something, reaches the process that needs it, and is explained."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT

import utils
from perfedavg.settings import ExperimentConfig, num_unseen_clients

EXPERIMENT_FLAGS = [
    (["--dataset", "mnist"], lambda c: c.dataset),
    (["--struct", "mlp"], lambda c: c.architecture),
    (["--client_num_in_total", "45"], lambda c: c.num_clients),
    (["--unseen_fraction", "0.4"], lambda c: c.unseen_fraction),
    (["--partition", "iid"], lambda c: c.partition),
    (["--client_num_per_round", "7"], lambda c: c.cohort_size),
    (["--batch_size", "7"], lambda c: c.batch_size),
    (["--epochs", "7"], lambda c: c.fedavg.num_rounds),
    (["--inner_loops", "7"], lambda c: c.fedavg.num_local_epochs),
    (["--inner_steps", "7"], lambda c: c.fedavg.num_local_steps),
    (["--client_optimizer", "adagrad"], lambda c: c.fedavg.client_optimizer.name),
    (["--server_optimizer", "yogi"], lambda c: c.fedavg.server_optimizer.name),
    (["--server_epsilon", "0.7", "--server_optimizer", "adam"], lambda c: c.fedavg.server_optimizer.epsilon),
    (["--server_lr", "0.7"], lambda c: c.fedavg.server_optimizer.learning_rate),
    (["--server_momentum", "0.7"], lambda c: c.fedavg.server_optimizer.momentum),
    (["--local_lr", "0.7"], lambda c: c.fedavg.client_optimizer.learning_rate),
    (["--fine_tune", "false"], lambda c: c.fine_tune),
    (["--fine_tune_method", "maml"], lambda c: c.fine_tune.method),
    (["--fine_tune_support_fraction", "0.7"], lambda c: c.fine_tune.support_fraction),
    (["--fine_tune_inner_steps", "7"], lambda c: c.fine_tune.num_local_steps),
    (["--fine_tune_server_schedule", "linear"], lambda c: c.fine_tune.server_schedule),
    (["--fine_tune_server_epsilon", "0.7"], lambda c: c.fine_tune.server_optimizer.epsilon),
    (
        ["--fine_tune_server_momentum", "0.7", "--fine_tune_server_optimizer", "momentum"],
        lambda c: c.fine_tune.server_optimizer.momentum,
    ),
    (["--fine_tune_outer_loops", "7"], lambda c: c.fine_tune.num_rounds),
    (["--fine_tune_inner_loops", "7"], lambda c: c.fine_tune.num_local_epochs),
    (["--fine_tune_client_optimizer", "adam"], lambda c: c.fine_tune.client_optimizer.name),
    (["--fine_tune_local_lr", "0.7"], lambda c: c.fine_tune.client_optimizer.learning_rate),
    (["--fine_tune_server_optimizer", "sgd"], lambda c: c.fine_tune.server_optimizer.name),
    (["--fine_tune_server_lr", "0.7"], lambda c: c.fine_tune.server_optimizer.learning_rate),
    (["--pers_round", "7"], lambda c: c.num_personalization_epochs),
    (["--pers_curve", "7"], lambda c: c.num_curve_epochs),
    (["--local_split", "tail"], lambda c: c.local_split),
    (["--joint", "--client_num_per_round", "1"], lambda c: c.joint),
    (["--validation"], lambda c: c.validation),
    (["--eval_every", "7"], lambda c: c.eval_every),
    (["--eval_clients", "7"], lambda c: c.eval_clients),
    (["--seed", "7"], lambda c: c.seed),
    (["--initial_model", "runs/x"], lambda c: c.initial_model),
    (["--precision", "bf16"], lambda c: c.precision),
    (["--portable_kernels"], lambda c: c.portable_kernels),
    (["--client_batching", "7"], lambda c: c.client_batching),
]


def config(*argv: str) -> ExperimentConfig:
    return utils.config_from_args(utils.get_args("single", argv))


@pytest.mark.parametrize(("argv", "field"), EXPERIMENT_FLAGS, ids=lambda value: value[0] if type(value) is list else "")
def test_every_flag_of_the_experiment_changes_it(argv: list[str], field: object) -> None:
    base = [] if "--dataset" in argv else ["--dataset", "digits"]
    assert field(config(*base, *argv)) != field(config("--dataset", "digits"))


def test_the_list_above_holds_every_flag_of_the_experiment() -> None:
    listed = {argv[0].removeprefix("--") for argv, _ in EXPERIMENT_FLAGS}
    settings = {"run_dir", "resume", "checkpoint_every", "data_root", "device", "threads"}
    assert set(vars(utils.get_args("single", []))) == listed | settings


def test_emnist_gets_the_papers_experiment() -> None:
    settings = config()
    assert (settings.dataset, settings.architecture) == ("emnist", "emnist_cnn")
    assert (settings.num_clients, num_unseen_clients(3400, settings.unseen_fraction), settings.partition) == (
        3400,
        680,
        "shards:2",
    )
    assert (settings.fedavg.num_rounds, settings.fedavg.server_optimizer.momentum) == (500, 0.9)
    assert settings.fine_tune is not None
    assert (settings.fine_tune.num_rounds, settings.fine_tune.num_local_epochs) == (100, 10)
    assert (settings.batch_size, settings.num_personalization_epochs) == (20, 5)


def test_femnist_trains_on_the_first_2500_of_3400_writers() -> None:
    settings = config("--dataset", "femnist")
    assert (settings.num_clients, settings.partition, settings.architecture) == (None, None, "emnist_cnn")
    assert num_unseen_clients(3400, settings.unseen_fraction) == 900


def test_a_model_that_does_not_fit_the_data_is_refused() -> None:
    for dataset, struct in (("shakespeare", "cnn"), ("mnist", "lstm"), ("sine", "cnn")):
        with pytest.raises(ValueError, match=f"--struct {struct} does not fit {dataset}"):
            config("--dataset", dataset, "--struct", struct)
    assert config("--dataset", "shakespeare").architecture == "lstm"


@pytest.mark.parametrize(
    ("argv", "rate"),
    [
        ([], 1.0),
        (["--fine_tune_method", "fomaml"], 0.1),
        (["--fine_tune_method", "maml"], 0.1),
        (["--fine_tune_method", "maml", "--fine_tune_server_optimizer", "momentum"], 0.1),
        (["--fine_tune_server_optimizer", "adam"], 0.001),
        (["--fine_tune_method", "fomaml", "--fine_tune_server_optimizer", "yogi"], 0.001),
        (["--dataset", "digits"], 0.001),
        (["--dataset", "digits", "--fine_tune_server_optimizer", "sgd"], 1.0),
        (["--fine_tune_method", "maml", "--fine_tune_server_lr", "0.7"], 0.7),
    ],
)
def test_the_rate_of_phase_2_fits_what_the_server_does_with_it(argv: list[str], rate: float) -> None:
    """A step of 1.0 is an average for Reptile, and destroys a model with Adam."""
    settings = config(*argv)
    assert settings.fine_tune is not None
    assert settings.fine_tune.server_optimizer.learning_rate == rate


def test_no_fine_tuning_can_be_said_in_two_ways() -> None:
    assert config("--fine_tune_method", "none").fine_tune is config("--fine_tune", "false").fine_tune is None


def test_a_clients_adam_has_no_first_moment() -> None:
    settings = config("--fine_tune_client_optimizer", "adam")
    assert settings.fine_tune is not None
    assert settings.fine_tune.client_optimizer.betas == (0.0, 0.999)


def test_quick_start_passes_every_flag_on() -> None:
    """What a user gives to quick_start.sh must arrive at the server or the workers unchanged."""
    argv = [word for flags, _ in EXPERIMENT_FLAGS for word in flags]
    argv += ["--fine_tune_client_optimizer", "sgd"]  # the only one that goes with maml
    argv += ["--run_dir", "/tmp/x", "--data_root", "/tmp/y", "--device", "cpu", "--threads", "3", "--backend", "gloo"]
    args = utils.get_args("quick_start", argv)
    server = utils.get_args("server", utils.to_argv(args, "server"))
    assert utils.config_from_args(server) == utils.config_from_args(args)
    assert (server.run_dir, server.data_root) == (Path("/tmp/x"), Path("/tmp/y"))
    args.rank = 1
    worker = utils.get_args("worker", utils.to_argv(args, "worker"))
    assert (worker.device, worker.threads, worker.data_root) == ("cpu", 3, Path("/tmp/y"))


def unfinished_run(path: Path, *argv: str) -> Path:
    """A folder with the config.json that a run with these flags leaves."""
    path.mkdir()
    flags = utils.experiment_flags(utils.get_args("single", argv))
    (path / "config.json").write_text(json.dumps({"flags": flags}))
    return path


@pytest.mark.parametrize("base", [["--dataset", "femnist"], ["--dataset", "digits", "--fine_tune", "false"]])
@pytest.mark.parametrize("role", ["single", "server", "quick_start"])
def test_resume_takes_the_experiment_from_the_run(base: list[str], role: str, tmp_path: Path) -> None:
    """Also for the processes that quick_start.py starts; how it is run is up to the present command line."""
    argv = [*base, "--epochs", "7", "--local_lr", "0.1", "--server_lr", "0.3333333333333333"]
    run = unfinished_run(tmp_path / "run", *argv)
    args = utils.get_args(role, ["--resume", str(run), "--data_root", "/elsewhere", "--checkpoint_every", "3"])
    assert utils.config_from_args(args) == config(*argv)
    server = utils.get_args("server", utils.to_argv(args, "server"))
    assert utils.config_from_args(server) == config(*argv)
    assert (server.resume, server.data_root, server.checkpoint_every) == (run, Path("/elsewhere"), 3)


def test_resume_refuses_another_experiment_but_not_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(unfinished_run(tmp_path / "run", "--dataset", "mnist", "--epochs", "7"))
    for given, recorded in ((["--epochs", "8"], "7"), (["--dataset", "emnist"], "mnist"), (["--seed", "1"], "0")):
        with pytest.raises(SystemExit) as end:
            utils.get_args("single", ["--resume", run, *given])
        assert end.value.code == 2
        message = f"error: {' '.join(given)} differs from the run's {recorded}; leave it out, or start a new run\n"
        assert capsys.readouterr().err == message
    same = utils.get_args("single", ["--resume", run, "--epochs", "7", "--dataset", "mnist", "--seed", "0"])
    assert same.epochs == 7


def begun_run(path: Path, *argv: str, **settled: object) -> Path:
    """A folder with the config.json that a run with these flags leaves, with what it has settled."""
    run = unfinished_run(path, *argv)
    content = json.loads((run / "config.json").read_text())
    experiment = {**config(*argv).to_dict(), "client_batching": 1, **settled}
    (run / "config.json").write_text(json.dumps({**content, "experiment": experiment}))
    return run


def resumed(run: Path, *argv: str) -> ExperimentConfig:
    return utils.experiment_from_args(utils.get_args("single", ["--resume", str(run), *argv]))


def test_a_resumed_run_keeps_what_it_has_settled(tmp_path: Path) -> None:
    """Settled anew, on another device or from another file, it would be another experiment. The flags fit it."""
    digest = "ab" * 32
    run = begun_run(tmp_path / "run", "--initial_model", "gone", client_batching=16, initial_model=digest)
    for given in ([], ["--client_batching", "16"], ["--client_batching", "auto"], ["--initial_model", "gone"]):
        settled = resumed(run, *given)
        assert (settled.client_batching, settled.initial_model) == (16, digest)
    with pytest.raises(SystemExit):
        resumed(run, "--client_batching", "4")


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("flags", "seed", 5, "seed is 5, was 0"),
        ("experiment", "seed", 5, "seed is 0, was 5"),
        ("experiment", "batch_size", 7, "batch_size is 20, was 7"),
        ("experiment", "client_batching", None, "not settled"),
        ("experiment", "initial_model", "ab" * 32, "initial_model is None, was abab"),
        ("flags", "fine_tune", False, "fine_tune is None"),
        ("experiment", "batch_size", "20", 'batch_size is "20", must be a whole number'),
        ("experiment", "epochs", 2, "epochs is unknown"),
    ],
)
def test_a_config_json_that_was_edited_is_refused(
    part: str, name: str, value: object, said: str, tmp_path: Path
) -> None:
    """Also before the first checkpoint: else the run would silently become another experiment."""
    run = begun_run(tmp_path / "run", "--dataset", "digits")
    content = json.loads((run / "config.json").read_text())
    content[part][name] = value
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        resumed(run)
    assert str(run) in str(refusal.value)


@pytest.mark.parametrize("value", ["12", [12], {"a": 1}, 1.5, True, 10**30])
def test_a_flag_of_another_type_in_config_json_is_one_line(
    value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun_run(tmp_path / "run", "--dataset", "digits")
    content = json.loads((run / "config.json").read_text())
    content["flags"]["epochs"] = value
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises((SystemExit, ValueError)) as refusal:
        resumed(run)
    said = capsys.readouterr().err or str(refusal.value)
    assert "epochs" in said or "num_rounds" in said
    assert len(said.strip().splitlines()) == 1


def test_quick_start_defaults_to_the_data_that_needs_no_download() -> None:
    assert utils.get_args("quick_start", []).dataset == "digits"
    assert utils.get_args("quick_start", []).client_num_in_total == 50


def test_the_data_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFEDAVG_DATA", "/somewhere")
    assert utils.get_args("single", []).data_root == Path("/somewhere")
    assert utils.get_args("single", ["--data_root", "/else"]).data_root == Path("/else")
    monkeypatch.delenv("PERFEDAVG_DATA")
    assert utils.get_args("single", []).data_root == ROOT / "datasets" / "data"


@pytest.mark.parametrize(
    "argv",
    [["--dataset", "cifar"], ["--epochs", "x"], ["--threads", "0"], ["--fine_tune", "maybe"], ["--nonsense", "1"]],
)
def test_malformed_flags_end_with_a_line_and_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        utils.get_args("single", argv)
    assert end.value.code == 2
    assert argv[-1] in capsys.readouterr().err


@pytest.mark.parametrize("entry_point", ["server.py", "client_worker.py", "single_process.py", "quick_start.py"])
def test_help_explains_every_flag_without_loading_torch(entry_point: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / entry_point), "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "300"})
    assert answer.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert not {"torch", "numpy", "fedlab"} & loaded
    explained = answer.stdout.split("\n  --")[1:]
    assert len(explained) > 5
    for text in explained:
        assert "default" in text or text.startswith("rank"), text


def test_build_parser_says_which_flags_stand_in_two_groups() -> None:
    """Whoever changes a flag must know that there is another one of its name."""
    groups = [value for name, value in vars(utils).items() if name.startswith("_add_") and _is_group(value)]
    names: Counter[str] = Counter()
    for add in groups:
        parser = argparse.ArgumentParser(add_help=False)
        add(parser)
        names.update(action.option_strings[0] for action in parser._actions)
    twice = {name for name, count in names.items() if count > 1}
    documentation = utils.build_parser.__doc__ or ""
    assert set(re.findall(r"`(--\w+)`", documentation)) == twice


def _is_group(value: object) -> bool:
    return inspect.isfunction(value) and list(inspect.signature(value).parameters) == ["parser"]


def test_the_readme_lists_every_flag() -> None:
    readme = (ROOT / "README.md").read_text()
    for role in ("server", "worker", "single", "quick_start"):
        for action in utils.build_parser(role)._actions:
            assert action.dest == "help" or f"`--{action.dest}`" in readme, action.dest


@pytest.mark.parametrize("dataset", utils.DATASET_DEFAULTS)
def test_describe_shows_the_clients_of_a_run(dataset: str) -> None:
    """Its defaults must be those of a run, or it describes other clients than those that train."""
    described = vars(utils.get_args("describe", ["--dataset", dataset]))
    run = vars(utils.get_args("single", ["--dataset", dataset]))
    assert described == {**{name: run[name] for name in described if name != "plot"}, "plot": None}
