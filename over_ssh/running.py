"""A run with workers on other machines: one command that starts, watches and ends all of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import utils
from launch.flags import ROOT, restart_command, to_argv
from launch.settings import Cluster, Server, Worker
from over_ssh.addresses import choose_address
from over_ssh.hosts_file import Host, read_hosts
from over_ssh.links import HostLink, Task
from over_ssh.logs import WorkerLogs
from over_ssh.preparing import PreparedHost, Wanted, connect, prepare
from over_ssh.session import HostError, Session
from perfedavg.machine.processes import SERVER, TERMINATE_SECONDS, LocalProcesses, SignalWatch
from perfedavg.recording.folders import make_default_folder, remove_empty
from perfedavg.recording.runs import CONFIG_FILE
from perfedavg.terminal.console import command_line, say
from perfedavg.terminal.entry_point import EXIT_BAD_INPUT

TOKEN_VARIABLE = "PERFEDAVG_TOKEN"
BEATS = 4
"""Signs of life within the silence that counts as death."""
MAX_BEAT_SECONDS = 1.0
END_SECONDS = 5.0
"""For workers to end by themselves when the run is over."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class StoppedError(Exception):
    """A signal asked this process to end. status: its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run(args: Cluster) -> int:
    """Run the experiment that the flags describe; returns the exit status.

    Raises ValueError or OSError, in a line for the user, where a host cannot take part.
    """
    hosts = read_hosts(args.hosts)
    num_workers = sum(host.slots for host in hosts)
    utils.check_num_workers(args, num_workers)
    wanted = Wanted.by(args.experiment)
    signals = SignalWatch()
    with contextlib.ExitStack() as stack:
        sessions: list[Session] = []
        stack.callback(lambda: [session.close() for session in sessions])
        try:
            prepared = prepare_all(args, hosts, wanted, sessions, signals)
        except StoppedError as stopped:
            return stopped.status
        os.environ[utils.RESTART_VARIABLE] = restart_command(args)
        args = replace(args, ip=choose_address(args.ip, [host.session for host in prepared]))
        say(f"{len(hosts)} host(s) for {num_workers} worker(s) are ready; they reach this machine as {args.ip}")
        return _run_on(args, wanted, prepared, signals)


def prepare_all(
    args: Cluster, hosts: Sequence[Host], wanted: Wanted, sessions: list[Session], signals: SignalWatch
) -> list[PreparedHost]:
    """All hosts with what they need. sessions: takes the connections, which are the caller's to close.

    Raises ValueError with what hosts lack, StoppedError.
    """

    def prepare_one(host: Host) -> PreparedHost | HostError:
        try:
            session = connect(host, args.worker_timeout_seconds)
            sessions.append(session)
            return prepare(session, wanted)
        except HostError as error:
            return error

    def beat() -> None:
        for session in list(sessions):
            session.beat()

    results = in_parallel(prepare_one, hosts, signals, beat)
    faults = [str(result) for result in results if isinstance(result, HostError)]
    if faults:
        for fault in faults[:-1]:
            say(f"error: {fault}")
        raise ValueError(faults[-1])
    return [result for result in results if isinstance(result, PreparedHost)]


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], signals: SignalWatch, beat: Callable[[], None]
) -> list[Result]:
    """What a function returns for each item, each in a thread that has ended then.

    beat: called meanwhile, again and again.  Raises StoppedError where a signal came, and what a thread raised.
    """
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            results[number] = function(items[number])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(items))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if signals.received:
            say(f"stopped by {signals.received.name}")
            raise StoppedError(128 + signals.received)
        beat()
        signals.wait(0.05)
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]


def _run_on(args: Cluster, wanted: Wanted, prepared: Sequence[PreparedHost], signals: SignalWatch) -> int:
    """Run on hosts that are ready for it."""
    made = None
    if args.resume is None and args.run_dir is None:
        made = make_default_folder(ROOT / "runs", args.experiment.dataset)
        args = replace(args, run_dir=made)
    folder = args.resume or args.run_dir
    assert folder is not None
    environment = secrets_of_run(args)
    os.environ.update(environment)
    logs = WorkerLogs(folder, resumes=args.resume is not None)
    tasks = list(make_tasks(args, [host.session.host for host in prepared], environment))
    links = [HostLink(task, wanted, host, logs, signals.wake) for task, host in zip(tasks, prepared, strict=True)]
    try:
        with LocalProcesses(EXIT_BAD_INPUT) as processes:
            world_size = sum(len(task.workers) for task in tasks) + 1
            argv = to_argv(replace(args, token_file=None), Server, world_size=world_size)
            processes.start(SERVER, ROOT / Server.script, argv, shows_output=True)  # before there are other threads
            for link in links:
                link.start()

            def look() -> int:
                for link in links:
                    link.beat()
                logs.flush()
                statuses = [link.status for link in links]
                return EXIT_BAD_INPUT if all(statuses) else 0

            beat_seconds = min(MAX_BEAT_SECONDS, args.worker_timeout_seconds / BEATS)
            status = processes.wait(signals, look, beat_seconds)
            if status == 0:
                _let_end(links)
            for link in links:  # while the server ends
                link.begin_to_stop()
    finally:
        for link in links:
            link.begin_to_stop()
        _wait_for(links, args.worker_timeout_seconds)
        logs.flush()
    if status > 128 and not signals.received and (folder / CONFIG_FILE).exists():  # the server could not say it
        say(f"continue with: {os.environ[utils.RESTART_VARIABLE]} --resume {command_line([folder])}")
    if made is not None:
        remove_empty([made])  # where nothing came of it
    return status


def _let_end(links: Sequence[HostLink]) -> None:
    """Give the workers time to end by themselves, as they do when the run is over."""
    deadline = time.monotonic() + END_SECONDS
    for link in links:
        link.is_stopped_within(max(0.0, deadline - time.monotonic()))


def _wait_for(links: Sequence[HostLink], silence_seconds: float) -> None:
    deadline = time.monotonic() + TERMINATE_SECONDS
    for link in links:
        if not link.is_stopped_within(max(0.0, deadline - time.monotonic())):
            say(f"{link.task.host.name} does not answer; what runs there ends by itself within {silence_seconds:.0f} s")


def make_tasks(args: Cluster, hosts: Sequence[Host], environment: dict[str, str]) -> Iterator[Task]:
    """What each host is to do. Ranks count from 1, in the order of the hosts."""
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
            workers[name] = to_argv(replace(args, token_file=None), Worker, **own)
            ranks[name] = rank
        yield Task(host, workers, ranks, environment, args.worker_timeout_seconds)


def secrets_of_run(args: Cluster) -> dict[str, str]:
    """Variables with what the run's processes share and nobody else is to know; ssh brings it to the hosts.

    A token: that of --token_file or the environment, or else a fresh one.
    """
    if args.token_file is not None:
        return {TOKEN_VARIABLE: Path(args.token_file).read_text(encoding="utf-8").strip()}
    return {TOKEN_VARIABLE: os.environ.get(TOKEN_VARIABLE) or secrets.token_hex(32)}
