"""One command for several machines: workers started by OpenSSH on hosts that have nothing but a network in common."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers import (
    TINY,
    Launched,
    Process,
    assert_one_clear_line,
    digest_in_one_process,
    finish,
    read_result,
    spoken_text,
    stop_in_round,
    wait_for_line,
    wait_until_stopped,
)
from ssh_hosts import SshHosts, lan_or_skip, ssh_hosts_or_skip

from benchmarks.lan import HOSTS, Lan, run

FLAGS = [*TINY, "--rounds", "60", "--eval_every", "3"]
LONG = [*TINY, "--rounds", "100000"]
SHORT_SILENCE = ("--worker_timeout_seconds", "8")
"""After which a host counts as lost, where the test waits for that; long enough for a busy machine."""
GONE_SECONDS = 120
"""For what should end by itself; far above what it needs on a busy machine."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wires() -> Iterator[Lan]:
    with lan_or_skip() as lan:
        yield lan


@pytest.fixture(scope="module")
def servers(wires: Lan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHosts]:
    with ssh_hosts_or_skip(wires, tmp_path_factory.mktemp("ssh")) as hosts:
        yield hosts


@pytest.fixture
def hosts(servers: SshHosts) -> Iterator[SshHosts]:
    """The hosts, with all cables plugged in, and nothing running on them at the end."""
    yield servers
    for host in HOSTS:
        servers.lan.plug_in(host)
    wait_until_empty(servers)


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the model that the experiment gives in one process."""
    return digest_in_one_process(FLAGS, tmp_path_factory.mktemp("single") / "run")


def start(hosts: SshHosts, launched: Launched, folder: Path, *flags: str, before: Sequence[str] = ()) -> Process:
    """before: see `stop_in_round`."""
    (folder / "hosts.txt").write_text(f"beta\ngamma slots=2 python={hosts.python}\n")
    return launched.start(
        *(
            *before,
            "cluster.py",
            "--hosts",
            folder / "hosts.txt",
            *flags,
            "--device",
            "cpu",
            "--run_dir",
            folder / "run",
        ),
        env={**os.environ, "PATH": f"{hosts.path}:{os.environ['PATH']}"},
        network_namespace=hosts.lan.namespace("alpha"),
    )


def wait_until_empty(hosts: SshHosts, *names: str) -> None:
    """Until nothing runs on the hosts any more but sshd."""
    deadline = time.monotonic() + GONE_SECONDS
    for host in names or HOSTS:
        while pids := hosts.pids(host):
            assert time.monotonic() < deadline, {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
            time.sleep(0.1)


def test_one_command_trains_the_model_of_one_process(
    hosts: SshHosts, launched: Launched, digest: str, tmp_path: Path
) -> None:
    """And keeps what each worker said."""
    process = start(hosts, launched, tmp_path, *FLAGS)
    status, output, errors = finish(process)
    assert status == 0, errors
    assert "after fine-tuning" in output
    assert read_result(tmp_path / "run")["model_sha256"] == digest
    assert read_result(tmp_path / "run")["world_size"] == 4
    logs = {path.name: path.read_text() for path in (tmp_path / "run" / "workers").iterdir()}
    assert set(logs) == {"beta-1.log", "gamma-2.log", "gamma-3.log"}
    copies = list((hosts.path.parent / "cache" / "personalized-fedavg").iterdir())
    assert len(copies) == 1, "gamma has no folder of this project, and got a copy"
    assert f"worker 3: joined {hosts.lan.address['alpha']}:3002" in logs["gamma-3.log"]
    wait_until_empty(hosts)


def test_one_port_is_all_that_must_be_open_and_nobody_reads_along(
    hosts: SshHosts, launched: Launched, digest: str, tmp_path: Path
) -> None:
    """But that of ssh. The keys are made for the run, and are nowhere afterwards."""
    if shutil.which("nft") is None:
        pytest.skip("needs the command nft (nftables)")
    with hosts.lan.only_port(3002, of_others=22), hosts.lan.overhear() as heard:
        status, _, errors = finish(start(hosts, launched, tmp_path, *FLAGS))
    assert status == 0, errors
    assert f"they reach {hosts.lan.address['alpha']}:3002, encrypted" in errors
    assert read_result(tmp_path / "run")["model_sha256"] == digest
    assert len(heard) > 1_000_000
    assert not any(text in heard for text in spoken_text(tmp_path / "run"))


def test_a_firewall_is_a_line_before_anything_is_started(hosts: SshHosts, launched: Launched, tmp_path: Path) -> None:
    """Of the check, and of the run itself; without either the workers would try in vain for minutes."""
    if shutil.which("nft") is None:
        pytest.skip("needs the command nft (nftables)")
    rules = "table inet wall {\nchain input {\ntype filter hook input priority 0;\ntcp dport 3002 drop\n}\n}\n"
    in_alpha = ("ip", "netns", "exec", hosts.lan.namespace("alpha"))
    run(*in_alpha, "nft", "-f", "-", text=rules)
    try:
        process = start(hosts, launched, tmp_path, *TINY, "--check")
        status, output, errors = finish(process)
        assert status == 2, errors
        (line,) = [line for line in output.splitlines() if "FAILS" in line]
        said = f"beta: does not reach {hosts.lan.address['alpha']}:3002 of this machine (no answer); open the port"
        assert line.startswith("ports")
        assert said in line
        assert "gamma: does not reach" in output
        assert_one_clear_line(start(hosts, launched, tmp_path, *TINY), "gamma: does not reach")
        assert not (tmp_path / "run").exists()
    finally:
        run(*in_alpha, "nft", "delete", "table", "inet", "wall")
    status, output, errors = finish(start(hosts, launched, tmp_path, *TINY, "--check"))
    assert status == 0, output + errors
    assert len([line for line in output.splitlines() if not line.startswith(" ")]) <= 11


def test_a_killed_host_is_started_again(hosts: SshHosts, launched: Launched, digest: str, tmp_path: Path) -> None:
    process = start(hosts, launched, tmp_path, *FLAGS, before=stop_in_round(3, tmp_path))
    server = wait_until_stopped(process, "server")
    for pid in hosts.pids("gamma"):
        with contextlib.suppress(ProcessLookupError):  # it ended with what had started it
            os.kill(pid, signal.SIGKILL)
    wait_for_line(process, "gamma: reached again; starting 2 workers")
    os.kill(server, signal.SIGCONT)
    status, _, errors = finish(process)
    assert status == 0, errors
    assert read_result(tmp_path / "run")["model_sha256"] == digest


def test_a_host_that_is_cut_off_is_done_without_and_ends_its_workers(
    hosts: SshHosts, launched: Launched, digest: str, tmp_path: Path
) -> None:
    process = start(hosts, launched, tmp_path, *FLAGS, *SHORT_SILENCE, before=stop_in_round(3, tmp_path))
    server = wait_until_stopped(process, "server")
    hosts.lan.unplug("gamma")
    os.kill(server, signal.SIGCONT)
    wait_for_line(process, "server: lost worker ")
    wait_until_empty(hosts, "gamma")
    status, _, errors = finish(process)
    assert status == 0, errors
    assert read_result(tmp_path / "run")["model_sha256"] == digest


def test_a_host_that_was_cut_off_for_a_while_takes_part_again(
    hosts: SshHosts, launched: Launched, tmp_path: Path
) -> None:
    process = start(hosts, launched, tmp_path, *LONG, *SHORT_SILENCE)
    wait_for_line(process, "FedAvg round 2/")
    hosts.lan.unplug("gamma")
    wait_for_line(process, "trying gamma again")
    wait_until_empty(hosts, "gamma")  # or its first workers might be back, and ready, before they end
    hosts.lan.plug_in("gamma")
    wait_for_line(process, "gamma: reached again; starting 2 workers")
    wait_for_line(process, "server: worker 3 is ready")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM
    wait_until_empty(hosts)


def test_a_worker_that_dies_is_started_again(hosts: SshHosts, launched: Launched, tmp_path: Path) -> None:
    process = start(hosts, launched, tmp_path, *LONG)
    wait_for_line(process, "FedAvg round 2/")
    (worker,) = [pid for pid in hosts.pids("beta") if Path(f"/proc/{pid}/comm").read_text().strip() == "worker 1"]
    os.kill(worker, signal.SIGKILL)
    told = ("beta: worker 1 ended by signal SIGKILL", "beta: worker 1 is started again (1 of 3 times)")
    wait_for_line(process, *told, "server: worker 1 is ready")  # what the host tells has a longer way
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 128 + signal.SIGINT
    wait_until_empty(hosts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_command_leaves_nothing(
    number: signal.Signals, hosts: SshHosts, launched: Launched, tmp_path: Path
) -> None:
    """SIGKILL leaves it no time to end anything: what runs elsewhere notices by itself."""
    process = start(hosts, launched, tmp_path, *LONG)
    wait_for_line(process, "FedAvg round 2/")
    process.send_signal(number)
    status, _, _ = finish(process)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    wait_until_empty(hosts)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "saved; continue with" in log, "the server saves what it has, as at any early end"
