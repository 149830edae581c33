"""What each host of a run is to do, and what only the run's own processes are to know."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.commands import to_argv
from launch.settings import Cluster, Worker
from multi_process.transport.keys import OF_WORKERS, TOKEN_VARIABLE, make_keys, read_token, tls_context
from over_ssh.hosts_file import Host
from perfedavg.machine.private_folder import private_folder


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

    def __str__(self) -> str:
        """The host, and by which ranks the server calls its workers."""
        first, *others = self.ranks.values()
        return f"{self.host.name} (workers {first} to {others[-1]})" if others else f"{self.host.name} (worker {first})"


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


def check_network(args: Cluster, hosts: Sequence[Host]) -> None:
    """Raises ValueError for keys that nothing would use, and for an interface for tensors that none would go by.

    The server and its workers would refuse it too, but only when all hosts are ready, and by flags that nobody gave.
    """
    if args.keys is not None and args.needs_more_ports:
        raise ValueError(
            f"--backend {args.backend} sends tensors in plain text, which --keys is there to prevent; leave one of "
            "the two out"
        )
    named = [f"ethernet={host.ethernet} of {host.name}" for host in hosts if host.ethernet is not None]
    named += [f"--ethernet {args.ethernet}"] * (args.ethernet is not None)
    if not named or args.needs_more_ports:
        return
    if args.backend == "tcp" or _is_encrypted(args, hosts):
        why = "with --backend tcp" if args.backend == "tcp" else "where everything is encrypted"
        raise ValueError(
            f"{named[0]} has no effect {why}, because tensors then go to --ip too; leave it out, or send them in plain "
            "text with --backend gloo"
        )


def _is_encrypted(args: Cluster, hosts: Sequence[Host]) -> bool:
    """Not on this machine alone, nor over gloo, which cannot; unless --keys asks for it."""
    return args.keys is not None or not (args.needs_more_ports or all(host.is_this_machine for host in hosts))


@contextlib.contextmanager
def run_keys(args: Cluster, hosts: Sequence[Host]) -> Iterator[Path | None]:
    """The folder with the keys of a run: those of --keys, or fresh ones, which are gone at the end of the block.

    None where nothing is encrypted.
    """
    if args.keys is not None or not _is_encrypted(args, hosts):
        yield args.keys
        return
    with private_folder("perfedavg-keys-") as folder:
        make_keys(folder)
        yield folder


def keys_of_workers(folder: Path | None) -> dict[str, str]:
    """By their names, the files that a worker needs of a run's keys. Raises ValueError where they cannot be used."""
    if folder is None:
        return {}
    for is_server in (True, False):
        tls_context(folder, is_server)
    return {name: (folder / name).read_text(encoding="utf-8") for name in OF_WORKERS}


def secrets_of_run(args: Cluster) -> dict[str, str]:
    """Variables with what the run's processes share and nobody else is to know; ssh brings it to the hosts.

    A token: that of --token_file or the environment, or else a fresh one. Raises ValueError where it is none.
    """
    token = read_token(args.token_file)
    return {TOKEN_VARIABLE: secrets.token_hex(32) if token is None else token.decode()}
