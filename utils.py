"""Where flags become objects: the flags of every entry point, and the configuration, data and model they stand for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import paths
from datasets.registry import DatasetRequest, find, load_federated_dataset, meaningless
from perfedavg.fields import MOST, build, flags_by_name
from perfedavg.machine.kernels import PORTABLE_KERNELS
from perfedavg.plain_values import shown
from perfedavg.recording.folders import make_default_folder
from perfedavg.recording.runs import read_unfinished_run
from perfedavg.settings import (
    LOCAL_SPLITS,
    METHODS,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    UNREAD,
    ExperimentConfig,
    num_unseen_clients,
)
from perfedavg.terminal.console import command_line, say
from perfedavg.terminal.entry_point import EXIT_BAD_INPUT, at_early_end

if TYPE_CHECKING:  # imported where they are used, so that --help stays fast
    from torch import nn

    from perfedavg.contracts import FederatedDataset
    from perfedavg.recording.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent
STRUCTURES = ("cnn", "mlp", "lstm")
BACKENDS = ("gloo", "nccl")


@dataclass(frozen=True)
class Defaults:
    """Values of the flags that follow the data set."""

    struct: str = "cnn"
    client_num_in_total: int | None = 3400
    unseen_fraction: str = "0.2"
    partition: str | None = "shards:2"
    client_num_per_round: int = 5
    epochs: int = 500
    fine_tune_outer_loops: int = 100
    eval_every: int = 50
    local_lr: float = 0.02
    fine_tune_local_lr: float = 0.02
    fine_tune_server_optimizer: str = "sgd"
    fine_tune_server_schedule: str = "linear"


PAPER = Defaults()
QUICK = Defaults(
    client_num_in_total=50,
    client_num_per_round=10,
    epochs=40,
    fine_tune_outer_loops=20,
    eval_every=5,
    fine_tune_server_optimizer="adam",
    fine_tune_server_schedule="constant",
)
"""Few rounds, in which Adam gets further."""
NATURAL = Defaults(client_num_in_total=None, partition=None)
DATASET_DEFAULTS = {
    "emnist": PAPER,
    "emnist_balanced": PAPER,
    "emnist_letters": PAPER,
    "emnist_digits": PAPER,
    "mnist": PAPER,
    "fashion_mnist": PAPER,
    "digits": QUICK,
    "femnist": replace(NATURAL, unseen_fraction="9/34"),  # 2,500 of 3,400 writers train
    "shakespeare": replace(NATURAL, struct="lstm", local_lr=0.8, fine_tune_local_lr=0.8),
    "synthetic_writers": replace(PAPER, partition=None),
    "folder": NATURAL,
    "sine": Defaults(struct="mlp", client_num_in_total=30_600, unseen_fraction="1/51", partition=None),
}
ABSENT = {"client_num_in_total": "all clients", "partition": "none"}
"""What it means that a default is absent."""
USERS_OWN = NATURAL
"""For a data set given as package.module:factory."""


def get_args(role: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of an entry point, from `argv` or the command line.

    role: `server`, `worker`, `single`, `quick_start` or `describe`. Flags that follow the data set are filled in.
    With --resume, the experiment's flags are those of the run that goes on.
    Ends the process with a line on standard error and status 2 where a flag is unknown or malformed, or where the run
    cannot go on with the flags that were given.
    """
    parser = build_parser(role)
    args = parser.parse_args(argv)
    if getattr(args, "resume", None):
        try:
            _take_over_flags(args, _given_flags(parser, argv))
        except ValueError as error:
            parser.exit(EXIT_BAD_INPUT, f"error: {error}\n")
    elif "dataset" in args:
        _fill_in_defaults(args)
    return args


def _fill_in_defaults(args: argparse.Namespace) -> None:
    """Those that follow the data set, or other flags."""
    for name, value in vars(_defaults_of(args.dataset)).items():
        if name in args and getattr(args, name) is None:
            setattr(args, name, value)


def _given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The values that the command line itself gives, without defaults."""
    absent = object()
    blank = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    return {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not absent}


def _take_over_flags(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Set the experiment's flags to those of the run in --resume.

    Raises ValueError where the command line gives one another value than the run has, or there is no run that could
    go on. What the run has settled may be given in place of the flag that left it open, and the initial model's path
    may be another one: its content is compared when it is read (`load_initial_model`).
    """
    if "run_dir" in given:
        raise ValueError(
            f"--run_dir {given['run_dir']} does not go with --resume, which goes on in the folder {args.resume}; "
            "leave one of them out"
        )
    run = read_unfinished_run(args.resume)
    try:
        flags = complete_flags(run.flags)
    except ValueError as error:
        raise ValueError(f"--resume {args.resume}: config.json is damaged ({error}); start a new run") from error
    for name, value in flags.items():
        if name in given and given[name] != value:
            if name == "initial_model" and value is not None:
                value = given[name]
            else:
                settled = run.experiment().client_batching if name == "client_batching" else value
                if given[name] not in ("auto", settled):
                    raise ValueError(
                        f"--{name} {given[name]} differs from the run's {settled}; leave it out, or start a new run"
                    )
        setattr(args, name, value)


def complete_flags(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment's flags as config.json holds them, each checked by the flag's own rule.

    Flags that are not there, which the run did not know yet, have their default.
    Raises ValueError, naming the flag, where one has a value that its flag could not have had.
    """
    parser = _RaisingParser(add_help=False, allow_abbrev=False)
    for add in _EXPERIMENT:
        add(parser)
    present = {name: value for name, value in recorded.items() if value is not None}
    words = [f"--{action.dest}={present[action.dest]}" for action in parser._actions if action.dest in present]
    parsed = parser.parse_args(words)
    _fill_in_defaults(parsed)
    flags = vars(parsed)
    for name, value in flags.items():
        if name in present and (value, type(value)) != (present[name], type(present[name])):
            raise ValueError(f"its flag {name} is {shown(present[name])}, must be {shown(value)}")
    return flags


class _RaisingParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def experiment_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The values of those flags that belong to the experiment, and so to its run for good."""
    return {name: getattr(args, name) for name in _experiment_names()}


def _experiment_names() -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    for add in _EXPERIMENT:
        add(parser)
    return [action.dest for action in parser._actions]


def build_parser(role: str) -> argparse.ArgumentParser:
    """The parser of an entry point, made of the groups below.

    A flag stands in one group, but for `--port`, `--backend`, `--world_size` and `--join_timeout_seconds`, which stand
    in two: what they mean, or their default, is not the same for all entry points.
    """
    groups, description = {
        "server": (
            (
                _add_clients,
                _add_experiment,
                _add_phases,
                _add_run_folder,
                _add_data,
                _add_network,
                _add_join_server,
                _add_faults,
            ),
            "Start the FedLab parameter server (rank 0). It waits for --world_size - 1 workers, sends them the "
            "configuration, and runs the experiment with them.",
        ),
        "worker": (
            (_add_data, _add_compute, _add_network, _add_rank),
            "Start a worker. It gets the experiment's configuration from the server.",
        ),
        "single": (
            (_add_clients, _add_experiment, _add_phases, _add_run_folder, _add_data, _add_compute),
            "Run the experiment in this process, without a network. The model is the same as with workers.",
        ),
        "quick_start": (
            (
                _add_clients,
                _add_experiment,
                _add_phases,
                _add_run_folder,
                _add_data,
                _add_compute,
                _add_faults,
                _add_local_launch,
            ),
            "Start a server and workers on this machine, and show the result.",
        ),
        "describe": (
            (_add_clients, _add_data, _add_plot),
            "Describe a data set as it is dealt out to clients.",
        ),
    }[role]
    program = {"quick_start": "sh quick_start.sh", "describe": "python -m datasets.describe"}  # else the script's name
    parser = argparse.ArgumentParser(
        program.get(role), None, description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    for add in groups:
        add(parser)
    if role in ("quick_start", "describe"):
        parser.set_defaults(dataset="digits")
    return parser


def to_argv(args: argparse.Namespace, role: str) -> list[str]:
    """The command line that gives another entry point the same values, for the flags that it knows."""
    argv = []
    for action in build_parser(role)._actions:
        value = getattr(args, action.dest, None)
        if value is not None:
            argv += [action.option_strings[0], str(value)]
    return argv


RESTART_VARIABLE = "PERFEDAVG_RESTART"
"""By which quick_start.py tells the server that it starts with which command it starts both again."""
_SCRIPTS = {
    "server": "server.py",
    "worker": "client_worker.py",
    "single": "single_process.py",
    "quick_start": "quick_start.py",
}
_SHARED_WITH_WORKERS = ("data_root", "ip", "port", "ethernet", "backend", "token_file")


def restart_command(role: str, args: argparse.Namespace) -> str:
    """What starts an entry point again on this machine, for a shell in any folder: flags of an experiment, or
    --resume, are to be put behind it.
    """
    parser = build_parser(role)
    words = differing_argv(parser, args, without={*_experiment_names(), "run_dir", "resume"})
    return command_line([sys.executable, ROOT / _SCRIPTS[role], *words])


def worker_command(args: argparse.Namespace) -> str:
    """What starts a worker of the server with these flags on its machine; --rank is to be put behind it."""
    parser = build_parser("worker")
    others = {action.dest for action in parser._actions}.difference(_SHARED_WITH_WORKERS)
    return command_line([sys.executable, ROOT / _SCRIPTS["worker"], *differing_argv(parser, args, without=others)])


def differing_argv(parser: argparse.ArgumentParser, args: argparse.Namespace, without: Container[str]) -> list[str]:
    """The command line that gives a parser these values, as far as they are not its defaults.

    --data_root is there also where PERFEDAVG_DATA sets it, which another shell may lack.
    """
    argv = []
    for action in parser._actions:
        value, default = getattr(args, action.dest, None), action.default
        if action.dest == "data_root":
            default = paths.DEFAULT_DATA_ROOT
        elif isinstance(default, str) and default != argparse.SUPPRESS and callable(action.type):
            default = action.type(default)  # as argparse does
        if action.dest not in without and value is not None and value != default:
            values = value if isinstance(value, list) else [] if action.nargs == 0 else [value]
            argv += [action.option_strings[0], *map(str, values)]
    return argv


def experiment_from_args(args: argparse.Namespace) -> ExperimentConfig:
    """The experiment that the flags stand for, or with --resume the one that the run has recorded.

    The recorded one stands, with all that the run has settled: it is the same whatever this machine's devices are, and
    whether or not the initial model's file is still there. The flags must fit it, given ones and recorded ones alike.
    Raises ValueError, naming what differs, where they do not.
    """
    asked = config_from_args(args)
    if args.resume is None:
        return asked
    try:
        recorded = read_unfinished_run(args.resume).experiment()
        differences = asked.differences_from(recorded)
        if differences:
            raise ValueError(f"config.json was edited: by its flags {'; '.join(differences)} in its experiment")
    except ValueError as error:
        raise ValueError(f"--resume {args.resume}: {error}; restore it, or start a new run") from error
    return recorded


def config_from_args(args: argparse.Namespace) -> ExperimentConfig:
    """The experiment that the flags stand for, where they leave something open not settled yet.

    Raises ValueError, naming the flag, its value and the fix, where the values do not make an experiment."""
    values = {name: getattr(args, name) for name in flags_by_name(ExperimentConfig)}
    values["struct"] = _architecture(args.dataset, args.struct)
    values["fine_tune"] = args.fine_tune and args.fine_tune_method != "none"
    values["client_batching"] = None if args.client_batching == "auto" else args.client_batching
    config = build(ExperimentConfig, values)
    return config if args.initial_model is None else replace(config, initial_model=UNREAD)


def check_num_workers(config: ExperimentConfig, num_workers: int) -> None:
    """Raises ValueError where a round has too few groups of clients to give each worker one.

    How many there are with `--client_batching auto`, depends on model and devices; see
    `client_batching.settle_client_batching`, which shares the clients out, and `say_idle_slots`.
    """
    group_size = config.client_batching or 1
    num_groups = -(-config.cohort_size // group_size)
    if num_groups >= num_workers:
        return
    clients = f"--client_num_per_round {config.cohort_size}"
    enough = (num_workers - 1) * group_size + 1
    if group_size == 1:
        raise ValueError(
            f"{clients} is fewer than the {num_workers} workers, some of which would never work; raise it to {enough} "
            "or more, or start fewer workers"
        )
    raise ValueError(
        f"{clients} makes {num_groups} group(s) of --client_batching {group_size} for {num_workers} workers, some of "
        f"which would never work; raise it to {enough} or more, lower --client_batching, or start fewer workers"
    )


def get_datasets(config: ExperimentConfig, data_root: Path) -> FederatedDataset:
    """The experiment's data, dealt out to its clients. Raises ValueError where it cannot be had or is damaged."""
    dataset = _load_dataset(
        config.dataset,
        config.num_clients,
        config.unseen_fraction,
        config.partition,
        config.seed,
        config.local_split,
        data_root,
    )
    num_left_out = getattr(dataset, "num_left_out", 0)
    if num_left_out:
        say(f"left out of {config.dataset}, too small to train and be scored: {num_left_out} client(s)")
    return _seen_as(config, dataset)


def _seen_as(config: ExperimentConfig, dataset: FederatedDataset) -> FederatedDataset:
    from datasets.clients.views import JointView, ValidationView

    if config.validation:
        if "validation" in find(config.dataset).meaningless:
            raise meaningless(config.dataset, "validation", "true")
        num_scored = num_unseen_clients(len(dataset.train_client_ids), config.unseen_fraction)
        dataset = ValidationView(dataset, num_scored)
    return JointView(dataset) if config.joint else dataset


def get_described_dataset(args: argparse.Namespace) -> FederatedDataset:
    """The data that the flags of `python -m datasets.describe` stand for, dealt out as in a run with these flags."""
    return _load_dataset(
        args.dataset,
        args.client_num_in_total,
        args.unseen_fraction,
        args.partition,
        args.seed,
        args.local_split,
        args.data_root,
    )


def _load_dataset(
    name: str,
    num_clients: int | None,
    unseen_fraction: str,
    partition: str | None,
    seed: int,
    local_split: str,
    data_root: Path,
) -> FederatedDataset:
    num_unseen = partial(num_unseen_clients, unseen_fraction=unseen_fraction)
    request = DatasetRequest(name, num_clients, num_unseen, partition, seed, local_split)
    return load_federated_dataset(request, data_root)


def get_model(config: ExperimentConfig, dataset: FederatedDataset) -> nn.Module:
    """The experiment's model for a data set, with the initial weights that follow from the seed.

    A user's own data set may bring its model, as a method `build_model()`. Raises ValueError where that is none that
    could be trained, or that could not be saved when it has been.
    """
    import torch

    from models import build_model
    from perfedavg.recording.model_file import check_can_be_saved
    from perfedavg.seeding import Purpose, seed_sequence, torch_seeds

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seeds(seed_sequence(config.seed, Purpose.INITIAL_MODEL), 1)[0])
        build_own = getattr(dataset, "build_model", None)
        model = build_own() if build_own else build_model(config.architecture, dataset.num_classes)
    check_model = getattr(dataset, "check_model", None)  # see datasets.sources.own
    if check_model:
        check_model(model)
        check_can_be_saved(model)
    return cast("nn.Module", model)


def load_initial_model(
    args: argparse.Namespace, config: ExperimentConfig, model: nn.Module, has_checkpoint: bool
) -> ExperimentConfig:
    """Give the model the weights of --initial_model, where there is one; returns the configuration with their digest.

    Only the process that holds the global model needs them, and only until the run has a checkpoint; a file that is
    named anew is read nevertheless, to be compared.
    Raises ValueError where there is no such model, or it is not of the experiment's kind or not the run's.
    """
    if args.initial_model is None:
        return config
    if has_checkpoint and args.initial_model == read_unfinished_run(args.resume).flags.get("initial_model"):
        return config
    from perfedavg.engine.experiment import parameters_sha256
    from perfedavg.recording.model_file import read_model_file
    from perfedavg.training.flat_model import flatten

    path = Path(args.initial_model)
    path = path / "model.safetensors" if path.is_dir() else path
    state, facts = read_model_file(path)
    if facts.architecture != config.architecture:
        raise ValueError(
            f"--initial_model {path} holds {facts.architecture}, not {config.architecture}; name another one"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"--initial_model {path} does not fit the data: {first_line}; name another one") from error
    digest = parameters_sha256(flatten(model))
    if config.initial_model not in (UNREAD, digest):
        raise ValueError(
            f"--initial_model {path} has other parameters than the run began with (sha256 {digest}, not "
            f"{config.initial_model}); name a file with those"
        )
    return replace(config, initial_model=digest)


def open_run_folder(args: argparse.Namespace, role: str) -> RunFolder:
    """The folder that the flags name, a new one or with --resume that of the run that goes on.

    Nothing is left of it where the process ends before the run has begun.

    Raises ValueError where it holds a run (with --resume: none that could go on), cannot be written, or is in use.
    """
    from perfedavg.recording.run_folder import RunFolder

    place = args.resume or args.run_dir or make_default_folder(ROOT / "runs", args.dataset)
    run_folder = RunFolder(
        place,
        experiment_flags(args),
        args.checkpoint_every,
        resume=args.resume is not None,
        restart_command=os.environ.get(RESTART_VARIABLE) or restart_command(role, args),
        is_made_for_it=args.resume is None and args.run_dir is None,
    )
    at_early_end(lambda reason: run_folder.discard_unless_begun())
    return run_folder


def _architecture(dataset: str, struct: str) -> str:
    models = find(dataset).models
    if struct not in models:
        raise ValueError(f"--struct {struct} does not fit {dataset}; use {' or '.join(models)}")
    return models[struct]


def _defaults_of(dataset: str) -> Defaults:
    return USERS_OWN if ":" in dataset else DATASET_DEFAULTS[dataset]


def _follows_dataset(name: str) -> str:
    """The defaults of a flag, grouped by value, the most frequent as `others`."""
    datasets: dict[str, list[str]] = {}
    for dataset, defaults in DATASET_DEFAULTS.items():
        value = getattr(defaults, name)
        datasets.setdefault(ABSENT.get(name, "") if value is None else str(value), []).append(dataset)
    *rare, (common, _) = sorted(datasets.items(), key=lambda entry: len(entry[1]))
    listed = "".join(f"{value} for {', '.join(names)}; " for value, names in rare)
    return f"(default: {listed}{common} for the others)" if rare else f"(default: {common})"


def _add_clients(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clients")
    group.add_argument(
        "--dataset",
        type=_dataset,
        default="emnist",
        metavar="NAME",
        help=f"{', '.join(DATASET_DEFAULTS)} (client/class/image.png in --data_root), or package.module:factory; "
        "see python -m datasets.describe",
    )
    by_dataset = partial(_add_by_dataset, group)
    by_dataset("client_num_in_total", "clients, those that train and those that are never seen in training")
    by_dataset("unseen_fraction", "share of the clients that never train, such as 0.2 or 9/34", type=str, metavar="X")
    by_dataset(
        "partition",
        "how examples without natural owners are dealt out: shards:N (label-sorted shards a client), iid, "
        "dirichlet:ALPHA (over labels), quantity:SIGMA (log-normal sizes), labels:N (labels a client) or noise:SIGMA",
        type=str,
        metavar="NAME[:X]",
    )
    group.add_argument(
        "--local_split",
        choices=LOCAL_SPLITS,
        default="shuffled",
        help="how a client's examples are put in order before they are cut 80/20 into its training and test parts: "
        "tail sorts them by label, as the code behind the published figures does",
    )
    group.add_argument("--seed", type=int, default=0, help="everything random follows from it; same seed, same model")


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("experiment")
    add = group.add_argument
    by_dataset = partial(_add_by_dataset, group)
    by_dataset("struct", "model: a convolutional network, an MLP, or (text) an LSTM", choices=STRUCTURES, type=str)
    by_dataset("client_num_per_round", "training clients drawn for each round")
    add("--batch_size", type=int, default=20, help="examples a local step")
    add(
        "--initial_model",
        type=path_as_text,
        metavar="RUN",
        help="finished run (or its model.safetensors) whose model is started from (default: random weights)",
    )
    _add_boolean(group, "joint", False, "pool the training clients' data in one client, the centralized baseline")
    _add_boolean(
        group,
        "validation",
        False,
        "hold a share of the training clients out and score them in place of the unseen ones, to choose settings by",
    )
    by_dataset("eval_every", "communication rounds between two points of the accuracy curve")
    add("--eval_clients", type=int, default=100, help="unseen clients behind a point of the curve; results take all")
    add("--precision", choices=PRECISIONS, default="float32", help="of the clients' training; scores are float32's")
    add(
        "--client_batching",
        type=_client_batching,
        default="auto",
        metavar="auto|N",
        help="clients trained at once, as one computation; auto: 1 on a CPU unless the model is tiny, on GPUs an equal "
        "share of a round's clients for each, as far as it fits the memory",
    )
    add(
        "--portable_kernels",
        choices=PORTABLE_KERNELS,
        nargs="?",
        const="true",
        default="false",
        help="compute with what all processors with AVX2 have, of one vendor (true) or of any (any_vendor, slower), so "
        "that unlike ones give the same model; not for GPUs nor ARM",
    )


def _add_phases(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("phase 1, FedAvg")
    add = group.add_argument
    _add_by_dataset(group, "epochs", "communication rounds; 0 leaves this phase out")
    add("--inner_loops", type=int, default=5, help="local epochs a client a round (E)")
    add("--inner_steps", type=int, help="local steps a client a round, in place of epochs; 1 is FedSGD (default: not)")
    add("--client_optimizer", choices=OPTIMIZERS, default="sgd", help="the clients' optimizer, also to personalize")
    _add_by_dataset(group, "local_lr", "the clients' learning rate, also to personalize", type=float)
    add("--server_optimizer", choices=OPTIMIZERS, default="momentum", help="the server's optimizer")
    add("--server_lr", type=float, default=1.0, help="the server's learning rate; with sgd, 1.0 averages")
    add("--server_momentum", type=float, default=0.9, help="of the server's momentum, 0 or more and below 1")
    add("--server_epsilon", type=float, default=0.001, help="of the server's adam, yogi or adagrad, above 0")

    group = parser.add_argument_group("phase 2, fine-tuning")
    add = group.add_argument
    _add_boolean(group, "fine_tune", True, "whether to fine-tune")
    add(
        "--fine_tune_method",
        choices=(*METHODS, "none"),
        default="reptile",
        help="what a client sends: how far it got (reptile), or the gradient on a part of its data after it adapted to "
        "the rest, there (fomaml) or through its steps (maml); none is --fine_tune false",
    )
    _add_by_dataset(group, "fine_tune_outer_loops", "communication rounds")
    add("--fine_tune_inner_loops", type=int, default=10, help="local epochs a client a round (K)")
    add("--fine_tune_inner_steps", type=int, help="local steps a client a round, in place of epochs (default: not)")
    add(
        "--fine_tune_support_fraction",
        type=float,
        default=0.5,
        help="of fomaml and maml: share of a client's training part that it adapts to; 1 measures on the same examples",
    )
    add("--fine_tune_client_optimizer", choices=OPTIMIZERS, default="sgd", help="the clients' optimizer")
    _add_by_dataset(group, "fine_tune_local_lr", "the clients' learning rate", type=float)
    by_dataset = partial(_add_by_dataset, group)
    by_dataset("fine_tune_server_optimizer", "the server's optimizer", choices=OPTIMIZERS, type=str)
    add(
        "--fine_tune_server_lr",
        type=float,
        help="the server's learning rate; with sgd, Reptile's step (default: what fits the method and the optimizer)",
    )
    add("--fine_tune_server_momentum", type=float, default=0.9, help="of the server's momentum, 0 or more and below 1")
    add("--fine_tune_server_epsilon", type=float, default=1e-8, help="of the server's adam, yogi or adagrad, above 0")
    by_dataset(
        "fine_tune_server_schedule",
        "the server's learning rate over the rounds; linear falls to 0",
        choices=SCHEDULES,
        type=str,
    )

    group = parser.add_argument_group("phase 3, personalization of unseen clients")
    add = group.add_argument
    add("--pers_round", type=int, default=5, help="local epochs by which an unseen client adapts")
    add("--pers_curve", type=int, default=0, help="measure results also after each of 0 .. so many epochs; 0 for not")


def _add_boolean(group: argparse._ArgumentGroup, name: str, default: bool, text: str) -> None:
    group.add_argument(
        f"--{name}", type=_boolean, nargs="?", const=True, default=default, metavar="true|false", help=text
    )


def _add_by_dataset(group: argparse._ArgumentGroup, name: str, text: str, **options: Any) -> None:
    """A flag whose default follows the data set; a whole number unless the options say otherwise."""
    group.add_argument(f"--{name}", default=None, help=f"{text} {_follows_dataset(name)}", **{"type": int, **options})


_EXPERIMENT = (_add_clients, _add_experiment, _add_phases)
"""The groups of flags that belong to the experiment."""


def _add_run_folder(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--run_dir",
        type=paths.path,
        metavar="FOLDER",
        help="folder of this run; one that holds a run is refused "
        "(default: runs/<date-time>-<dataset> in the project's folder)",
    )
    group.add_argument(
        "--resume",
        type=paths.path,
        metavar="RUN",
        help="continue the run in this folder, with the experiment's flags that it was started with "
        "(default: start a new run)",
    )
    group.add_argument("--checkpoint_every", type=positive, default=10, help="rounds between two checkpoints")


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("output").add_argument(
        "--plot",
        type=paths.file,
        nargs="?",
        const=True,
        metavar="FILE",
        help="write the label mix and examples as a PNG, to NAME.png unless a file is named (default: no plot)",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("data").add_argument(
        "--data_root",
        type=paths.folder,
        default=paths.default_data_root(),
        help="folder of the data sets, into which missing ones are downloaded; the environment variable "
        "PERFEDAVG_DATA sets it too",
    )


def _add_compute(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("compute")
    group.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:i")
    group.add_argument(
        "--threads",
        type=_lanes,
        help="clients that this process trains side by side, on one core each; does not change the result "
        "(default: the machine's cores, shared out among the workers on it)",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument("--ip", default="127.0.0.1", help="the server's address: host name or IPv4")
    group.add_argument("--port", type=_port, default=3002, help="the server's TCP port")
    group.add_argument(
        "--ethernet", help="network interface for tensors, such as eth0 (default: the one between server and worker)"
    )
    group.add_argument("--backend", choices=BACKENDS, default="gloo", help="torch.distributed backend of this process")
    group.add_argument(
        "--token_file",
        type=paths.file,
        metavar="FILE",
        help="file with a secret that server and workers share (default: what the environment's PERFEDAVG_TOKEN holds)",
    )


def _add_join_server(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("joining").add_argument
    add("--world_size", type=int, default=3, help="processes to start with: the server and its workers")
    add("--join_timeout_seconds", type=_seconds, default=600, help="how long to wait for them to join, seconds")


def _add_faults(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("faults").add_argument
    add(
        "--worker_timeout_seconds",
        type=_seconds,
        default=30,
        help="after which a worker without a sign of life counts as dead, seconds",
    )
    add(
        "--worker_wait_seconds",
        type=_seconds,
        default=300,
        help="how long to wait for a worker when none is left, before the run is saved and stopped, seconds",
    )


def _add_rank(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("joining").add_argument
    add("--rank", type=int, required=True, default=argparse.SUPPRESS, help="this worker's own number, 1 or more")
    add("--world_size", type=int, help="checked against the server's (default: not checked)")
    add("--join_timeout_seconds", type=_seconds, default=20, help="how long to try to reach the server, seconds")
    add(
        "--server_wait_seconds",
        type=_seconds,
        default=300,
        help="how long to wait for a server that was lost to come back, seconds",
    )


def _add_local_launch(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes on this machine")
    group.add_argument("--workers", type=positive, default=2, help="worker processes to start")
    group.add_argument("--port", type=_port, help="TCP port of the server (default: a free one)")
    group.add_argument("--backend", choices=BACKENDS, default="gloo", help="torch.distributed backend")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default, except where the help text states it, and names values N, X or TEXT by their type."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {
            int: "N",
            positive: "N",
            _seconds: "N",
            _lanes: "N",
            _port: "PORT",
            float: "X",
            paths.folder: "FOLDER",
        }.get(action.type, "TEXT")


def _dataset(text: str) -> str:
    if text not in DATASET_DEFAULTS and ":" not in text:
        names = ", ".join(DATASET_DEFAULTS)
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; use one of {names}, or package.module:factory")
    return text


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def path_as_text(text: str) -> str:
    """As config.json keeps it."""
    return str(paths.path(text))


def _client_batching(text: str) -> str | int:
    return text if text == "auto" else positive(text)


def positive(text: str) -> int:
    """The type of a flag that counts."""
    return whole_number(text, 1, MOST)


def _seconds(text: str) -> int:
    """Of a wait. Sockets count milliseconds in 32 bits, which is 24 days."""
    return whole_number(text, 1, 2_000_000)


def _lanes(text: str) -> int:
    """Clients side by side; each has a thread and a copy of the model."""
    return whole_number(text, 1, 1024)


def _port(text: str) -> int:
    return whole_number(text, 1, 65535)


def whole_number(text: str, lowest: int, highest: int) -> int:
    """The type of a flag with these bounds. Raises ArgumentTypeError, which argparse turns into a line."""
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if not lowest <= value <= highest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} to {highest}")
    return value
