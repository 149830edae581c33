"""One command for several machines, in seconds: a script stands for ssh, and this machine for the hosts."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers import (
    TINY,
    Launched,
    Process,
    assert_ended,
    assert_one_clear_line,
    children_of,
    finish,
    free_port,
    read_result,
    stop_in_round,
    wait_for_line,
    wait_until_stopped,
)

SSH = """#!/bin/sh
while [ "$1" = -T ] || [ "$1" = -o ]; do
    [ "$1" = -o ] && shift
    shift
done
[ "$1" = beta ] || { echo "ssh: Could not resolve hostname $1: Name or service not known" >&2; exit 255; }
exec sh -c "$2"
"""


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """A PATH whose ssh reaches the host beta, which is this machine."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def start(launched: Launched, path: str, folder: Path, hosts: str, *flags: str, before: Sequence[str] = ()) -> Process:
    """before: see `stop_in_round`."""
    (folder / "hosts.txt").write_text(hosts)
    (folder / "temporary").mkdir()
    return launched.start(
        *(*before, "cluster.py", "--hosts", folder / "hosts.txt", "--run_dir", folder / "run", "--device", "cpu"),
        *("--ip", "127.0.0.1", "--port", str(free_port()), *TINY, *flags),
        env={**os.environ, "PATH": path, "TMPDIR": str(folder / "temporary")},
    )


def descendants_of(pid: int) -> list[int]:
    found = children_of(pid)
    return found + [child for one in found for child in descendants_of(one)]


def test_a_killed_host_comes_back_and_the_model_is_that_of_one_process(
    launched: Launched, path: str, tmp_path: Path
) -> None:
    flags = ("--rounds", "20")
    single = launched.start("single_process.py", *TINY, *flags, "--run_dir", tmp_path / "single")
    stop = stop_in_round(3, tmp_path)
    process = start(launched, path, tmp_path, "beta slots=2\n", *flags, before=stop)  # without which it cannot go on
    wait_for_line(process, ", encrypted")
    server = wait_until_stopped(process, "server")
    (beta,) = [pid for pid in children_of(process.pid) if len(descendants_of(pid)) == 3]  # with what removes its keys
    on_beta = descendants_of(beta)
    os.kill(beta, signal.SIGKILL)
    os.kill(server, signal.SIGCONT)
    wait_for_line(process, "beta: the connection ended (status -9); see that `ssh beta` works; trying beta again")
    status, output, errors = finish(process)
    assert status == 0, errors
    _, reached, since = errors.partition("beta: reached again; starting 2 workers")
    assert reached
    assert re.search(r"server: worker [12] joined", since), "one may have done what was left before the other is there"
    assert "after fine-tuning" in output
    assert finish(single)[0] == 0
    digests = [read_result(tmp_path / name)["model_sha256"] for name in ("run", "single")]
    assert digests[0] == digests[1]
    logs = {file.name: file.read_text() for file in (tmp_path / "run" / "workers").iterdir()}
    assert set(logs) == {"beta-1.log", "beta-2.log"}
    assert "joined 127.0.0.1:" in "".join(logs.values())
    for pid in on_beta:
        assert_ended(pid)
    assert list((tmp_path / "temporary").iterdir()) == [], "the keys of a host are gone with it"


def test_a_signal_ends_everything(launched: Launched, path: str, tmp_path: Path) -> None:
    process = start(launched, path, tmp_path, "beta\nlocalhost\n", "--rounds", "100000")
    wait_for_line(process, "FedAvg round 2/")
    processes = descendants_of(process.pid)
    assert len(processes) == 8, "the server; of each host its own and its worker; and what removes the keys of three"
    process.send_signal(signal.SIGINT)
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGINT
    assert "stopped by SIGINT" in errors
    for pid in processes:
        assert_ended(pid)
    assert list((tmp_path / "temporary").iterdir()) == [], "the keys of a run are gone with it"


def test_a_worker_that_cannot_take_part_ends_a_run_that_has_not_begun(
    launched: Launched, path: str, tmp_path: Path
) -> None:
    """At once and with its own reason; the server would wait for it, as the other worker does."""
    hosts = "beta slots=2 device=cpu,cuda:99\n"
    process = start(launched, path, tmp_path, hosts, "--join_timeout_seconds", "100000")
    assert_one_clear_line(process, "error: beta: worker 2 cannot take part: --device cuda:99 is not there")
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_check_says_in_ten_lines_what_will_work(launched: Launched, path: str, tmp_path: Path) -> None:
    process = start(launched, path, tmp_path, "beta\n", "--check")
    status, output, errors = finish(process)
    assert status == 0, errors
    *lines, last = output.splitlines()
    lines = [line for line in lines if not line.startswith(" ")]  # without what is said of one more host
    assert " ".join(line.split()[0] for line in lines) == (
        "ssh project packages address ports data kernels devices room clocks"
    )
    verdicts = {line.split()[0]: line.split()[1] for line in lines}
    assert verdicts.pop("room") in ("ok", "look"), "how much memory others use at the moment is theirs to say"
    assert set(verdicts.values()) == {"ok"}
    assert last == "a run will work"
    assert not (tmp_path / "run").exists()


def test_a_command_without_hosts_says_what_is_missing(launched: Launched) -> None:
    assert_one_clear_line(launched.start("cluster.py", "--dataset", "digits"), "--hosts is missing; name a file")


def test_a_host_that_is_not_reached_is_a_line_before_anything_is_started(
    launched: Launched, path: str, tmp_path: Path
) -> None:
    process = start(launched, path, tmp_path, "beta\ndelta\n")
    assert_one_clear_line(
        process, "delta: ssh: Could not resolve hostname delta", "mend its name in the file of --hosts"
    )
    assert not (tmp_path / "run").exists()
