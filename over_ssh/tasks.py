"""What each host of a run is to do, and what only the run's own processes are to know."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.flags import ROOT, to_argv
from launch.settings import Cluster, Worker
from over_ssh.hosts_file import Host
from perfedavg.machine.private_folder import private_folder

TOKEN_VARIABLE = "PERFEDAVG_TOKEN"


@dataclass(frozen=True)
class Task:
    """What a host is to do.

    workers: by their names on that host, their flags.  ranks: by the same names.
    environment: variables that its processes get; where secrets stand.
    keys: by the names of files, the keys of its workers; empty where nothing is encrypted.
    silence_seconds: after which the host and this machine take each other for lost.
    """

    host: Host
    workers: Mapping[str, Sequence[str]]
    ranks: Mapping[str, int]
    environment: Mapping[str, str]
    keys: Mapping[str, str]
    silence_seconds: float


def make_tasks(
    args: Cluster, hosts: Sequence[Host], environment: Mapping[str, str], keys: Mapping[str, str]
) -> Iterator[Task]:
    """What each host is to do. Ranks count from 1, in the order of the hosts.

    environment, keys: see `Task`.
    """
    args = replace(args, token_file=None, keys=None)  # which the hosts get in their own ways
    rank, world_size = 0, sum(host.slots for host in hosts) + 1
    for host in hosts:
        workers, ranks = {}, {}
        for slot in range(host.slots):
            rank += 1
            own = {
                "rank": rank,
                "world_size": world_size,
                "device": host.device_of(slot) or args.device,
                "data_root": host.data_root or args.data_root,
                "ethernet": host.ethernet or args.ethernet,
            }
            name = f"worker {rank}"
            workers[name] = to_argv(args, Worker, **own)
            ranks[name] = rank
        yield Task(host, workers, ranks, environment, keys, args.worker_timeout_seconds)


@contextlib.contextmanager
def run_keys(args: Cluster, hosts: Sequence[Host]) -> Iterator[Callable[[], Path | None]]:
    """The folder with the keys of a run, made while other things are done; gone at the end of the block.

    A run has those of --keys, or fresh ones, unless it is on this machine alone or goes by what cannot encrypt.
    Yields what waits for the folder, which is None where nothing is encrypted. It raises ValueError where no keys could
    be made.
    """
    is_in_plain_text = args.needs_more_ports or all(host.is_this_machine for host in hosts)
    if args.keys is not None or is_in_plain_text:
        yield lambda: args.keys
        return
    with private_folder("perfedavg-keys-") as folder:
        words = [sys.executable, "-W", "ignore", str(ROOT / "make_keys.py"), str(folder)]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as making:

            def made() -> Path:
                _, errors = making.communicate()
                if making.returncode != 0:
                    reason = errors.strip().splitlines()[-1].removeprefix("error: ")
                    raise ValueError(f"no keys could be made: {reason}")
                return folder

            try:
                yield made
            finally:
                making.kill()


def keys_of_workers(folder: Path | None) -> dict[str, str]:
    """By their names, the files that a worker needs of a run's keys: its own, and the server's certificate."""
    if folder is None:
        return {}
    return {name: (folder / name).read_text(encoding="utf-8") for name in ("worker.key", "worker.crt", "server.crt")}


def secrets_of_run(args: Cluster) -> dict[str, str]:
    """Variables with what the run's processes share and nobody else is to know; ssh brings it to the hosts.

    A token: that of --token_file or the environment, or else a fresh one.
    """
    if args.token_file is not None:
        return {TOKEN_VARIABLE: Path(args.token_file).read_text(encoding="utf-8").strip()}
    return {TOKEN_VARIABLE: os.environ.get(TOKEN_VARIABLE) or secrets.token_hex(32)}
