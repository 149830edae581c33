"""Where flags become objects: the flags of every entry point, and the configuration, data and model they stand for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from perfedavg.config import OPTIMIZERS, ExperimentConfig, OptimizerConfig, PhaseConfig

if TYPE_CHECKING:  # imported where they are used, so that --help stays fast
    from torch import nn

    from datasets import FederatedDataset
    from perfedavg.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent
DATASETS = ("emnist", "mnist", "digits")
STRUCTURES = ("cnn", "mlp")
BACKENDS = ("gloo", "nccl")
CLIENT_ADAM_BETAS = (0.0, 0.999)
"""Of a client's Adam: no first moment, as Reptile's authors set it (Nichol et al. 2018, section 6)."""


@dataclass(frozen=True)
class Defaults:
    """Values of the flags that follow the data set."""

    client_num_in_total: int
    client_num_per_round: int
    epochs: int
    fine_tune_outer_loops: int
    eval_every: int


PAPER_SIZE = Defaults(
    client_num_in_total=3400, client_num_per_round=5, epochs=500, fine_tune_outer_loops=100, eval_every=50
)
QUICK_SIZE = Defaults(
    client_num_in_total=50, client_num_per_round=10, epochs=40, fine_tune_outer_loops=20, eval_every=5
)
DATASET_DEFAULTS = {"emnist": PAPER_SIZE, "mnist": PAPER_SIZE, "digits": QUICK_SIZE}


def get_args(role: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of an entry point, from `argv` or the command line.

    role: `server`, `worker`, `single` or `quick_start`. Flags that follow the data set are filled in.
    Ends the process with a line on standard error and status 2 where a flag is unknown or malformed.
    """
    args = build_parser(role).parse_args(argv)
    if "dataset" in args:
        for name, value in vars(DATASET_DEFAULTS[args.dataset]).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    return args


def build_parser(role: str) -> argparse.ArgumentParser:
    """The parser of an entry point; each flag stands in exactly one of the groups below."""
    groups, description = {
        "server": (
            (_add_experiment, _add_run_folder, _add_data, _add_network, _add_join_server),
            "Start the FedLab parameter server (rank 0). It waits for --world_size - 1 workers, sends them the "
            "configuration, and runs the experiment with them.",
        ),
        "worker": (
            (_add_data, _add_compute, _add_network, _add_rank),
            "Start a worker. It gets the experiment's configuration from the server.",
        ),
        "single": (
            (_add_experiment, _add_run_folder, _add_data, _add_compute),
            "Run the experiment in this process, without a network. The model is the same as with workers.",
        ),
        "quick_start": (
            (_add_experiment, _add_run_folder, _add_data, _add_compute, _add_local_launch),
            "Start a server and workers on this machine, and show the result.",
        ),
    }[role]
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    for add in groups:
        add(parser)
    if role == "quick_start":
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


def config_from_args(args: argparse.Namespace) -> ExperimentConfig:
    """Raises ValueError, naming the flag, its value and the fix, where the values do not make an experiment."""
    fine_tune = PhaseConfig(
        num_rounds=args.fine_tune_outer_loops,
        num_local_epochs=args.fine_tune_inner_loops,
        client_optimizer=OptimizerConfig(
            args.fine_tune_client_optimizer, args.fine_tune_local_lr, betas=CLIENT_ADAM_BETAS
        ),
        server_optimizer=OptimizerConfig(args.fine_tune_server_optimizer, args.fine_tune_server_lr),
    )
    return ExperimentConfig(
        dataset=args.dataset,
        architecture=_architecture(args.dataset, args.struct),
        seed=args.seed,
        num_clients=args.client_num_in_total,
        cohort_size=args.client_num_per_round,
        batch_size=args.batch_size,
        fedavg=PhaseConfig(
            num_rounds=args.epochs,
            num_local_epochs=args.inner_loops,
            client_optimizer=OptimizerConfig("sgd", args.local_lr),
            server_optimizer=OptimizerConfig("sgd", args.server_lr, momentum=args.server_momentum),
        ),
        fine_tune=fine_tune if args.fine_tune else None,
        num_personalization_epochs=args.pers_round,
        eval_every=args.eval_every,
        eval_clients=args.eval_clients,
    )


def check_num_workers(config: ExperimentConfig, num_workers: int) -> None:
    """Raises ValueError where a round has too few clients to give each worker one."""
    if config.cohort_size < num_workers:
        raise ValueError(
            f"--client_num_per_round {config.cohort_size} is fewer than the {num_workers} workers, some of which would "
            f"never work; raise it to {num_workers} or more, or start fewer workers"
        )


def get_datasets(config: ExperimentConfig, data_root: Path) -> FederatedDataset:
    """The experiment's data, dealt out to its clients. Raises ValueError where it cannot be had or is damaged."""
    from datasets import load_federated_dataset

    return load_federated_dataset(config.dataset, data_root, config.num_clients, config.seed)


def get_model(config: ExperimentConfig, num_classes: int) -> nn.Module:
    """The experiment's model, with the initial weights that follow from the seed."""
    import torch

    from models import build_model
    from perfedavg.seeding import Purpose, seed_sequence, torch_seeds

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seeds(seed_sequence(config.seed, Purpose.INITIAL_MODEL), 1)[0])
        return build_model(config.architecture, num_classes)


def open_run_folder(args: argparse.Namespace) -> RunFolder:
    """The folder that the flags name. Raises ValueError where it holds a run or cannot be written."""
    from perfedavg.run_folder import RunFolder, default_path

    return RunFolder(args.run_dir or default_path(ROOT / "runs", args.dataset))


def _architecture(dataset: str, struct: str) -> str:
    if struct == "mlp":
        return "mlp"
    return "emnist_cnn" if dataset == "emnist" else "mnist_cnn"


def _follows_dataset(name: str) -> str:
    values = ", ".join(f"{dataset} {getattr(DATASET_DEFAULTS[dataset], name)}" for dataset in DATASETS)
    return f"(default, by data set: {values})"


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("experiment")
    add = group.add_argument
    add("--dataset", choices=DATASETS, default="emnist", help="data set; emnist is byclass, 62 classes")
    add("--struct", choices=STRUCTURES, default="cnn", help="model: the data set's convolutional network, or an MLP")
    _add_by_dataset(group, "client_num_in_total", "clients, of which 80 %% train and 20 %% are never seen in training")
    _add_by_dataset(group, "client_num_per_round", "training clients drawn for each round")
    add("--batch_size", type=int, default=20, help="examples a local step")
    add("--seed", type=int, default=0, help="everything random follows from it; same seed, same model")
    _add_by_dataset(group, "eval_every", "communication rounds between two points of the accuracy curve")
    add("--eval_clients", type=int, default=100, help="unseen clients behind a point of the curve; results take all")

    group = parser.add_argument_group("phase 1, FedAvg")
    add = group.add_argument
    _add_by_dataset(group, "epochs", "communication rounds")
    add("--inner_loops", type=int, default=5, help="local epochs a client a round (E)")
    add("--local_lr", type=float, default=0.02, help="learning rate of the clients' SGD, also in personalization")
    add("--server_lr", type=float, default=1.0, help="learning rate of the server's SGD; 1.0 without momentum averages")
    add("--server_momentum", type=float, default=0.9, help="momentum of the server's SGD, 0 or more and below 1")

    group = parser.add_argument_group("phase 2, Reptile fine-tuning")
    add = group.add_argument
    add(
        "--fine_tune",
        type=_boolean,
        nargs="?",
        const=True,
        default=True,
        metavar="true|false",
        help="whether to fine-tune",
    )
    _add_by_dataset(group, "fine_tune_outer_loops", "communication rounds")
    add("--fine_tune_inner_loops", type=int, default=10, help="local epochs a client a round (K)")
    add("--fine_tune_client_optimizer", choices=OPTIMIZERS, default="sgd", help="the clients' optimizer")
    add("--fine_tune_local_lr", type=float, default=0.02, help="the clients' learning rate")
    add("--fine_tune_server_optimizer", choices=OPTIMIZERS, default="adam", help="the server's optimizer")
    add(
        "--fine_tune_server_lr", type=float, default=0.001, help="the server's learning rate (with sgd, Reptile's step)"
    )

    group = parser.add_argument_group("phase 3, personalization of unseen clients")
    group.add_argument("--pers_round", type=int, default=5, help="local epochs by which an unseen client adapts")


def _add_by_dataset(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    group.add_argument(f"--{name}", type=int, default=None, help=f"{text} {_follows_dataset(name)}")


def _add_run_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("output").add_argument(
        "--run_dir",
        type=Path,
        help=f"folder of this run; one that holds a run is refused (default: {ROOT.name}/runs/<date-time>-<dataset>)",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("data").add_argument(
        "--data_root",
        type=Path,
        default=Path(os.environ.get("PERFEDAVG_DATA") or ROOT / "datasets" / "data"),
        help="folder of the data sets, into which missing ones are downloaded; the environment variable "
        "PERFEDAVG_DATA sets it too",
    )


def _add_compute(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("compute")
    group.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:i")
    group.add_argument(
        "--threads",
        type=_positive,
        help="clients that this process trains side by side, on one core each; does not change the result "
        "(default: the machine's cores, shared out among the workers on it)",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument("--ip", default="127.0.0.1", help="the server's address: host name or IPv4")
    group.add_argument("--port", type=_port, default=3002, help="the server's TCP port")
    group.add_argument("--world_size", type=int, default=3, help="processes in all: the server and its workers")
    group.add_argument(
        "--ethernet", help="network interface for tensors, such as eth0 (default: the one that leads to --ip)"
    )
    group.add_argument("--backend", choices=BACKENDS, default="gloo", help="torch.distributed backend of this process")


def _add_join_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("joining").add_argument(
        "--join_timeout_seconds", type=_positive, default=600, help="how long to wait for all workers to join, seconds"
    )


def _add_rank(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("joining")
    group.add_argument(
        "--rank", type=int, required=True, default=argparse.SUPPRESS, help="this worker's number, 1 .. world_size - 1"
    )
    group.add_argument(
        "--join_timeout_seconds", type=_positive, default=20, help="how long to try to reach the server, seconds"
    )


def _add_local_launch(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes on this machine")
    group.add_argument("--workers", type=_positive, default=2, help="worker processes to start")
    group.add_argument("--port", type=_port, help="TCP port of the server (default: a free one)")
    group.add_argument("--backend", choices=BACKENDS, default="gloo", help="torch.distributed backend")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default, except where the help text states it, and names values N, X or TEXT by their type."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", _positive: "N", _port: "PORT", float: "X", Path: "FOLDER"}.get(action.type, "TEXT")


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def _positive(text: str) -> int:
    return _whole_number(text, 1, None)


def _port(text: str) -> int:
    return _whole_number(text, 1, 65535)


def _whole_number(text: str, lowest: int, highest: int | None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if value < lowest or (highest is not None and value > highest):
        upper = "" if highest is None else f" to {highest}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest}{upper}")
    return value
