"""What each host of a run is to do, and what only the run's own processes are to know."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.flags import ROOT, to_argv
from launch.settings import Cluster, Worker
from over_ssh.hosts_file import Host

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


class RunKeys:
    """The folder with the keys of a run, made while other things are done; gone at the end of the block.

    A run has those of --keys, or fresh ones, unless it is on this machine alone or goes by what cannot encrypt.
    """

    def __init__(self, args: Cluster, hosts: Sequence[Host]) -> None:
        self._given: Path | None = args.keys
        self._is_needed = args.keys is None and not args.needs_more_ports
        self._is_needed &= not all(host.is_this_machine for host in hosts)

    def __enter__(self) -> RunKeys:
        if self._is_needed:
            self._folder = tempfile.TemporaryDirectory(prefix="perfedavg-keys-")
            words = [sys.executable, "-W", "ignore", str(ROOT / "make_keys.py"), self._folder.name]
            self._making = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return self

    def folder(self) -> Path | None:
        """None where nothing is encrypted. Raises ValueError where no keys could be made."""
        if not self._is_needed:
            return self._given
        _, errors = self._making.communicate()
        if self._making.returncode != 0:
            raise ValueError(f"no keys could be made: {errors.strip().splitlines()[-1].removeprefix('error: ')}")
        return Path(self._folder.name)

    def __exit__(self, *exception: object) -> None:
        if self._is_needed:
            if self._making.poll() is None:
                self._making.kill()
                self._making.communicate()
            self._folder.cleanup()


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
