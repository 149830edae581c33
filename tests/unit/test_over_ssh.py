"""What is asked of hosts, by way of this machine's shell in place of ssh; and what is made of the answers."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from helpers import ROOT, assert_ended, wait_until

from multi_process.transport.keys import TOKEN_VARIABLE
from over_ssh import addresses, links, parallel, preparing, running
from over_ssh.hosts_file import Host
from over_ssh.logs import WorkerLogs
from over_ssh.preparing import Wanted, prepare
from over_ssh.running import run
from over_ssh.session import (
    _READ_PROGRAM,
    CLOSE_SECONDS,
    MAX_CONNECTING,
    HostError,
    Session,
    close_all,
    command_of,
    remote_command,
)
from over_ssh.tasks import Task, check_network, make_tasks
from over_ssh.tree import Tree, own_tree, project_tree
from perfedavg.recording.files import replace_file
from utils import get_args

HERE = Host("localhost")
LONG = 60.0


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A connection to this machine, as to a host whose user has nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with Session(HERE, [sys.executable], LONG) as opened:
        yield opened


def some_tree(folder: Path) -> Tree:
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "it's.py").write_text("x = 1\n")
    return Tree.read(folder, ("package/__init__.py", "package/it's.py"))


def test_ssh_asks_no_question_and_notices_silence() -> None:
    words = command_of(Host("anna@beta"), "the command", 30.0)
    assert words[0] == "ssh"
    assert words[-2:] == ["anna@beta", "the command"]
    options = set(words[3:-2:2])
    assert {"BatchMode=yes", "ServerAliveInterval=10", "ServerAliveCountMax=3", "ControlMaster=no"} <= options
    assert "ServerAliveInterval=1" in command_of(Host("beta"), "", 1.0), "0 would turn it off"


def test_the_command_is_one_for_every_login_shell() -> None:
    """sh, bash, zsh, csh and fish read it alike as long as nothing needs to be escaped within single quotes."""
    command = remote_command(["/usr/bin/python3"])
    assert command.startswith("exec sh -c '")
    assert not re.search(r"[\\!\n]", command)
    assert "'\"'" not in command, "no single quote within quotes"


def test_the_first_python_that_is_there_reads_the_program(tmp_path: Path) -> None:
    python = tmp_path / "it's a python"
    python.symlink_to(sys.executable)
    program = b"import sys; print(sys.executable, sys.stdin.read())\0"
    command = ["sh", "-c", remote_command([str(tmp_path / "none"), str(python)])]
    answer = subprocess.run(command, input=program + b"what follows", capture_output=True)
    assert answer.stdout.decode().split("python")[-1].strip() == "what follows", answer.stderr
    lost = subprocess.run(["sh", "-c", remote_command([])], input=b"import sys", capture_output=True, timeout=60)
    assert lost.returncode == 1, "it waits for no more where the other machine is gone"


def test_a_host_without_python_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(HostError) as refusal:
        Session(HERE, ["/x"], LONG).__enter__()
    cached = f"{tmp_path}/.cache/personalized-fedavg/.venv/bin/python"
    said = f"localhost: no Python 3 that runs among /x {cached} python3; name one of version 3.10"
    assert str(refusal.value).startswith(said)
    (tmp_path / "my python").symlink_to(sys.executable)
    with Session(HERE, ["~/my python"], LONG) as session:
        assert session.facts["python"], "python= may be in the user's home"


def test_a_host_whose_python_is_too_old_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    old = f"import sys; sys.version_info = (3, 6, 8); sys.version = '3.6.8 (default)'; {_READ_PROGRAM}"
    monkeypatch.setattr("over_ssh.session.command_of", lambda *told: [sys.executable, "-c", old])
    said = "beta: Python 3.6.8 there is too old; name one of version 3.10 or later by python=PATH"
    with pytest.raises(HostError, match=re.escape(said)):
        Session(Host("beta"), [], LONG).__enter__()


OLD_PYTHON = """#!/bin/sh
case $2 in *print*) echo False;; *) echo "Python 3.6.8 there is too old" >&2; exit 1;; esac
"""
"""Of which what is asked first answers as an old Python would, and what is run then ends as it does there."""


def test_a_python_that_is_too_old_is_passed_over_for_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system's one, where there is a later one in the folder that the documentation names."""
    old = tmp_path / "python3"
    old.write_text(OLD_PYTHON)
    old.chmod(0o755)
    (tmp_path / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my cache"))
    with pytest.raises(HostError, match=r"Python 3\.6\.8 there is too old; name one of version 3\.10 or later"):
        Session(HERE, ["/x", str(old)], LONG).__enter__()
    cached = tmp_path / "my cache" / "personalized-fedavg" / ".venv" / "bin" / "python"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(sys.executable)
    with Session(HERE, ["/x", str(old)], LONG) as opened:
        assert opened.facts["python"]


def test_what_a_host_greets_with_is_not_why_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"echo 'Authorized use only' >&2; {remote_command([sys.executable])}"
    monkeypatch.setattr("over_ssh.session.command_of", lambda *told: ["sh", "-c", command])
    with Session(Host("beta"), [], LONG) as opened:
        opened.kill()
        assert opened.lost().said == "the connection ended (status -9); see that `ssh beta` works"


def test_a_sign_of_life_goes_over_any_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hundred hosts take more than the 1,024 that `select` knows."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, limits[1]), limits[1]))
    held = [os.dup(0) for _ in range(1024)]
    try:
        with Session(HERE, [sys.executable], LONG) as opened:
            opened.beat()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_hosts_are_connected_to_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or their sshd, or that of a jump host, refuses some of them."""
    arrived, may_go = threading.Semaphore(0), threading.Event()

    def connect() -> None:
        arrived.release()
        assert may_go.wait(LONG)

    taken: list[Session] = []
    monkeypatch.setattr(preparing, "Session", lambda *told: SimpleNamespace(open=connect))
    threads = [
        threading.Thread(target=preparing.open_session, args=(Host("beta"), LONG, taken.append), daemon=True)
        for _ in range(MAX_CONNECTING + 1)
    ]
    for thread in threads:
        thread.start()
    for _ in range(MAX_CONNECTING):
        assert arrived.acquire(timeout=LONG)
    assert not preparing._connecting.acquire(blocking=False), "there is no place for one more"
    may_go.set()
    for thread in threads:
        thread.join(LONG)
    assert len(taken) == MAX_CONNECTING + 1


def test_hosts_that_do_not_answer_are_given_up_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, given = [100.0], []

    def close(seconds: float) -> None:
        given.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("over_ssh.session.time", SimpleNamespace(monotonic=lambda: clock[0]))
    silent = SimpleNamespace(end_input=lambda: None, close=close)
    close_all(cast("list[Session]", 3 * [silent]))
    assert given == [CLOSE_SECONDS, 0.0, 0.0]


def test_a_host_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its home hangs, or its key waits to be touched; ssh is content, and would wait for ever."""
    monkeypatch.setattr("over_ssh.session.OPEN_SECONDS", 0.1)
    monkeypatch.setattr("over_ssh.session.command_of", lambda *told: ["sleep", "1000"])
    said = "beta: no answer within 0 s; see that `ssh beta python3 -V` answers soon, and without a question"
    with pytest.raises(HostError, match=re.escape(said)):
        Session(Host("beta"), [], LONG).__enter__()


def test_hosts_that_are_waited_for_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    may_go = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        may_go.set()

    def work(number: int) -> int:
        assert number == 0 or may_go.wait(LONG)
        return number

    monkeypatch.setattr(parallel, "say", say)
    monkeypatch.setattr(parallel, "REMINDER_SECONDS", 0.0)
    monkeypatch.setattr(parallel, "MAX_NAMED", 2)
    signals = SimpleNamespace(received=None, wait=lambda seconds: None)
    hosts = {name: number for number, name in enumerate(("beta", "gamma", "delta", "epsilon"))}
    assert parallel.in_parallel(work, hosts, cast(Any, signals), []) == [0, 1, 2, 3]
    assert said[0].endswith(("waiting for gamma, delta and 1 more", "waiting for beta, gamma and 2 more"))


def test_what_a_host_prints_besides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("over_ssh.session.command_of", lambda *told: ["sh", "-c", "echo Welcome!; cat >/dev/null"])
    with pytest.raises(HostError, match="'Welcome!' came in place of an answer; let the login shell there print noth"):
        Session(Host("beta"), [], LONG).__enter__()


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("Host key verification failed.", "accept its key once by `ssh beta`"),
        ("anna@beta: Permission denied (publickey).", "let `ssh beta` work without a question"),
        ("ssh: Could not resolve hostname beta: Name or service not known", "mend its name"),
        ("ssh: connect to host beta port 22: Connection refused", "see that `ssh beta` works"),
    ],
)
def test_what_ssh_says_comes_with_the_way_out(said: str, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["sh", "-c", f"echo first >&2; echo {shlex.quote(said)} >&2; exit 255"]
    monkeypatch.setattr("over_ssh.session.command_of", lambda *told: words)
    with pytest.raises(HostError, match=re.escape(f"beta: {said.rstrip('.')}; {mend}")):
        Session(Host("beta"), [], LONG).__enter__()


def test_code_is_found_or_copied_once(session: Session, tmp_path: Path) -> None:
    tree = some_tree(tmp_path / "here")
    asked: dict[str, Any] = {"files": list(tree.files), "digest": tree.digest}
    assert session.ask("find_tree", root=str(tree.root), **asked)["at"] == str(tree.root)
    assert session.ask("find_tree", root="/nowhere", **asked)["at"] is None
    content = tree.archive
    copy = session.ask("unpack_tree", content, size=len(content), **asked)["at"]
    assert copy.startswith(str(tmp_path / "cache"))
    assert (Path(copy) / "package" / "it's.py").read_text() == "x = 1\n"
    assert session.ask("find_tree", root="/nowhere", **asked)["at"] == copy
    (tree.root / "package" / "it's.py").write_text("x = 2\n")
    changed = Tree.read(tree.root, tree.files)
    assert changed.digest != tree.digest
    assert session.ask("find_tree", root=str(tree.root), **asked)["at"] == copy, "the folder holds another version now"
    (Path(copy) / "package" / "it's.py").write_text("x = 3\n")
    assert session.ask("find_tree", root="/nowhere", **asked)["at"] is None, "a copy that was changed is none"
    assert session.ask("unpack_tree", content, size=len(content), **asked)["at"] == copy
    (Path(copy) / "used by another host").touch()
    assert session.ask("unpack_tree", content, size=len(content), **asked)["at"] == copy
    assert (Path(copy) / "used by another host").exists(), "a home may be shared"
    assert list(Path(copy).parent.iterdir()) == [Path(copy)]


def test_a_host_gets_the_code_with_which_the_run_began(session: Session, tmp_path: Path) -> None:
    """Also where it comes back after the code was changed."""
    tree = some_tree(tmp_path / "here")
    (tree.root / "package" / "it's.py").write_text("x = 2\n")
    place, is_copy = preparing.place_tree(session, tree)
    assert is_copy
    assert (Path(place) / "package" / "it's.py").read_text() == "x = 1\n"


def test_a_machine_without_ssh_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("over_ssh.session.command_of", lambda *told: ["/nowhere/ssh"])
    said = "beta: /nowhere/ssh cannot be started here (No such file or directory); install OpenSSH's client"
    with pytest.raises(HostError, match=re.escape(said)):
        Session(Host("beta"), [], LONG)


def test_a_home_in_which_nothing_can_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    tree = some_tree(tmp_path / "here")
    tree.root.rename(tmp_path / "nowhere")
    said = f"{tree.root} could not be copied there (/dev/null/personalized-fedavg: Not a directory); let that folder be"
    with Session(HERE, [sys.executable], LONG) as opened, pytest.raises(HostError, match=re.escape(said)):
        preparing.place_tree(opened, tree)


def test_a_copy_that_was_damaged_on_its_way_is_no_matter_of_rights(session: Session, tmp_path: Path) -> None:
    sent = some_tree(tmp_path / "here")
    sent.root.rename(tmp_path / "nowhere")
    said = rf"{sent.root} could not be copied there \(what arrived in \S+ is not what was sent\); try again$"
    with pytest.raises(HostError, match=said):
        preparing.place_tree(session, replace(sent, digest=64 * "0"))


def test_a_host_with_this_folder_and_environment_needs_nothing(session: Session) -> None:
    versions = {name: preparing.public(preparing.version(name)) for name in preparing.PACKAGES}
    host = prepare(session, Wanted(project_tree(), None, versions))
    assert (host.code, host.python) == (str(ROOT), sys.executable)


def test_own_modules_that_a_host_has_not_are_copied_and_its_workers_start_there(
    session: Session, tmp_path: Path
) -> None:
    own = some_tree(tmp_path / "here")
    own.root.rename(tmp_path / "nowhere")
    host = prepare(session, Wanted(project_tree(), own, {}))
    assert host.folder.startswith(str(tmp_path / "cache"))
    assert (Path(host.folder) / "package" / "it's.py").exists()


def test_what_an_environment_lacks_is_said_with_the_command_that_mends_it(session: Session, tmp_path: Path) -> None:
    wanted = Wanted(project_tree(), None, {"torch": "1.0", "fedlab": "1.3.0", "not-there": "2"})
    with pytest.raises(HostError) as fault:
        prepare(session, wanted)
    assert f"{sys.executable} has torch " in str(fault.value)
    assert "(here 1.0), not-there missing (here 2)" in str(fault.value)
    assert str(fault.value).endswith(
        f"; name one by python=PATH behind the host, or run: sh {ROOT}/quick_start.sh --help"
    )


def test_a_package_of_any_version_must_be_there(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "OF_ANY_VERSION", ("psutil", "not-there"))
    with pytest.raises(HostError, match=f"{re.escape(sys.executable)} has not-there missing; name one by python=PATH"):
        preparing.find_python(session, {}, str(ROOT))
    required = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    monkeypatch.undo()
    assert required >= {*preparing.PACKAGES, *preparing.OF_ANY_VERSION}


def test_a_package_that_this_machine_lacks_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "PACKAGES", ("torch", "not-there"))
    requirements = re.escape(f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}")
    with pytest.raises(ValueError, match=f"^{re.escape(sys.executable)} has no not-there; run: {requirements}$"):
        Wanted.by(get_args("cluster", ["--dataset", "digits"]).experiment)


@pytest.mark.parametrize(
    ("name", "content", "mode", "fault"),
    [
        ("none", None, 0, "is not there"),
        (".", None, 0, "is a folder"),
        ("text", "print()", 0o600, "is not executable"),
        ("data", "\x7fELF", 0o700, "is no Python 3 that runs"),
        ("script", "#!/bin/sh\necho 3 $*; cat", 0o700, "is no Python 3 that runs"),
    ],
)
def test_a_python_that_is_none_is_a_line_with_the_value(
    name: str, content: str | None, mode: int, fault: str, tmp_path: Path
) -> None:
    """Another one of the host must have been found to say so."""
    python = tmp_path / name
    if content is not None:
        python.write_text(content)
        python.chmod(mode)
    host = Host("localhost", python=str(python))
    said = f"localhost: python={python} {fault}; mend it in the file of --hosts, or leave it out"
    with Session(host, preparing.pythons(host), LONG) as opened, pytest.raises(HostError) as refusal:
        preparing.find_python(opened, {"torch": "1.0"}, str(ROOT))
    assert str(refusal.value) == said


def test_the_command_for_a_copy_sets_up_an_environment_beside_it() -> None:
    answer = {"cache": "/home/it's/.cache/personalized-fedavg", "python": "/usr/bin/python3.11"}
    command = preparing.install_command(Host("beta"), answer, "/home/it's/.cache/personalized-fedavg/0123")
    program, host, remote = shlex.split(command)
    assert (program, host) == ("ssh", "beta")
    first, second = remote.split(" && ")
    venv = "/home/it's/.cache/personalized-fedavg/.venv"
    assert shlex.split(first) == ["/usr/bin/python3.11", "-m", "venv", venv]
    assert shlex.split(second)[0] == f"{venv}/bin/python"
    assert shlex.split(second)[-1] == "/home/it's/.cache/personalized-fedavg/0123/requirements.txt"


def test_the_command_for_a_named_python_does_not_leave_its_home_to_a_shell(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would not look into quotes for it."""
    home = tmp_path / "it's home"
    home.mkdir()
    (home / "python").symlink_to(sys.executable)
    monkeypatch.setenv("HOME", str(home))
    host = Host("localhost", python="~/python")
    with Session(host, preparing.pythons(host), LONG) as opened, pytest.raises(HostError) as fault:
        preparing.find_python(opened, {"not-there": "1"}, "/code")
    command = str(fault.value).partition("or run: ")[2]
    assert shlex.split(command) == [str(home / "python"), "-m", "pip", "install", "-r", "/code/requirements.txt"]


def test_the_projects_code_is_what_a_worker_needs() -> None:
    files = project_tree().files
    assert {"client_worker.py", "requirements.txt", "quick_start.sh", "over_ssh/on_host/workers.py"} <= set(files)
    assert not any(name.startswith(("tests/", "datasets/data/", "runs/", ".venv/")) for name in files)


@pytest.mark.parametrize(
    ("named", "files"),
    [
        ("my_net", {"my_net.py", "beside.py", "package/__init__.py", "package/it's.py"}),
        ("package.it's", {"my_net.py", "beside.py", "package/__init__.py", "package/it's.py"}),
        ("nets.small", {"my_net.py", "beside.py", "package/__init__.py", "package/it's.py", "nets/small.py"}),
        ("installed.module", set()),
        ("nets.installed", set()),
    ],
)
def test_a_users_own_modules_go_with_those_beside_them(named: str, files: set[str], tmp_path: Path) -> None:
    """Also from a folder without an `__init__.py`, from which Python imports as well."""
    some_tree(tmp_path)
    for name in ("my_net.py", "beside.py", "nets/small.py", "package/data/x.py", "scripts/y.py", "models/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    tree = own_tree(tmp_path, [named])
    assert (set() if tree is None else set(tree.files)) == files


def test_nothing_goes_along_where_nothing_of_the_users_own_is_named(tmp_path: Path) -> None:
    some_tree(tmp_path)
    assert own_tree(tmp_path, []) is None
    for dataset in ("digits", str(tmp_path / "package:d" / "my.csv")):
        assert Wanted.by(get_args("cluster", ["--dataset", dataset]).experiment).own is None


@pytest.mark.parametrize("how", ["end of input", "silence"])
def test_what_runs_on_a_host_ends_when_nobody_asks_any_more(how: str) -> None:
    session = Session(HERE, [sys.executable], LONG if how == "end of input" else 0.2)
    session.open()
    if how == "end of input":
        session.beat()
        session.end_input()
    assert session._process.wait(60) == 1
    assert_ended(session._process.pid)
    with pytest.raises(HostError, match="the connection ended"):
        session.ask("begin", silence_seconds=1)
    session.close()


BLOCKED = """
import os, signal
def main():
    with open("pid.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename("pid.new", "pid")
    signal.pause()
"""


def test_what_is_being_run_for_a_request_ends_when_nobody_asks_any_more(session: Session, tmp_path: Path) -> None:
    (tmp_path / "blocked.py").write_text(BLOCKED)
    folder = str(tmp_path)
    session.send(
        {"do": "run", "python": sys.executable, "code": folder, "module": "blocked", "argv": [], "folder": folder}
    )
    wait_until((tmp_path / "pid").exists, "the start of what is run")
    session.end_input()
    assert session._process.wait(LONG) == 1
    assert_ended(int((tmp_path / "pid").read_text()))


def test_a_request_that_fails_is_an_error_and_not_the_end(session: Session) -> None:
    with pytest.raises(HostError, match="localhost: KeyError: 'nothing'"):
        session.ask("nothing")
    assert session.ask("find_tree", root="/nowhere", files=["x"], digest="")["at"] is None


def sessions(**seen_from: str) -> list[Session]:
    found = [SimpleNamespace(host=Host(name), facts={"seen_from": address}) for name, address in seen_from.items()]
    return cast("list[Session]", found)


def test_the_address_is_the_one_that_the_hosts_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "own_addresses", lambda: {"10.0.0.1": "eth0", "10.1.0.1": "eth1"})
    assert addresses.choose_address(None, sessions(beta="10.0.0.1", gamma="10.0.0.1", localhost="")) == "10.0.0.1"
    assert addresses.choose_address("192.168.0.1", sessions(beta="10.0.0.1")) == "192.168.0.1"
    assert addresses.choose_address(None, sessions(localhost="")) == "127.0.0.1"
    assert addresses.choose_address(None, sessions(alpha="127.0.0.1", beta="10.0.0.1")) == "10.0.0.1"
    assert addresses.choose_address(None, sessions(alpha="::1")) == "127.0.0.1"
    for seen, said in (
        ({"beta": "203.0.113.9"}, "beta sees ssh come from 203.0.113.9, which is no IPv4 address of this machine"),
        ({"beta": ""}, "there is no SSH_CONNECTION there"),
        ({"beta": "10.0.0.1", "gamma": "10.1.0.1"}, "(beta as 10.0.0.1, gamma as 10.1.0.1); choose with --ip"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            addresses.choose_address(None, sessions(**seen))


def test_each_worker_gets_a_rank_and_what_its_host_has(tmp_path: Path) -> None:
    argv = ["--hosts", str(tmp_path / "hosts"), "--ip", "10.0.0.1", "--port", "4000", "--device", "cpu", "--seed", "3"]
    args = get_args("cluster", [*argv, "--token_file", str(tmp_path / "token"), "--join_timeout_seconds", "77"])
    hosts = [Host("beta"), Host("gamma", 2, "cuda:0,cuda:1", "~/my data", ethernet="ib0")]
    first, second = make_tasks(args, hosts, {"PERFEDAVG_TOKEN": "secret"}, {"worker.key": "secret"})
    assert list(first.workers) == ["worker 1"]
    assert dict(second.ranks) == {"worker 2": 2, "worker 3": 3}
    assert (str(first), str(second)) == ("beta (worker 1)", "gamma (workers 2 to 3)")
    assert "secret" not in json.dumps([*first.workers.values(), *second.workers.values()])
    workers = [get_args("worker", words) for words in (*first.workers.values(), *second.workers.values())]
    assert [worker.rank for worker in workers] == [1, 2, 3]
    assert [worker.device for worker in workers] == ["cpu", "cuda:0", "cuda:1"]
    assert {(worker.ip, worker.port, worker.world_size, worker.token_file, worker.keys) for worker in workers} == {
        ("10.0.0.1", 4000, 4, None, None)
    }
    assert workers[0].data_root == args.data_root
    assert workers[1].data_root == Path(os.path.expanduser("~/my data"))
    assert workers[1].ethernet == "ib0"
    assert workers[0].join_timeout_seconds == 77


@pytest.mark.parametrize(
    ("host", "flags", "said"),
    [
        ("beta", ["--keys", "{folder}"], "--keys {folder} has no server.key; make_keys.py makes keys"),
        ("beta", ["--token_file", "{folder}/hosts"], "the token in --token_file {folder}/hosts has 4 characters"),
        (
            "beta",
            ["--keys", "{folder}", "--backend", "gloo"],
            "--backend gloo sends tensors in plain text, which --keys",
        ),
        ("beta ethernet=ib0", [], "ethernet=ib0 of beta has no effect where everything is encrypted, because tensors"),
        ("beta", ["--ethernet", "ib0"], "--ethernet ib0 has no effect where everything is encrypted, because tensors"),
        ("localhost", ["--ethernet", "lo", "--backend", "tcp"], "--ethernet lo has no effect with --backend tcp, bec"),
        (
            "localhost",
            ["--ethernet", "lo", "--keys", "{folder}"],
            "--ethernet lo has no effect where everything is enc",
        ),
    ],
)
@pytest.mark.parametrize("check", [[], ["--check"]], ids=["run", "check"])
def test_keys_tokens_and_interfaces_that_cannot_be_used_are_said_before_any_host_is_asked(
    check: list[str], host: str, flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text(host)
    monkeypatch.setattr("over_ssh.session.command_of", lambda *told: pytest.fail("it was asked"))
    argv = ["--hosts", str(tmp_path / "hosts"), *check, *(flag.format(folder=tmp_path) for flag in flags)]
    with pytest.raises(ValueError, match=re.escape(said.format(folder=tmp_path))):
        run(get_args("cluster", argv))


@pytest.mark.parametrize(
    ("host", "flags"),
    [
        (Host("beta", ethernet="ib0"), ["--backend", "gloo"]),
        (Host("beta", ethernet="ib0"), ["--backend", "nccl"]),
        (Host("localhost", ethernet="lo"), []),
    ],
)
def test_an_interface_for_tensors_may_be_named_where_they_go_in_plain_text(host: Host, flags: list[str]) -> None:
    check_network(get_args("cluster", ["--hosts", "hosts", *flags]), [host])


@pytest.mark.parametrize("ends", [True, False])
def test_why_a_worker_ended_is_said_unless_the_server_ends_by_it_and_says_it_itself(
    ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(links, "say", said.append)
    monkeypatch.setattr(links, "GRACE_SECONDS", LONG if ends else 0.0)
    task = Task(Host("beta"), {"worker 1": []}, {"worker 1": 1}, {}, {}, LONG)
    logs = WorkerLogs(tmp_path)
    logs.add("beta-1", "error: mnist is not in /data\n")
    prepared, wanted = SimpleNamespace(session=None), SimpleNamespace()
    link = links.HostLink(task, cast(Any, wanted), cast(Any, prepared), logs, lambda: None)
    saying = threading.Thread(target=link._say, args=("worker 1 ended with status 2",))
    saying.start()
    if ends:
        link.begin_to_stop()  # as soon as the server has ended
    saying.join(LONG)
    assert said == ([] if ends else ["beta: worker 1 ended with status 2: error: mnist is not in /data"])


@pytest.mark.parametrize("prints", [True, False])
def test_every_loss_of_a_host_is_said_whose_workers_ran(
    prints: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour later it may be lost for the same reason; workers that cannot start have the same to say at each try."""
    said: list[str] = []
    pauses: list[float] = []
    losses = 4

    class LostSession:
        def ask(self, do: str, **fields: Any) -> None: ...

        def send(self, fields: dict[str, Any]) -> None: ...

        def lines(self) -> Iterator[dict[str, Any]]:
            if prints:
                yield {"worker": "worker 1", "output": "joined\n"}

        def lost(self) -> HostError:
            return HostError(Host("beta"), "no answer")

        def close(self) -> None: ...

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == losses:
            link._stopping.set()

    monkeypatch.setattr(links, "say", said.append)
    monkeypatch.setattr(links, "open_session", lambda *told: LostSession())
    monkeypatch.setattr(links, "prepare", lambda session, wanted: prepared)
    prepared = SimpleNamespace(session=LostSession(), python="", code="", folder="")
    task = Task(Host("beta"), {"worker 1": []}, {"worker 1": 1}, {}, {}, LONG)
    logs = WorkerLogs(tmp_path)
    link = links.HostLink(task, cast(Any, SimpleNamespace()), cast(Any, prepared), logs, lambda: None)
    monkeypatch.setattr(link._stopping, "wait", pause)
    link._run()
    lost = "beta: no answer; trying beta again, while the others go on"
    assert [line for line in said if "reached again" not in line] == [lost] * (losses if prints else 1)
    assert pauses == ([1.0] * losses if prints else [1.0, 2.0, 4.0, 8.0])


def test_logs_wait_for_the_run_to_begin(tmp_path: Path) -> None:
    """A folder that the server refuses, or leaves as it was, must not get any."""
    run = tmp_path / "run"
    logs = WorkerLogs(run)
    logs.add("beta-1", "no server yet\njoi")
    assert not run.exists()
    run.mkdir()
    (run / "config.json").write_text("{}")
    logs.add("beta-1", "ned \udcff\n")
    assert (run / "workers" / "beta-1.log").read_bytes() == b"no server yet\njoined \xff\n"
    assert logs.last_line("beta-1").startswith("joined")
    assert logs.last_line("gamma-2") == ""
    refused = WorkerLogs(run)
    refused.add("beta-1", "of a run whose folder is another's")
    resumed = WorkerLogs(run)
    resumed.add("beta-1", "joined ")
    assert not resumed.has_begun
    replace_file(run / "config.json", b"{}")  # as the server does when the run goes on
    assert resumed.has_begun
    resumed.add("beta-1", "again\n")
    assert (run / "workers" / "beta-1.log").read_text(errors="replace").splitlines()[1:] == [
        "joined \ufffd",
        "joined again",
    ]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_worker_that_ends_by_a_bug_before_the_run_begins_shows_it(
    is_stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is written only when the run has begun."""
    said: list[str] = []

    class Link:
        task, status, given_up = None, None, None
        is_following = False

        def __init__(self, task: Task, wanted: object, host: object, logs: WorkerLogs, *more: object) -> None:
            self.logs = logs

        def start(self) -> None:
            self.logs.add("beta-1", "no server yet\n")
            self.logs.add("beta-2", "no server yet\nTraceback (most recent call last):\n  File x\nKeyError: 3\n")

        def begin_to_stop(self) -> None: ...

        def is_stopped_within(self, seconds: float) -> bool:
            return True

    class Processes:
        def __init__(self, final_status: int) -> None: ...

        def __enter__(self) -> Processes:
            return self

        def __exit__(self, *exception: object) -> None: ...

        def start(self, *told: object, **more: object) -> None: ...

        def wait(self, *told: object) -> int:
            return 2

    monkeypatch.setattr(running, "say", said.append)
    monkeypatch.setattr(running, "HostLink", Link)
    monkeypatch.setattr(running, "LocalProcesses", Processes)
    monkeypatch.setenv(TOKEN_VARIABLE, 64 * "0")
    args = get_args("cluster", ["--ip", "127.0.0.1", "--run_dir", str(tmp_path / "run")])
    hosts = [SimpleNamespace(session=SimpleNamespace(host=Host("beta", slots=2)))]
    signals = SimpleNamespace(received=signal.SIGINT if is_stopped else None, wake=None)
    assert running._run_on(args, cast(Any, None), cast(Any, hosts), cast(Any, signals)) == 2
    shown = ["beta-2 has printed\nno server yet\nTraceback (most recent call last):\n  File x\nKeyError: 3"]
    assert said[1:] == ([] if is_stopped else shown)
    assert not (tmp_path / "run").exists()
