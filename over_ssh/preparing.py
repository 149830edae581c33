"""What a host must have before it can train: this version of the project, a Python that knows the packages."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launch.paths import ROOT
from over_ssh.hosts_file import Host
from over_ssh.on_host.program import IS_NOT_THERE
from over_ssh.session import MAX_CONNECTING, HostError, Session
from over_ssh.tree import Tree, own_tree, project_tree
from perfedavg.fields import values_of
from perfedavg.own_files import is_own_code
from perfedavg.settings import ExperimentConfig
from perfedavg.terminal.console import command_line

PACKAGES = ("torch", "torchvision", "fedlab", "numpy")
"""Those whose versions decide what comes out, or whether the processes understand each other."""
OF_ANY_VERSION = ("psutil", "tqdm", "safetensors", "filelock", "pillow", "pyarrow", "scikit-learn", "pooch")
"""What else a worker may import."""
_connecting = threading.BoundedSemaphore(MAX_CONNECTING)
_OWN_CODE = ("dataset", "model", "method", "fine_tune_method", "metrics")
"""Flags whose values may name modules of the user's own."""


@dataclass(frozen=True)
class Wanted:
    """What all hosts are to have.

    project: the code of this machine.  own: the user's modules, where any are named.
    versions: of PACKAGES, without what a build adds, such as +cpu.
    folder: current folder of this machine, which is a worker's too where it is there.
    """

    project: Tree
    own: Tree | None
    versions: Mapping[str, str]
    folder: Path = field(default_factory=Path.cwd)

    @classmethod
    def by(cls, config: ExperimentConfig) -> Wanted:
        """What an experiment needs. Raises ValueError where this machine lacks one of PACKAGES."""
        values = values_of(config)
        names = [name for flag in _OWN_CODE for name in str(values.get(flag, "")).split(",") if is_own_code(name)]
        own = own_tree(Path.cwd(), [name.partition(":")[0] for name in names])
        return cls(project_tree(), own, versions_here())


@dataclass(frozen=True)
class PreparedHost:
    """A host with all that it needs.

    session: the connection to it.
    python: its interpreter.  code: folder of the project there.
    folder: in which its workers start, where it is there.
    """

    session: Session
    python: str
    code: str
    folder: str


def open_session(host: Host, silence_seconds: float, take: Callable[[Session], None]) -> Session:
    """A connection to a host, as soon as not too many others are being made.

    take: is given it before it is opened, for whoever may have to end it.  Raises HostError.
    """
    with _connecting:
        session = Session(host, pythons(host), silence_seconds)
        take(session)
        session.open()
    return session


def pythons(host: Host) -> list[str]:
    """Where a host's interpreter may be: its own `python=`, or those of this machine."""
    if host.python is not None:
        return [host.python]
    return list(dict.fromkeys([sys.executable, str(ROOT / ".venv" / "bin" / "python")]))


def prepare(session: Session, wanted: Wanted) -> PreparedHost:
    """Find what is there, copy the code that is not. Raises HostError with what is missing and how to get it."""
    code, _ = place_tree(session, wanted.project)
    python, _ = find_python(session, wanted.versions, code)
    folder = str(wanted.folder)
    if wanted.own is not None:
        folder, _ = place_tree(session, wanted.own)
    return PreparedHost(session, python, code, folder)


def place_tree(session: Session, tree: Tree) -> tuple[str, bool]:
    """The folder that has the same files there, and whether they were copied into it. Raises HostError."""
    files, digest = list(tree.files), tree.digest
    place = session.ask("find_tree", root=str(tree.root), files=files, digest=digest)["at"]
    if place is not None:
        return place, False
    answer = session.ask("unpack_tree", tree.archive, files=files, digest=digest, size=len(tree.archive))
    if answer["at"] is None:
        reason = f"{tree.root} could not be copied there ({answer['reason']})"
        raise HostError(session.host, reason, answer["mend"])
    return answer["at"], True


def find_python(session: Session, wanted: Mapping[str, str], code: str) -> tuple[str, dict[str, str]]:
    """An interpreter with the wanted versions of packages, and its own versions.

    code: folder of the project there.  Raises HostError with what is missing, and the command that installs it.
    """
    host = session.host
    packages, with_cache = [*wanted, *OF_ANY_VERSION], host.python is None
    answer = session.ask("find_python", candidates=pythons(host), packages=packages, with_cache=with_cache)
    absent: list[str] = []
    faults: list[str] = []
    for entry in answer["found"]:
        if "fault" in entry and host.python is not None:
            mend = "mend it in the file of --hosts, or leave it out"
            raise HostError(host, f"python={host.python} {entry['fault']}", mend)
        if "fault" in entry:
            (absent if entry["fault"] == IS_NOT_THERE else faults).append(f"{entry['path']} {entry['fault']}")
            continue
        versions = entry["versions"]
        wrong = wrong_versions(versions, wanted)
        if not wrong:
            return entry["path"], {name: versions[name] for name in ("python", *wanted)}
        faults.append(f"{entry['path']} has {', '.join(wrong)}")
    other = "another" if host.python else "one"
    mend = f"name {other} by python=PATH behind the host, or run: {install_command(host, answer, code)}"
    raise HostError(host, f"no Python with this project's packages: {'; '.join(faults or absent)}", mend)


def wrong_versions(versions: Mapping[str, str | None], wanted: Mapping[str, str]) -> list[str]:
    """What an environment lacks or has in another version. versions: those that it has."""
    wrong = [
        f"{name} {versions.get(name) or 'missing'} (here {ours})"
        for name, ours in wanted.items()
        if public(versions.get(name) or "") != ours
    ]
    return wrong + [f"{name} missing" for name in OF_ANY_VERSION if versions.get(name) is None]


def versions_here() -> dict[str, str]:
    """Of PACKAGES, without what a build adds. Raises ValueError where one is missing."""
    try:
        return {name: public(version(name)) for name in PACKAGES}
    except PackageNotFoundError as error:
        command = command_line([sys.executable, "-m", "pip", "install", "-r", ROOT / "requirements.txt"])
        raise ValueError(f"{sys.executable} has no {error.name}; run: {command}") from error


def install_command(host: Host, answer: Mapping[str, Any], code: str) -> str:
    """The command that sets up an environment there. answer: of `program.find_python`."""
    if host.python is not None:
        command = command_line([answer["found"][0]["path"], "-m", "pip", "install", "-r", f"{code}/requirements.txt"])
    elif code == str(ROOT):
        command = f"sh {command_line([code + '/quick_start.sh'])} --help"
    else:
        venv = f"{answer['cache']}/.venv"
        pip = command_line([f"{venv}/bin/python", "-m", "pip", "install", "-r", f"{code}/requirements.txt"])
        command = f"{command_line([answer['python'], '-m', 'venv', venv])} && {pip}"
    return command if host.is_this_machine else command_line(["ssh", host.name, command])


def public(version: str) -> str:
    """A version without what a build adds to it."""
    return version.partition("+")[0]
