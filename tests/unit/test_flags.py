"""Every flag changes something, reaches the process that needs it, and is explained."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

import quick_start
import utils
from datasets.registry import DATA_SETS
from launch.commands import to_argv
from launch.parser import FIRST, build_parser
from launch.settings import ENTRY_POINTS, Server, Worker
from launch.table import PAGE, to_markdown
from perfedavg.fields import flags_by_name
from perfedavg.methods import METHODS
from perfedavg.settings import ExperimentConfig, num_unseen_clients

PLAIN = ["--client_optimizer", "sgd", "--fine_tune_client_optimizer", "sgd"]
"""Steps that all methods go with."""
EXPERIMENT_FLAGS = [
    (["--dataset", "mnist"], lambda c: c.dataset),
    (["--model", "mlp"], lambda c: c.architecture),
    (["--client_num_in_total", "45"], lambda c: c.num_clients),
    (["--unseen_fraction", "0.6"], lambda c: c.unseen_fraction),
    (["--partition", "iid"], lambda c: c.partition),
    (["--client_num_per_round", "7"], lambda c: c.cohort_size),
    (["--batch_size", "7"], lambda c: c.batch_size),
    (["--rounds", "7"], lambda c: c.fedavg.num_rounds),
    (["--local_epochs", "7"], lambda c: c.fedavg.num_local_epochs),
    (["--local_steps", "7"], lambda c: c.fedavg.num_local_steps),
    (["--client_optimizer", "adagrad"], lambda c: c.fedavg.client_optimizer.name),
    (["--server_optimizer", "yogi"], lambda c: c.fedavg.server_optimizer.name),
    (["--server_epsilon", "0.7", "--server_optimizer", "adam"], lambda c: c.fedavg.server_optimizer.epsilon),
    (["--server_lr", "0.7"], lambda c: c.fedavg.server_optimizer.learning_rate),
    (["--server_momentum", "0.7"], lambda c: c.fedavg.server_optimizer.momentum),
    (["--local_lr", "0.7"], lambda c: c.fedavg.client_optimizer.learning_rate),
    (["--method", "fedprox"], lambda c: c.fedavg.method),
    (["--mu", "0.7", "--method", "fedprox"], lambda c: c.fedavg.method),
    (["--support_fraction", "0.7", "--method", "fomaml"], lambda c: c.fedavg.method),
    (["--personal_layers", "0.*", "--method", "fedper"], lambda c: c.fedavg.method),
    (["--head_epochs", "7", "--method", "fedrep"], lambda c: c.fedavg.method),
    (["--personalization_trains", "head", "--method", "fedbabu"], lambda c: c.fedavg.method),
    (["--fine_tune_personal_layers", "0.*", "--fine_tune_method", "fedper"], lambda c: c.fine_tune.method),
    (["--fine_tune_head_epochs", "7", "--fine_tune_method", "fedrep"], lambda c: c.fine_tune.method),
    (["--fine_tune_personalization_trains", "body", "--fine_tune_method", "fedbabu"], lambda c: c.fine_tune.method),
    (["--fine_tune_mu", "0.7", "--fine_tune_method", "fedprox"], lambda c: c.fine_tune.method),
    (["--fine_tune_method", "maml"], lambda c: c.fine_tune.method),
    (["--fine_tune_support_fraction", "0.7", "--fine_tune_method", "maml"], lambda c: c.fine_tune.method),
    (["--fine_tune_local_steps", "7"], lambda c: c.fine_tune.num_local_steps),
    (["--fine_tune_server_schedule", "linear"], lambda c: c.fine_tune.server_schedule),
    (["--fine_tune_server_epsilon", "0.7"], lambda c: c.fine_tune.server_optimizer.epsilon),
    (
        ["--fine_tune_server_momentum", "0.7", "--fine_tune_server_optimizer", "momentum"],
        lambda c: c.fine_tune.server_optimizer.momentum,
    ),
    (["--fine_tune_rounds", "7"], lambda c: c.fine_tune.num_rounds),
    (["--fine_tune_local_epochs", "7"], lambda c: c.fine_tune.num_local_epochs),
    (["--fine_tune_client_optimizer", "adam"], lambda c: c.fine_tune.client_optimizer.name),
    (["--fine_tune_local_lr", "0.7"], lambda c: c.fine_tune.client_optimizer.learning_rate),
    (["--fine_tune_server_optimizer", "sgd"], lambda c: c.fine_tune.server_optimizer.name),
    (["--fine_tune_server_lr", "0.7"], lambda c: c.fine_tune.server_optimizer.learning_rate),
    (["--personalization_epochs", "7"], lambda c: c.num_personalization_epochs),
    (["--personalization_curve", "7"], lambda c: c.num_curve_epochs),
    (["--local_split", "tail"], lambda c: c.local_split),
    (["--local_test_fraction", "1/4"], lambda c: c.local_test_fraction),
    (["--joint", "--client_num_per_round", "1"], lambda c: c.joint),
    (["--validation"], lambda c: c.validation),
    (["--eval_every", "7"], lambda c: c.eval_every),
    (["--eval_clients", "7"], lambda c: c.eval_clients),
    (["--client_column", "writer"], lambda c: c.own_files.client_column),
    (["--label_column", "species"], lambda c: c.own_files.label_column),
    (["--split_column", "part"], lambda c: c.own_files.split_column),
    (["--ignore_columns", "id,name"], lambda c: c.own_files.ignore_columns),
    (["--labels", "numbers"], lambda c: c.own_files.labels),
    (["--standardize", "false"], lambda c: c.own_files.standardize),
    (["--image_size", "64x48"], lambda c: c.own_files.image_size),
    (["--image_color", "rgb"], lambda c: c.own_files.image_color),
    (["--trained_clients_scored", "0"], lambda c: c.num_trained_scored),
    (["--metrics", "macro_f1"], lambda c: c.metrics),
    (["--seed", "7"], lambda c: c.seed),
    (["--initial_model", "runs/x"], lambda c: c.initial_model),
    (["--precision", "bf16"], lambda c: c.precision),
    (["--buffers", "local"], lambda c: c.buffers),
    (["--portable_kernels"], lambda c: c.portable_kernels),
    (["--client_batching", "7"], lambda c: c.client_batching),
]


def config(*argv: str) -> ExperimentConfig:
    experiment: ExperimentConfig = utils.get_args("single", argv).experiment
    return experiment


for flag, value, method in (
    ("ditto_lambda", "0.7", "ditto"),
    ("ditto_epochs", "7", "ditto"),
    ("pfedme_lambda", "0.7", "pfedme"),
    ("pfedme_eta", "0.7", "pfedme"),
    ("pfedme_steps", "7", "pfedme"),
    ("pfedme_beta", "0.7", "pfedme"),
    ("apfl_alpha", "0.7", "apfl"),
    ("apfl_adaptive", "true", "apfl"),
    ("per_fedavg_beta", "0.7", "per_fedavg"),
    ("per_fedavg_variant", "hf", "per_fedavg"),
):
    words = [f"--{flag}", value, "--method", method, *PLAIN[:2], "--fine_tune_method", "none"]
    EXPERIMENT_FLAGS.append((words, lambda c: c.fedavg.method))
    words = [f"--fine_tune_{flag}", value, "--fine_tune_method", method, *PLAIN]
    EXPERIMENT_FLAGS.append((words, lambda c: c.fine_tune.method))
HF = ["--per_fedavg_delta", "0.7", "--method", "per_fedavg", "--per_fedavg_variant", "hf"]
EXPERIMENT_FLAGS.append((HF, lambda c: c.fedavg.method))
EXPERIMENT_FLAGS.append(([word.replace("--", "--fine_tune_") for word in HF], lambda c: c.fine_tune.method))


@pytest.mark.parametrize(("argv", "field"), EXPERIMENT_FLAGS, ids=lambda value: value[0] if type(value) is list else "")
def test_every_flag_of_the_experiment_changes_it(argv: list[str], field: Any) -> None:
    base = [] if "--dataset" in argv else ["--dataset", "digits"]
    assert field(config(*base, *argv)) != field(config("--dataset", "digits"))


def test_the_list_above_holds_every_flag_of_the_experiment() -> None:
    listed = {argv[0].removeprefix("--") for argv, _ in EXPERIMENT_FLAGS}
    assert set(flags_by_name(ExperimentConfig)) | {"initial_model"} == listed


OLDER_NAMES = {
    "struct": "model",
    "epochs": "rounds",
    "inner_loops": "local_epochs",
    "inner_steps": "local_steps",
    "fine_tune_outer_loops": "fine_tune_rounds",
    "fine_tune_inner_loops": "fine_tune_local_epochs",
    "fine_tune_inner_steps": "fine_tune_local_steps",
    "pers_round": "personalization_epochs",
    "pers_curve": "personalization_curve",
}
"""Flags of commands and files that people have; they must go on to work."""


@pytest.mark.parametrize(("older", "name"), OLDER_NAMES.items())
def test_an_older_name_of_a_flag_works_everywhere(older: str, name: str, tmp_path: Path) -> None:
    value = "mlp" if name == "model" else "7"
    expected = config("--dataset", "digits", f"--{name}", value)
    assert config("--dataset", "digits", f"--{older}", value) == expected
    assert config("--dataset", "digits", f"--{older}={value}") == expected
    file = tmp_path / "settings.toml"
    file.write_text(f'dataset = "digits"\n{older} = "{value}"\n')
    assert config("--config", str(file)) == expected
    assert config("--config", str(file), f"--{name}", value) == expected
    with pytest.raises(ValueError, match=f"^--{older} and --{name} are names of the same flag; leave one of them out$"):
        config(f"--{older}", value, f"--{name}={value}")


def test_no_older_name_of_a_flag_is_shown_as_its_name() -> None:
    for kind in ENTRY_POINTS.values():
        aliases = {alias for flag in flags_by_name(kind).values() for alias in flag.aliases}
        assert aliases <= set(OLDER_NAMES)
        assert not aliases & set(flags_by_name(kind))
        words = set(re.findall(r"[\w-]+", build_parser(kind).format_help()))
        assert not {f"--{alias}" for alias in aliases} & words
    assert all(f"| `--{older}` | `--{name}` |" in to_markdown() for older, name in OLDER_NAMES.items())


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
    for dataset, model in (("shakespeare", "cnn"), ("mnist", "lstm"), ("sine", "cnn")):
        with pytest.raises(ValueError, match=f"--model {model} does not fit {dataset}"):
            config("--dataset", dataset, "--model", model)
    assert config("--dataset", "shakespeare").architecture == "lstm"
    assert config("--dataset", "plays").architecture == "lstm_each_step"
    assert config("--dataset", "plays", "--model", "char_transformer").architecture == "char_transformer"


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


@pytest.mark.parametrize("older", [["--fine_tune", "False"], ["--fine_tune=none"]])
def test_no_fine_tuning_can_be_said_as_older_commands_do(older: list[str], tmp_path: Path) -> None:
    assert config("--fine_tune_method", "none").fine_tune is None
    assert config(*older, "--fine_tune_method", "maml").fine_tune is None
    assert config("--fine_tune", "--fine_tune_method", "maml") == config("--fine_tune_method", "maml")
    (tmp_path / "none.toml").write_text("fine_tune = false\n")
    assert config("--config", str(tmp_path / "none.toml")).fine_tune is None


def test_another_runs_missing_phase_can_be_added(tmp_path: Path) -> None:
    run = begun_run(tmp_path / "run", "--dataset", "digits", "--fine_tune_method", "none")
    added = config("--config", str(run / "config.json"), "--fine_tune_method", "reptile")
    assert added.fine_tune == config("--dataset", "digits").fine_tune
    with pytest.raises(ValueError, match=r"^--fine_tune_method reptile differs from the run's none; leave it out"):
        utils.get_args("single", ["--resume", str(run), "--fine_tune_method", "reptile"])


@pytest.mark.parametrize("method", METHODS)
def test_fine_tuning_is_left_out_where_it_has_no_meaning(method: str) -> None:
    """By default; who asks for it is told why. Without a round of phase 1 it has one after all."""
    command = ["--dataset", "digits", "--method", method]
    goes_on = METHODS[method].goes_on
    assert (utils.get_args("single", command).experiment.fine_tune is not None) == goes_on
    asked = [*command, "--fine_tune_method", "reptile"]
    if not goes_on:
        with pytest.raises(ValueError, match=f"--fine_tune_method reptile cannot go on from --method {method}, .*none"):
            utils.get_args("single", asked)
    for more in (["--rounds", "0"], [] if goes_on else ["--rounds", "0"]):
        assert utils.get_args("single", [*asked, *more]).experiment.fine_tune.method.name == "reptile"


def test_a_clients_adam_has_no_first_moment() -> None:
    settings = config("--fine_tune_client_optimizer", "adam")
    assert settings.fine_tune is not None
    assert settings.fine_tune.client_optimizer.betas == (0.0, 0.999)


def test_quick_start_passes_every_flag_on() -> None:
    """What a user gives to quick_start.sh must arrive at the server or the workers unchanged."""
    known = flags_by_name(ExperimentConfig)
    without_effect = {"local_epochs", "fine_tune_local_epochs", "server_momentum", "fine_tune_server_momentum"}
    argv = []
    for words, _ in EXPERIMENT_FLAGS:
        name = words[0].removeprefix("--")
        setting = known.get(name)
        if name not in without_effect and (setting is None or not setting.by_choice or "fomaml" in setting.by_choice):
            argv += words
    argv += ["--fine_tune_client_optimizer", "sgd"]  # the only one that goes with maml
    argv += ["--fine_tune_server_optimizer", "adam"]  # which has an epsilon
    argv += ["--method", "fomaml"]  # which fine-tuning can go on from
    argv += ["--fine_tune_method", "maml"]  # which bf16 is not too coarse for
    argv += ["--run_dir", "/tmp/x", "--data_root", "/tmp/y", "--device", "cpu", "--threads", "3", "--backend", "gloo"]
    args = utils.get_args("quick_start", argv)
    server = utils.get_args("server", to_argv(args, Server))
    assert (server.experiment, server.initial_model) == (args.experiment, args.initial_model)
    assert (server.run_dir, server.data_root) == (Path("/tmp/x"), Path("/tmp/y"))
    worker = utils.get_args("worker", to_argv(args, Worker, rank=1))
    assert (worker.device, worker.threads, worker.data_root) == ("cpu", 3, Path("/tmp/y"))


def test_workers_that_quick_start_starts_try_to_join_for_as_long_as_the_server_waits() -> None:
    """Where many processes start on a slow machine, the server may need longer than a worker would try by default."""
    (*_, argv, _), *workers = quick_start.programs(utils.get_args("quick_start", ["--workers", "3"]))
    server = utils.get_args("server", argv)
    assert len(workers) == 3
    for *_, argv, _ in workers:
        assert utils.get_args("worker", argv).join_timeout_seconds == server.join_timeout_seconds


def begun_run(path: Path, *argv: str, **settled: object) -> Path:
    """A folder with the config.json that a run with these flags leaves, with what it has settled."""
    path.mkdir()
    args = utils.get_args("single", argv)
    content: dict[str, Any] = {"experiment": {**args.experiment.to_dict(), "client_batching": 1, **settled}}
    if args.initial_model is not None:
        content["initial_model_path"] = str(args.initial_model)
    (path / "config.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("base", [["--dataset", "femnist"], ["--dataset", "digits", "--fine_tune_method", "none"]])
@pytest.mark.parametrize("role", ["single", "server", "quick_start", "cluster"])
def test_resume_takes_the_experiment_from_the_run(base: list[str], role: str, tmp_path: Path) -> None:
    """Also for the processes that quick_start.py starts; how it is run is up to the present command line."""
    argv = [*base, "--rounds", "7", "--local_lr", "0.1", "--server_lr", "0.3333333333333333"]
    run = begun_run(tmp_path / "run", *argv)
    words = ["--resume", str(run), "--data_root", "/elsewhere", "--checkpoint_every", "3"]
    args = utils.get_args(role, [*words, *(["--hosts", "hosts.txt"] if role == "cluster" else [])])
    recorded = dataclasses.replace(config(*argv), client_batching=1)
    assert args.experiment == recorded
    server = utils.get_args("server", to_argv(args, Server))
    assert server.experiment == recorded
    assert (server.resume, server.data_root, server.checkpoint_every) == (run, Path("/elsewhere"), 3)


def test_resume_refuses_another_experiment_but_not_the_same(tmp_path: Path) -> None:
    run = str(begun_run(tmp_path / "run", "--dataset", "mnist", "--rounds", "7"))
    for given, recorded in (
        (["--rounds", "8"], "7"),
        (["--dataset", "emnist"], "mnist"),
        (["--seed", "1"], "0"),
        (["--initial_model", "/x"], "None"),
    ):
        with pytest.raises(ValueError, match="differs") as refusal:
            utils.get_args("single", ["--resume", run, *given])
        message = f"{' '.join(given)} differs from the run's {recorded}; leave it out, or start a new run"
        assert str(refusal.value) == message
    same = ["--epochs", "7", "--dataset", "mnist", "--struct", "cnn", "--seed", "0"]
    assert utils.get_args("single", ["--resume", run, *same]).experiment.fedavg.num_rounds == 7


def test_a_resumed_run_keeps_what_it_has_settled(tmp_path: Path) -> None:
    """Settled anew, on another device or from another file, it would be another experiment. The flags fit it."""
    digest = "ab" * 32
    run = begun_run(tmp_path / "run", "--initial_model", "/gone", client_batching=16, initial_model=digest)
    for given in ([], ["--client_batching", "16"], ["--client_batching", "auto"], ["--initial_model", "/new"]):
        args = utils.get_args("single", ["--resume", str(run), *given])
        assert (args.experiment.client_batching, args.experiment.initial_model) == (16, digest)
        assert args.initial_model == (Path("/new") if "/new" in given else Path("/gone"))
    with pytest.raises(ValueError, match="--client_batching 4 differs from the run's 16"):
        utils.get_args("single", ["--resume", str(run), "--client_batching", "4"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("client_batching", None, "not settled"),
        ("batch_size", "20", 'batch_size is "20", must be a whole number'),
        ("batch_size", 10**30, "--batch_size 1000000000000000000000000000000 must be a whole number from 1"),
        ("fedavg", [1], "fedavg is an array, must be an object"),
        ("epochs", 2, "epochs is unknown"),
    ],
)
def test_a_config_json_that_was_damaged_is_refused(name: str, value: object, said: str, tmp_path: Path) -> None:
    run = begun_run(tmp_path / "run", "--dataset", "digits")
    content = json.loads((run / "config.json").read_text())
    content["experiment"][name] = value
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        utils.get_args("single", ["--resume", str(run)])
    assert f"--resume {run}" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_run_of_an_earlier_version_is_not_resumed(tmp_path: Path) -> None:
    """Its settings have other meanings."""
    run = begun_run(tmp_path / "run", "--dataset", "digits")
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({"flags": {"dataset": "digits"}, **content}))
    with pytest.raises(ValueError, match=r"of another version of this project .*; restore it, or start a new run"):
        utils.get_args("single", ["--resume", str(run)])


def test_a_file_gives_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        'dataset = "digits"\nrounds = 7\nserver_lr = 0.5\njoint = true\nclient_num_per_round = 1\nport = 4000\n'
    )
    args = utils.get_args("server", ["--config", str(file), "--server_lr", "0.7"])
    assert args.experiment == config(
        *("--dataset", "digits", "--rounds", "7", "--server_lr", "0.7", "--joint", "--client_num_per_round", "1")
    )
    assert args.port == 4000
    assert utils.get_args("single", ["--config", str(file)]).experiment.fedavg.server_optimizer.learning_rate == 0.5


def test_another_runs_config_gives_its_experiment(tmp_path: Path) -> None:
    given = ("--dataset", "digits", "--fine_tune_method", "maml", "--fine_tune_server_lr", "0.3", "--partition", "iid")
    run = begun_run(tmp_path / "run", *given)
    other = config("--config", str(run / "config.json"), "--seed", "5")
    assert other == dataclasses.replace(config(*given), seed=5, client_batching=1)
    assert config("--config", str(run / "config.json"), "--dataset", "emnist").architecture == "emnist_cnn"


def test_a_files_settings_that_the_command_line_makes_idle_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("dataset = 'digits'\nserver_momentum = 0.5\nfine_tune_rounds = 7\nlocal_epochs = 3\n")
    words = ["--server_optimizer", "sgd", "--fine_tune_method", "none", "--local_steps", "2"]
    args = utils.get_args("quick_start", ["--config", str(file), *words])
    assert args.experiment.fine_tune is None
    server = utils.get_args("server", to_argv(args, Server))
    assert server.experiment == config("--dataset", "digits", *words)
    run = str(begun_run(tmp_path / "run", "--config", str(file), *words))
    assert utils.get_args("single", ["--resume", run, "--config", str(file), *words]).experiment.fine_tune is None
    with pytest.raises(ValueError, match=r"^--server_momentum 0.5 has no effect with --server_optimizer sgd; leave it"):
        utils.get_args("single", ["--resume", run, "--server_momentum", "0.5"])
    file.write_text("fine_tune_method = 'none'\nfine_tune_rounds = 7\n")
    with pytest.raises(ValueError, match=r"^--fine_tune_rounds 7 has no effect with --fine_tune_method none; leave it"):
        config("--config", str(file))


def test_a_class_of_ones_own_says_who_is_unseen_and_validation_takes_a_share_of_the_others() -> None:
    """So that any number of clients may be asked of it."""
    assert config("--dataset", "my:Data", "--client_num_in_total", "12").num_clients == 12
    validated = config("--dataset", "my:Data", "--unseen_fraction", "0.3", "--validation")
    assert validated.unseen_fraction == "0.3"


def test_a_files_settings_go_with_its_method(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("method = 'fedprox'\nmu = 0.3\n")
    assert config("--config", str(file)).fedavg.method == METHODS["fedprox"](mu=0.3)
    assert config("--config", str(file), "--method", "fomaml") == config("--method", "fomaml")
    file.write_text("mu = 0.3\n")
    with pytest.raises(ValueError, match=re.escape("--mu 0.3 is a setting of fedprox, and --method is fedavg")):
        config("--config", str(file))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("colour = 1", "colour is unknown; use the names of flags without dashes"),
        ("rounds = 7.5", "--rounds 7.5 must be a whole number from 0"),
        ("epochs = [7]", "--rounds [7] must be a whole number"),
        ("local_split = 'head'", "--local_split head is unknown; use one of shuffled, tail"),
        ("rounds = ", "Invalid value"),
    ],
)
def test_an_error_in_a_file_is_one_line_with_the_file_and_the_key(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        utils.get_args("single", ["--config", str(file)])
    assert len(str(refusal.value).splitlines()) == 1
    assert "local_split" in text or str(refusal.value).startswith(f"--config {file}: ")
    with pytest.raises(ValueError, match="--config /nowhere"):
        utils.get_args("single", ["--config", "/nowhere"])


def test_quick_start_defaults_to_the_data_that_needs_no_download() -> None:
    experiment = utils.get_args("quick_start", []).experiment
    assert (experiment.dataset, experiment.num_clients) == ("digits", 50)


def test_the_data_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFEDAVG_DATA", "/somewhere")
    assert utils.get_args("single", []).data_root == Path("/somewhere")
    assert utils.get_args("single", ["--data_root", "/else"]).data_root == Path("/else")
    monkeypatch.delenv("PERFEDAVG_DATA")
    assert utils.get_args("single", []).data_root == ROOT / "datasets" / "data"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dataset", "cifar"], "--dataset cifar is unknown; use one of emnist"),
        (["--rounds", "x"], "--rounds x must be a whole number from 0"),
        (["--threads", "0"], "--threads 0 must be a whole number from 1 to 1024"),
        (["--dataset", "digit"], "--dataset digit is unknown; use digits, or one of emnist"),
        (
            ["--fine_tune", "maybe"],
            "--fine_tune maybe is unknown; use --fine_tune_method, with none for no fine-tuning",
        ),
        (["--fine_tune_method", "reptil"], "--fine_tune_method reptil is unknown; use reptile, or one of fedavg"),
        (["--nonsense", "1"], "--nonsense is unknown; "),
        (["--epoch", "1"], "--epoch is unknown; use --rounds; "),
        (["--client_per_round=1"], "--client_per_round is unknown; use --client_num_per_round; "),
        (
            ["--mu", "0.1"],
            "--mu 0.1 is a setting of fedprox, and --method is fedavg; leave it out, or use --method fedprox",
        ),
        (
            ["--fine_tune_method", "maml", "--support_fraction", "0.3"],
            "--support_fraction 0.3 is a setting of fomaml and maml, and --method is fedavg; leave it out, or use "
            "--fine_tune_support_fraction",
        ),
        (["--method", "ditto", "--fine_tune_mu", "1"], "and --fine_tune_method is none; leave it out"),
        (
            ["--fine_tune_method", "none", "--fine_tune_rounds", "7"],
            "--fine_tune_rounds 7 has no effect with --fine_tune_method none; leave it out",
        ),
        (["--method", "ditto", "--fine_tune_local_lr", "1"], "no effect with --fine_tune_method none; leave it out"),
        (
            ["--server_optimizer", "sgd", "--server_momentum", "0.9"],
            "--server_momentum 0.9 has no effect with --server_optimizer sgd; leave it out, or use --server_optimizer "
            "momentum",
        ),
        (["--server_epsilon", "1"], "with --server_optimizer momentum; leave it out, or use --server_optimizer adam"),
        (
            ["--local_epochs", "3", "--local_steps", "7"],
            "--local_epochs 3 has no effect with --local_steps 7; leave it",
        ),
        (
            ["--method", "per_fedavg", "--per_fedavg_delta", "1"],
            "with --per_fedavg_variant fo; leave it out, or use --per_fedavg_variant hf",
        ),
        (
            ["--dataset", "my:Data", "--unseen_fraction", "0"],
            "--unseen_fraction 0 has no meaning for my:Data: it says itself which clients are unseen; leave it out",
        ),
        (["--rank", "1"], "--rank is a flag of client_worker.py, not of "),
        (["digits"], "'digits' is neither a flag nor the value of one; "),
    ],
)
def test_malformed_flags_are_one_line(argv: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        utils.get_args("single", argv)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_malformed_flag_ends_with_a_line_and_status_2() -> None:
    for entry_point in ("single_process.py", "quick_start.py", "reproduce.py"):
        command = [sys.executable, str(ROOT / entry_point), "--rounds", "x", "--rows", "--dataset"]
        answer = subprocess.run(command, capture_output=True, text=True)
        assert (answer.returncode, answer.stdout, len(answer.stderr.splitlines())) == (2, "", 1), answer.stderr
        assert answer.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "entry_point",
    ["server.py", "client_worker.py", "server_or_worker.py", "single_process.py", "quick_start.py", "cluster.py"],
)
def test_help_explains_every_flag_without_loading_torch(entry_point: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / entry_point), "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "300"})
    assert answer.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert not {"torch", "numpy", "fedlab"} & loaded
    explained = answer.stdout.split("\n  --")[1:]
    assert len(explained) > 5
    for text in explained:
        assert "default" in text or text.startswith(("rank", "config")), text
    assert "\n  --".join(explained).index("data_root") < 5000, "what a newcomer looks for comes first"


@pytest.mark.parametrize("role", ENTRY_POINTS)
def test_the_flags_of_a_newcomer_are_ten_at_most(role: str) -> None:
    names = flags_by_name(ENTRY_POINTS[role])
    assert len([name for name in FIRST if name in names]) <= 10
    assert set(FIRST) <= {name for kind in ENTRY_POINTS.values() for name in flags_by_name(kind)}
    text = build_parser(ENTRY_POINTS[role]).format_help()
    assert all(f"--{name} " in text for name in names)


@pytest.mark.parametrize("dataset", DATA_SETS)
def test_describe_shows_the_clients_of_a_run(dataset: str) -> None:
    """Its defaults must be those of a run, or it describes other clients than those that train."""
    described = utils.get_args("describe", ["--dataset", dataset])
    run = utils.get_args("single", ["--dataset", dataset])
    for name in (
        "dataset",
        "num_clients",
        "unseen_fraction",
        "partition",
        "local_split",
        "local_test_fraction",
        "seed",
    ):
        assert getattr(described, name) == getattr(run.experiment, name)
    assert described.data_root == run.data_root


@pytest.mark.parametrize("dataset", DATA_SETS)
def test_the_defaults_of_a_data_set_name_settings(dataset: str) -> None:
    """One that is misspelled would silently do nothing."""
    paths = {".".join(flag.path) for flag in flags_by_name(ExperimentConfig).values()}
    assert set(DATA_SETS[dataset].defaults) <= paths


def test_the_table_of_flags_is_that_of_the_fields() -> None:
    """`python -m launch.table` writes it."""
    assert PAGE.read_text() == to_markdown()
    for kind in ENTRY_POINTS.values():
        assert all(f"| `--{name}` |" in to_markdown() for name in flags_by_name(kind))
