"""A run with workers on other machines: one command that starts, watches and ends all of it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import utils
from launch.commands import restart_command, to_argv
from launch.paths import ROOT
from launch.settings import Cluster, Server
from over_ssh.addresses import choose_address
from over_ssh.check import check
from over_ssh.hosts_file import Host, read_hosts
from over_ssh.links import HostLink
from over_ssh.logs import WorkerLogs
from over_ssh.parallel import LOOK_SECONDS, Result, StoppedError, in_parallel
from over_ssh.ports import find_port_faults
from over_ssh.preparing import PreparedHost, Wanted, open_session, prepare
from over_ssh.session import HostError, Session, close_all
from over_ssh.tasks import check_network, keys_of_workers, make_tasks, run_keys, secrets_of_run
from perfedavg.machine.processes import END_SECONDS, SERVER, TERMINATE_SECONDS, LocalProcesses, SignalWatch
from perfedavg.recording.runs import CONFIG_FILE
from perfedavg.terminal.console import command_line, say
from perfedavg.terminal.entry_point import EXIT_BAD_INPUT

BEATS = 4
"""Signs of life within the silence that counts as death."""
MAX_BEAT_SECONDS = 1.0


def run(args: Cluster) -> int:
    """Run the experiment that the flags describe, or check whether it would run; returns the exit status.

    Raises ValueError or OSError, in a line for the user, where a host cannot take part.
    """
    if args.hosts is None and not args.check:
        raise ValueError(
            "--hosts is missing; name a file with a host a line, or use quick_start.sh for workers on this machine"
        )
    hosts = [] if args.hosts is None else read_hosts(args.hosts)
    num_workers = sum(host.slots for host in hosts)
    utils.check_num_workers(args, max(1, num_workers))
    check_network(args, hosts)  # this and what follows: what is wrong is said before any host is asked
    secrets_of_run(args)
    keys_of_workers(args.keys)
    signals = SignalWatch()
    try:
        return check(args, hosts, signals) if args.check else _run_with(args, hosts, signals)
    except StoppedError as stopped:
        return stopped.status


def _run_with(args: Cluster, hosts: Sequence[Host], signals: SignalWatch) -> int:
    wanted = Wanted.by(args.experiment)
    os.environ[utils.RESTART_VARIABLE] = restart_command(args)
    with contextlib.ExitStack() as stack:
        keys = stack.enter_context(run_keys(args, hosts))
        sessions: list[Session] = []
        stack.callback(close_all, sessions)
        prepared, args = prepare_all(args, hosts, wanted, sessions, signals)
        args = stack.enter_context(utils.with_run_folder(replace(args, keys=keys)))
        return _run_on(args, wanted, prepared, signals)


def prepare_all(
    args: Cluster, hosts: Sequence[Host], wanted: Wanted, sessions: list[Session], signals: SignalWatch
) -> tuple[list[PreparedHost], Cluster]:
    """All hosts with what they need, and the flags with the address by which they have reached this machine.

    sessions: takes the connections, which are the caller's to close.
    Raises ValueError with what hosts lack, StoppedError.
    """

    def prepare_one(host: Host) -> PreparedHost | HostError:
        try:
            return prepare(open_session(host, args.worker_timeout_seconds, sessions.append), wanted)
        except HostError as error:
            return error

    prepared = _without_faults(in_parallel(prepare_one, {host.name: host for host in hosts}, signals, sessions))
    ip = choose_address(args.ip, sessions)
    ways = [host.session for host in prepared]
    _without_faults(find_port_faults(ways, ip, args.port, args.needs_more_ports, signals))
    return prepared, replace(args, ip=ip)


def _without_faults(results: Sequence[Result | HostError]) -> list[Result]:
    """What are no faults. Raises ValueError where there is one, with the last; the others are said."""
    faults = [str(result) for result in results if isinstance(result, HostError)]
    if faults:
        for fault in faults[:-1]:
            say(f"error: {fault}")
        raise ValueError(faults[-1])
    return [result for result in results if not isinstance(result, HostError)]


def _run_on(args: Cluster, wanted: Wanted, prepared: Sequence[PreparedHost], signals: SignalWatch) -> int:
    """Run on hosts that are ready for it. Raises ValueError where a worker cannot take part, so that none can begin."""
    folder = args.resume or args.run_dir
    assert folder is not None
    environment = secrets_of_run(args)
    os.environ.update(environment)
    logs = WorkerLogs(folder)
    tasks = list(make_tasks(args, [host.session.host for host in prepared], environment, keys_of_workers(args.keys)))
    how = "in plain text" if args.keys is None else "encrypted"
    say(f"ready: {', '.join(map(str, tasks))}; they reach {args.ip}:{args.port}, {how}")
    links = [HostLink(task, wanted, host, logs, signals.wake) for task, host in zip(tasks, prepared, strict=True)]
    unable: list[HostLink] = []
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
                if not logs.has_begun:  # the server would wait for them
                    unable.extend(link for link in links if link.given_up is not None)
                return EXIT_BAD_INPUT if unable or all(link.status for link in links) else 0

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
    traceback = logs.unwritten_traceback()
    if status and not signals.received and traceback is not None:
        say(traceback)
    if unable:
        name = unable[0].given_up or ""
        reason = unable[0].last_line(name).removeprefix("error: ")
        raise ValueError(f"{unable[0].task.host.name}: {name} cannot take part{': ' * bool(reason)}{reason}")
    if status > 128 and not signals.received and (folder / CONFIG_FILE).exists():  # the server could not say it
        say(f"continue with: {os.environ[utils.RESTART_VARIABLE]} --resume {command_line([folder])}")
    return status


def _let_end(links: Sequence[HostLink]) -> None:
    """Give the workers time to end by themselves, as they do when the run is over."""
    deadline = time.monotonic() + END_SECONDS
    while any(link.is_following for link in links) and time.monotonic() < deadline:
        for link in links:
            link.beat()
        time.sleep(LOOK_SECONDS)


def _wait_for(links: Sequence[HostLink], silence_seconds: float) -> None:
    deadline = time.monotonic() + TERMINATE_SECONDS
    for link in links:
        if not link.is_stopped_within(max(0.0, deadline - time.monotonic())):
            say(f"{link.task.host.name} does not answer; what runs there ends by itself within {silence_seconds:.0f} s")
