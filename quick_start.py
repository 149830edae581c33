"""Entry point of quick_start.sh: a server and its workers on this machine, as one command."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import utils
from perfedavg.machine.forking import load
from perfedavg.machine.kernels import pin_kernels_or_restart
from perfedavg.machine.processes import SERVER, LocalProcesses, SignalWatch, hold_free_port
from perfedavg.recording.folders import make_default_folder, remove_empty
from perfedavg.terminal.console import command_line
from perfedavg.terminal.entry_point import EXIT_BAD_INPUT, end_process, prepare_process, report


def load_everything() -> None:
    """Import what servers and workers do. No GPU is touched, because a fork could not use it then."""
    for module in ("datasets", "models", "multi_process.server", "multi_process.worker", "perfedavg.run"):
        importlib.import_module(module)


def main() -> int:
    args = utils.get_args("quick_start")
    try:
        config = utils.experiment_from_args(args)
        utils.check_num_workers(utils.config_from_args(args), args.workers)  # before anything is started
        pin_kernels_or_restart(config.portable_kernels, utils.ROOT / "quick_start.py", sys.argv[1:])
    except ValueError as error:
        return report(error)
    made = None
    if args.resume is None and args.run_dir is None:
        args.run_dir = made = make_default_folder(utils.ROOT / "runs", args.dataset)
    restart = os.environ[utils.RESTART_VARIABLE] = utils.restart_command("quick_start", args)
    os.environ.setdefault("PERFEDAVG_TOKEN", secrets.token_hex(32))  # so that no other user of this machine can join
    signals = SignalWatch()
    load(load_everything)
    with contextlib.ExitStack() as stack:
        if args.port is None:
            held, args.port = hold_free_port()
            stack.enter_context(held)
        processes = stack.enter_context(LocalProcesses(EXIT_BAD_INPUT))
        for name, script, argv, shows_output in programs(args):
            processes.start(name, script, argv, shows_output)
        status = processes.wait(signals)
    run = args.resume or args.run_dir
    if status == 0 and args.dataset == "digits":
        print(f"the paper's experiment: {restart} --dataset emnist")
    elif status > 128 and not signals.received and (run / "config.json").exists():  # the server could not say it
        print(f"continue with: {restart} --resume {command_line([run])}", file=sys.stderr)
    if made is not None:
        remove_empty([made])  # where nothing came of it
    return status


def programs(args: argparse.Namespace) -> Iterator[tuple[str, Path, list[str], bool]]:
    """(name, script, its flags, whether its output is shown) of the server and each worker."""
    flags = argparse.Namespace(**vars(args), ip="127.0.0.1", world_size=args.workers + 1)
    yield SERVER, utils.ROOT / "server.py", utils.to_argv(flags, "server"), True
    for rank in range(1, args.workers + 1):
        flags.rank = rank
        yield f"worker {rank}", utils.ROOT / "client_worker.py", utils.to_argv(flags, "worker"), False


if __name__ == "__main__":
    prepare_process()
    end_process(main())
