"""Entry point of quick_start.sh: a server and its workers on this machine, as one command."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import utils
from launch.commands import restart_command, to_argv
from launch.paths import ROOT
from launch.settings import JoinTimeout, QuickStart, Server, Worker
from perfedavg.machine.forking import load
from perfedavg.machine.kernels import pin_kernels_or_restart
from perfedavg.machine.processes import ENDS_WITH_INPUT, SERVER, LocalProcesses, SignalWatch, hold_free_port
from perfedavg.terminal.console import command_line
from perfedavg.terminal.entry_point import EXIT_BAD_INPUT, end_process, prepare_process, report


def load_everything() -> None:
    """Import what servers and workers do. No GPU is touched, because a fork could not use it then."""
    for module in ("datasets", "models", "multi_process.server", "multi_process.worker", "perfedavg.recorded_run"):
        importlib.import_module(module)


def main() -> int:
    try:
        args = utils.get_args("quick_start")
        utils.check_num_workers(args, args.workers)  # before anything is started
        pin_kernels_or_restart(args.experiment.portable_kernels, ROOT / "quick_start.py", sys.argv[1:])
    except ValueError as error:
        return report(error)
    restart = os.environ[utils.RESTART_VARIABLE] = restart_command(args)
    os.environ.setdefault("PERFEDAVG_TOKEN", secrets.token_hex(32))  # so that no other user of this machine can join
    signals = SignalWatch(0 if os.environ.pop(ENDS_WITH_INPUT, None) else None)
    load(load_everything)
    with contextlib.ExitStack() as stack:
        args = stack.enter_context(utils.with_run_folder(args))
        if args.port is None:
            held, port = hold_free_port()
            stack.enter_context(held)
            args = replace(args, port=port)
        processes = stack.enter_context(LocalProcesses(EXIT_BAD_INPUT))
        for name, script, argv, shows_output in programs(args):
            processes.start(name, script, argv, shows_output)
        status = processes.wait(signals)
    run = args.resume or args.run_dir
    if status == 0 and args.experiment.dataset == "digits":
        print(f"the paper's experiment: {restart} --dataset emnist")
    elif status > 128 and not signals.received and (run / "config.json").exists():  # the server could not say it
        print(f"continue with: {restart} --resume {command_line([run])}", file=sys.stderr)
    return status


def programs(args: QuickStart) -> Iterator[tuple[str, Path, list[str], bool]]:
    """(name, script, its flags, whether its output is shown) of the server and each worker."""
    network = {"ip": "127.0.0.1", "world_size": args.workers + 1}
    network |= {"join_timeout_seconds": JoinTimeout.join_timeout_seconds}  # of the workers too: the server will come
    yield SERVER, ROOT / Server.script, to_argv(args, Server, **network), True
    for rank in range(1, args.workers + 1):
        yield f"worker {rank}", ROOT / Worker.script, to_argv(args, Worker, **network, rank=rank), False


if __name__ == "__main__":
    prepare_process()
    end_process(main())
