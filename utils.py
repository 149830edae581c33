"""From an entry point's command line to what it works with: its settings, the data, the model, the run's folder."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets.registry import DatasetRequest, find, load_federated_dataset, meaningless
from launch.commands import restart_command
from launch.flags import parse
from launch.paths import ROOT
from launch.settings import ENTRY_POINTS
from perfedavg.contracts import input_shape
from perfedavg.own_files import is_own_code, shown_dataset
from perfedavg.recording.folders import make_default_folder, remove_empty
from perfedavg.recording.runs import read_unfinished_run
from perfedavg.settings import UNREAD, ClientsConfig, ExperimentConfig, brings_model, flag, num_unseen_clients
from perfedavg.terminal.console import say
from perfedavg.terminal.entry_point import at_early_end

if TYPE_CHECKING:  # imported where they are used, so that --help stays fast
    from torch import nn

    from perfedavg.contracts import FederatedDataset
    from perfedavg.engine.executor import LocalExecutor
    from perfedavg.recording.run_folder import RunFolder

OPENING_SECONDS = 5.0
"""How long a signal waits for a run's folder that is being made, to remove it."""
RESTART_VARIABLE = "PERFEDAVG_RESTART"
"""By which quick_start.py tells the server that it starts with which command it starts both again."""


class LocalRun(NamedTuple):
    """The arguments of `perfedavg.recorded_run.run_and_record`, of a run in this process."""

    config: ExperimentConfig
    executor: LocalExecutor
    clients: FederatedDataset
    model: nn.Module
    folder: RunFolder
    run_settings: dict[str, Any]


def get_args(role: str, argv: Sequence[str] | None = None) -> Any:
    """The settings of an entry point, from `argv` or the command line; with --resume, the experiment is the run's.

    role: a name in `launch.settings.ENTRY_POINTS`.
    Raises ValueError, in a line for the user.
    """
    return parse(ENTRY_POINTS[role], argv)


def get_datasets(config: ExperimentConfig, data_root: Path, may_download: bool = True) -> FederatedDataset:
    """The experiment's data, dealt out to its clients.

    Raises ValueError where it cannot be had or is damaged; of these, MissingDataError where it would have to be
    downloaded and may not.
    """
    dataset = load_clients(config, data_root, may_download)
    num_left_out = getattr(dataset, "num_left_out", 0)
    if num_left_out:
        say(f"left out of {shown_dataset(config.dataset)}, too small to train and be scored: {num_left_out} client(s)")
    return apply_views(config, dataset)


def apply_views(config: ExperimentConfig, dataset: FederatedDataset) -> FederatedDataset:
    """The data with validation clients in place of the unseen ones, and with all training data in one client."""
    from datasets.clients.views import JointView, ValidationView

    if config.validation:
        if "validation" in find(config.dataset).meaningless:
            raise meaningless(config.dataset, "validation", "true")
        dataset = ValidationView(dataset, num_unseen_clients(len(dataset.train_client_ids), config.unseen_fraction))
    return JointView(dataset) if config.joint else dataset


def load_clients(config: ClientsConfig, data_root: Path, may_download: bool = True) -> FederatedDataset:
    num_unseen = partial(num_unseen_clients, unseen_fraction=config.unseen_fraction)
    request = DatasetRequest(
        config.dataset,
        config.num_clients,
        num_unseen,
        config.partition,
        config.seed,
        config.local_split,
        config.own_files,
        config.local_test_fraction,
        may_download,
    )
    return load_federated_dataset(request, data_root)


def get_model(config: ExperimentConfig, dataset: FederatedDataset) -> nn.Module:
    """The experiment's model for a data set, with the initial weights that follow from the seed.

    A user's own data set may bring its model, as a method `build_model()`, which is taken unless --model names another.
    Raises ValueError where the model does not fit the data or a method, where a user's own could not be trained, or
    could not be saved when it has been.
    """
    import torch

    from perfedavg.own_model import check_model
    from perfedavg.recording.model_file import check_can_be_saved
    from perfedavg.seeding import Purpose, seed_sequence, torch_seeds
    from perfedavg.training.layout import check_methods, count_buffer_entries

    whose = f"{flag('architecture')} {config.architecture}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seeds(seed_sequence(config.seed, Purpose.INITIAL_MODEL), 1)[0])
        if brings_model(config, dataset):
            whose = f"--dataset {getattr(dataset, 'name', config.dataset)}: build_model()"
            model: nn.Module = dataset.build_model()  # type: ignore[attr-defined]
        else:
            model = build_architecture(config.architecture, input_shape(dataset), dataset.num_classes)
    if brings_model(config, dataset) or is_own_code(config.architecture) or is_own_code(config.dataset):
        check_model(whose, model, dataset, config.batch_size)
        check_can_be_saved(model)
    check_methods(config, model)
    if config.buffers == "local" and not count_buffer_entries(model):
        raise ValueError(
            f"{flag('buffers')} local has no meaning for {whose}: that model has no buffers, such as "
            "BatchNorm's statistics; leave it out"
        )
    return model


def build_architecture(name: str, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A freshly initialized model, from torch's global generator: one of this project's, or `package.module:factory`.

    shape: of the inputs of one example.  Raises ValueError where there is none, or it does not take such inputs.
    """
    from models import build_model
    from perfedavg.own_model import build_own_model

    if ":" in name:
        return build_own_model(flag("architecture"), name, shape, num_classes)
    try:
        return build_model(name, shape, num_classes)
    except ValueError as error:
        raise ValueError(f"{flag('architecture')} {name} does not fit the data: {error}; name another one") from error


def check_num_workers(args: Any, num_workers: int) -> None:
    """Raises ValueError where a round would have no client for a worker."""
    config: ExperimentConfig = args.experiment
    (config if args.resume is None else replace(config, client_batching=None)).check_num_workers(num_workers)


def load_initial_model(args: Any, config: ExperimentConfig, model: nn.Module, has_checkpoint: bool) -> ExperimentConfig:
    """Give the model the weights of --initial_model, where there is one; returns the configuration with their digest.

    Only the process that holds the global model needs them, and only until the run has a checkpoint; a file that is
    named anew is read nevertheless, to be compared. Raises ValueError as `read_initial_model`.
    """
    path = args.initial_model
    if path is None or (has_checkpoint and path == read_unfinished_run(args.resume).initial_model):
        return config
    return read_initial_model(path, config, model)


def read_initial_model(path: Path, config: ExperimentConfig, model: nn.Module) -> ExperimentConfig:
    """Give the model the weights of a file, or of the run in a folder; returns the configuration with their digest.

    Raises ValueError where there is no such model, or it is not of the experiment's kind or not the run's.
    """
    from perfedavg.engine.experiment import parameters_sha256
    from perfedavg.recording.model_file import read_model_file
    from perfedavg.training.flat_model import flatten

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


def prepare_local(args: Any, folder: RunFolder, command: Sequence[str]) -> LocalRun:
    """What the experiment needs that this process does alone: data, model, and an executor on the device of the flags.

    command: as config.json is to show it.  Raises ValueError where any of it cannot be had.
    """
    dataset = get_datasets(args.experiment, args.data_root)
    config, executor, model = prepare_training(args, dataset, folder.has_checkpoint)
    run_settings = {"command": list(command), "world_size": 1, "device": str(executor.device)}
    run_settings["threads"] = executor.num_slots
    return LocalRun(config, executor, dataset, model, folder, run_settings)


def prepare_training(
    args: Any, dataset: FederatedDataset, has_checkpoint: bool = False
) -> tuple[ExperimentConfig, LocalExecutor, nn.Module]:
    """The experiment with nothing left open, who does its work in this process, and the model that it starts from.

    has_checkpoint: whether the run has a state to go on from.  Raises ValueError as `prepare_local` does.
    """
    from perfedavg.engine.executor import LocalExecutor
    from perfedavg.machine.cores import usable_cores
    from perfedavg.training.client_batching import choose_group_size, default_num_slots, say_idle_slots
    from perfedavg.training.compute import describe_device, resolve_device

    device = resolve_device(args.device)
    model = get_model(args.experiment, dataset)
    config = load_initial_model(args, args.experiment, model, has_checkpoint)
    config = choose_group_size(config, model, dataset, [describe_device(device, args.threads)])
    num_slots = args.threads or default_num_slots(config, device.type, usable_cores())
    say_idle_slots(config, num_slots)
    executor = LocalExecutor(config, model, dataset, device, num_slots)
    for warning in executor.warnings:
        say(warning)
    return config, executor, model


def open_run_folder(args: Any) -> RunFolder:
    """The folder that the flags name, a new one or with --resume that of the run that goes on.

    Nothing is left of it where the process ends before the run has begun.
    Raises ValueError where it holds a run (with --resume: none that could go on), cannot be written, or is in use.
    """
    opened: list[RunFolder] = []
    opening = threading.Lock()

    def discard(reason: signal.Signals | BaseException) -> None:
        """In another thread, where a signal came; the lock is kept, so that no folder is made from now on."""
        if opening.acquire(timeout=OPENING_SECONDS):
            for folder in opened:
                folder.discard_unless_begun()

    at_early_end(discard)
    with opening:
        opened.append(new_run_folder(args))
    return opened[0]


@contextlib.contextmanager
def with_run_folder(args: Any) -> Iterator[Any]:
    """The flags of what starts other processes, with the run's folder in them.

    One that had to be made is removed at the end of the block where nothing came of it.
    """
    if args.resume is not None or args.run_dir is not None:
        yield args
        return
    made = make_default_folder(ROOT / "runs", args.experiment.dataset)
    try:
        yield replace(args, run_dir=made)
    finally:
        remove_empty([made])


def new_run_folder(args: Any, parent: Path = ROOT / "runs") -> RunFolder:
    """As `open_run_folder`, for a caller who calls `discard_unless_begun` by itself.

    parent: where a folder goes that is not named.
    """
    from perfedavg.recording.run_folder import RunFolder

    return RunFolder(
        args.resume or args.run_dir or make_default_folder(parent, args.experiment.dataset),
        args.initial_model,
        args.checkpoint_every,
        resume=args.resume is not None,
        restart_command=os.environ.get(RESTART_VARIABLE) or restart_command(args),
        is_made_for_it=args.resume is None and args.run_dir is None,
    )
