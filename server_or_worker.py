"""Entry point for launchers that start one script for all ranks, such as torchrun: the server or a worker, by RANK."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace

import client_worker
import server
import utils
from launch.commands import to_argv
from launch.paths import ROOT
from launch.settings import (
    LAUNCHER_ADDRESS,
    LAUNCHER_PORT,
    LAUNCHER_RANK,
    LAUNCHER_SIZE,
    Server,
    ServerOrWorker,
    Worker,
)
from perfedavg.machine.processes import hold_free_port
from perfedavg.terminal.entry_point import run_entry_point


def main() -> None:
    args = utils.get_args("server_or_worker")
    rank = own_rank(os.environ)
    if torchrun_has_port(args, os.environ):
        from multi_process import agent_store

        store = agent_store.AgentStore.of_environment(os.environ, args.join_timeout_seconds)
        if is_on_one_machine(os.environ) and args.ip == os.environ.get(LAUNCHER_ADDRESS):
            args = replace(args, ip="127.0.0.1")
        if rank == 0:
            _held, port = hold_port_at(args.ip)  # until this process ends
            store.tell_port(port)
        else:
            port = store.ask_port()
        args = replace(args, port=port)
    entry_point, kind, own = (server, Server, {}) if rank == 0 else (client_worker, Worker, {"rank": rank})
    sys.argv = [str(ROOT / kind.script), *to_argv(args, kind, **own)]
    entry_point.main()


def own_rank(environment: Mapping[str, str]) -> int:
    """Raises ValueError where no launcher has set it."""
    text = environment.get(LAUNCHER_RANK, "")
    if not text.isdecimal():
        raise ValueError(
            f"{LAUNCHER_RANK} is {text or 'not'} in the environment, must be this process's number from 0; start "
            f"{ServerOrWorker.script} with torchrun or another launcher that sets it, or use server.py and "
            "client_worker.py"
        )
    return int(text)


def torchrun_has_port(args: ServerOrWorker, environment: Mapping[str, str]) -> bool:
    """Whether the port of the flags is the one that torchrun itself listens on."""
    shares_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shares_store and environment.get(LAUNCHER_PORT) == str(args.port)


def hold_port_at(host: str) -> tuple[socket.socket, int]:
    """As `hold_free_port`. Raises ValueError where it is no address of this machine."""
    try:
        return hold_free_port(host)
    except OSError as error:
        raise ValueError(
            f"cannot listen on --ip {host} ({error.strerror}), which {LAUNCHER_ADDRESS} says where no flag does; use "
            "an address of this machine, the one with rank 0"
        ) from error


def is_on_one_machine(environment: Mapping[str, str]) -> bool:
    """Whether torchrun has started all ranks here; the name that it gives this machine may then be known to no one."""
    return environment.get("LOCAL_WORLD_SIZE") == environment.get(LAUNCHER_SIZE)


if __name__ == "__main__":
    run_entry_point(main)
