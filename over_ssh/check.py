"""`cluster.py --check`: in about ten lines, what a run will find on this machine and its hosts, and what to mend."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.paths import ROOT
from launch.settings import Cluster
from over_ssh.addresses import choose_address
from over_ssh.hosts_file import THIS_MACHINE, Host
from over_ssh.parallel import in_parallel
from over_ssh.ports import find_port_faults
from over_ssh.preparing import (
    OF_ANY_VERSION,
    PACKAGES,
    Wanted,
    find_python,
    install_command,
    open_session,
    place_tree,
    wrong_versions,
)
from over_ssh.session import HostError, Session, close_all
from perfedavg.machine.interfaces import own_addresses
from perfedavg.machine.kernels import KernelLog
from perfedavg.machine.processes import SignalWatch
from perfedavg.own_files import shown_dataset
from perfedavg.terminal.console import show

OK, LOOK, FAILS = "ok", "look", "FAILS"
HERE = "this machine"
LEAST_MEMORY_GB, LEAST_DISK_GB = 2.0, 1.0
"""Of which a machine should have more free: for two processes with torch and a small model, and for a small run."""
MOST_CLOCK_SECONDS = 30.0
PROBE = "over_ssh.on_host.probe"
_ERROR, _MISSING = "error: ", "missing: "


@dataclass
class Machine:
    """What was found on one.

    facts: what is there, by subject, as a text that two machines have in common where they do not differ.
    faults: what is missing for a run, by subject, with the way out.  warnings: what is not as one may expect.
    sources: see `own_module.sources`.
    kernels: what its processes compute with, one of each kind, see `compute.describe_kernels`.
    """

    name: str
    session: Session | None = None
    facts: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    kernels: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """What the check says of a subject. verdict: OK; LOOK where a run works, but for what is said; FAILS."""

    subject: str
    verdict: str
    said: list[str]

    def __str__(self) -> str:
        indented = f"\n{'':17}".join(self.said)
        return f"{self.subject:<10}{self.verdict:<7}{indented}"


def check(args: Cluster, hosts: Sequence[Host], signals: SignalWatch) -> int:
    """Look, and print what was found; returns the exit status. hosts: none for this machine alone.

    Raises ValueError where something will not work, StoppedError.
    """
    wanted = Wanted.by(args.experiment)
    with ExitStack() as stack:
        sessions: list[Session] = []
        stack.callback(close_all, sessions)

        def look(host: Host | None) -> Machine:
            return look_here(args, wanted, sessions) if host is None else look_there(host, args, wanted, sessions)

        here, *there = in_parallel(look, {HERE: None, **{host.name: host for host in hosts}}, signals, sessions)
        try:
            reached = [machine.session for machine in there if machine.session is not None]
            if reached or not hosts:
                ip = choose_address(args.ip, reached) if hosts else args.ip
                look_at_ports(here, there, ip, args, signals)
        except ValueError as error:
            here.faults["address"] = str(error)
    lines = list(make_lines(here, there))
    for line in lines:
        show(str(line))
    num_failing = sum(line.verdict == FAILS for line in lines)
    if num_failing:
        raise ValueError(f"a run would fail: mend what {num_failing} of {len(lines)} lines say")
    can_be_had = ", if the missing data can be downloaded" * any(
        "data" in machine.warnings for machine in (here, *there)
    )
    show(f"{'a run will work' if hosts else 'this machine can take part in a run'}{can_be_had}")
    return 0


def look_here(args: Cluster, wanted: Wanted, sessions: list[Session]) -> Machine:
    """Through a connection to this machine itself, which ends what it looks with.

    sessions: takes the connection, which is the caller's to close.
    """
    machine = Machine(HERE)
    machine.facts["project"] = f"version {wanted.project.digest[:12]}"
    trains = args.hosts is None
    try:
        host = Host(THIS_MACHINE, python=sys.executable)
        session = open_session(host, args.worker_timeout_seconds, sessions.append)
        _look_at_packages(machine, host, session, trains)
        place = {"python": sys.executable, "code": str(ROOT), "folder": str(wanted.folder)}
        device = args.device if trains else "auto" if args.backend == "nccl" else "cpu"
        starts_from = None if args.resume else args.initial_model  # which a run that goes on has read
        argv = probe_argv(args, args.data_root, [device], starts_from)
        _take_probe(machine, session.ask("run", module=PROBE, argv=argv, **place), args, trains)
    except HostError as error:
        machine.faults["data"] = error.said
    return machine


def _look_at_packages(machine: Machine, host: Host, session: Session, trains: bool) -> None:
    """Of the Python that runs this. Where no worker will, what else one may import need not be there."""
    packages = [*PACKAGES, *OF_ANY_VERSION]
    answer = session.ask("find_python", candidates=[sys.executable], packages=packages, with_cache=False)
    versions = answer["found"][0]["versions"]
    machine.facts["packages"] = _packages(versions["python"], {name: versions[name] for name in PACKAGES})
    lacking = wrong_versions(versions, {})
    if lacking:
        said = f"{', '.join(lacking)}; run: {install_command(host, answer, str(ROOT))}"
        (machine.faults if trains else machine.warnings)["packages"] = said


def look_there(host: Host, args: Cluster, wanted: Wanted, sessions: list[Session]) -> Machine:
    """sessions: takes the connection, which is the caller's to close."""
    machine = Machine(host.name)
    subject = "ssh"
    try:
        session = machine.session = open_session(host, args.worker_timeout_seconds, sessions.append)
        machine.facts[subject] = "this machine, without ssh" if host.is_this_machine else "reached"
        asked = time.time()
        theirs = session.ask("begin", silence_seconds=args.worker_timeout_seconds)["time"]
        _compare_clocks(machine, asked, theirs, time.time())
        subject = "project"
        code, copied = place_tree(session, wanted.project)
        machine.facts[subject] = f"version {wanted.project.digest[:12]}"
        if copied:
            machine.warnings[subject] = f"copied to {code}, because {ROOT} there is missing or another version"
        subject = "packages"
        python, versions = find_python(session, wanted.versions, code)
        machine.facts[subject] = _packages(versions.pop("python"), versions)
        subject = "data"
        folder = str(wanted.folder) if wanted.own is None else place_tree(session, wanted.own)[0]
        devices = dict.fromkeys(host.device_of(slot) or args.device for slot in range(host.slots))
        argv = probe_argv(args, host.data_root or args.data_root, devices)
        place = {"python": python, "code": code, "folder": folder}
        _take_probe(machine, session.ask("run", module=PROBE, argv=argv, **place), args)
    except HostError as error:
        machine.faults[subject] = error.said
    return machine


def probe_argv(
    args: Cluster, data_root: object, devices: Iterable[str], initial_model: Path | None = None
) -> list[str]:
    """Of PROBE: the experiment as a run tells it to workers, so that there is nothing that flags could not say."""
    told = {
        "experiment": args.experiment.to_dict(),
        "data_root": str(data_root),
        "devices": list(devices),
        "initial_model": None if initial_model is None else str(initial_model),
    }
    return [json.dumps(told)]


def _packages(python: str, versions: dict[str, str]) -> str:
    return f"Python {python}, {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _compare_clocks(machine: Machine, asked: float, theirs: float, answered: float) -> None:
    """theirs: read between the other two, so that it is known but for the time between those."""
    seconds = max(0.0, asked - theirs, theirs - answered)
    machine.facts["clocks"] = f"equal this machine's within {max(1.0, answered - asked):.0f} s"
    if seconds > MOST_CLOCK_SECONDS:
        machine.facts["clocks"] = "differ"
        machine.warnings["clocks"] = f"{seconds:.0f} s from this machine's; set it, as by timedatectl set-ntp true"


def _take_probe(machine: Machine, answer: dict[str, Any], args: Cluster, trains: bool = True) -> None:
    """trains: whether it will; a server only steps and adds."""
    if answer["status"] != 0:
        machine.faults["data"] = answer["last"].removeprefix(_ERROR) or f"the look at it ended with {answer['status']}"
        return
    found = json.loads(answer["output"])
    data, device, kernels = found["data"], found["device"], found["kernels"]
    machine.sources = found["sources"]
    if data.startswith(_ERROR):
        machine.faults["data"] = data.removeprefix(_ERROR)
    elif data.startswith(_MISSING):
        machine.warnings["data"] = f"{data.removeprefix(_MISSING)}; a run downloads it, unless you put it there"
    else:
        machine.facts["data"] = f"{shown_dataset(args.experiment.dataset)}, fingerprint {data[:12]}"
    if device.startswith(_ERROR):
        machine.faults["devices"] = device.removeprefix(_ERROR)
    elif args.backend == "nccl" and "cpu" in device:
        machine.faults["devices"] = "--backend nccl needs a GPU for each process, and one computes on cpu; use gloo"
    elif isinstance(kernels, str):
        machine.faults["kernels"] = kernels.removeprefix(_ERROR)
    else:
        machine.kernels = kernels if trains else [found["server_kernels"]]
    if trains and machine.kernels:
        machine.facts["devices"] = (
            f"{found['cores']} cores, GPUs: {', '.join(found['gpus']) or 'none'}; trains on {device}"
        )
        log = KernelLog()
        for kind in kernels:
            log.add(kind)
        machine.facts["kernels"] = ", ".join(f"{name} {' and '.join(kinds)}" for name, kinds in log.to_dict().items())
    machine.facts["room"] = f"{found['memory_gb']:.0f} GB of memory and {found['disk_gb']:.0f} GB of disk are free"
    if found["memory_gb"] < LEAST_MEMORY_GB or found["disk_gb"] < LEAST_DISK_GB:
        machine.warnings["room"] = "that is little; make room, or use fewer slots there"


def look_at_ports(here: Machine, there: Sequence[Machine], ip: str | None, args: Cluster, signals: SignalWatch) -> None:
    """ip: of this machine; None where any of its addresses may be meant. Raises ValueError, StoppedError."""
    reached = [(machine, machine.session) for machine in there if machine.session is not None]
    sessions = [session for _, session in reached]
    faults = find_port_faults(sessions, ip or "", args.port, args.needs_more_ports, signals)
    addresses = own_addresses()
    named = addresses if ip is None else {ip: addresses.get(ip, "loopback")}
    shown = ", ".join(f"{address} ({interface})" for address, interface in named.items())
    here.facts["address"] = f"{shown or 'none but 127.0.0.1'}; port {args.port} is free"
    for (machine, _), fault in zip(reached, faults, strict=True):
        if fault is None:
            what = "and those for tensors are" if args.needs_more_ports else "is"
            machine.facts["ports"] = f"{ip}:{args.port} {what} reached"
        else:
            machine.faults["ports"] = fault.said


SUBJECTS = ("ssh", "project", "packages", "address", "ports", "data", "kernels", "devices", "room", "clocks")


def make_lines(here: Machine, there: Sequence[Machine]) -> list[Line]:
    """A line a subject, of which anything is known."""
    _compare(here, there)
    lines = []
    for subject in SUBJECTS:
        machines = [here, *there]
        faults = [f"{machine.name}: {machine.faults[subject]}" for machine in machines if subject in machine.faults]
        warnings = [
            f"{machine.name}: {machine.warnings[subject]}" for machine in machines if subject in machine.warnings
        ]
        names_by_fact: dict[str, list[str]] = {}
        for machine in machines:
            if subject in machine.facts and subject not in machine.faults:
                names_by_fact.setdefault(machine.facts[subject], []).append(machine.name)
        num_asked = len(machines) if subject in here.facts else len(there)
        facts = [
            f"{'all' if len(names) == num_asked > 1 else ', '.join(names)}: {fact}"
            for fact, names in names_by_fact.items()
        ]
        if faults or warnings or facts:
            verdict = FAILS if faults else LOOK if warnings else OK
            lines.append(Line(subject, verdict, [*faults, *warnings, *facts]))
    return lines


def _compare(here: Machine, there: Sequence[Machine]) -> None:
    """Note in what hosts must not differ from this machine, or should not from any other."""
    kernels = KernelLog()
    for kind in here.kernels:
        kernels.add(kind)
    for machine in there:
        if "data" in machine.facts and "data" in here.facts and machine.facts["data"] != here.facts["data"]:
            machine.faults["data"] = (
                f"{machine.facts['data']}, and here {here.facts['data'].rpartition(' ')[2]}; give both the same files, "
                "with data_root=FOLDER behind the host where they are elsewhere"
            )
        changed = [name for name, digest in machine.sources.items() if here.sources.get(name, digest) != digest]
        if changed:
            machine.faults["project"] = (
                f"the code of {', '.join(sorted(changed))} is not this machine's; give both the same files"
            )
        differences = []
        for kind in machine.kernels:
            differences += kernels.differences(kind)
            kernels.add(kind)
        if differences:
            machine.warnings["kernels"] = (
                f"{', '.join(differences)}: the last bits of the model will depend on who trains which client; see "
                "--portable_kernels"
            )
