"""Several machines: hosts that share a network and nothing else, whose cables are pulled.

A network namespace stands for a machine, a port of a bridge for its cable. The addresses exist only in there.
"""

from __future__ import annotations

import shutil
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    TINY,
    Launched,
    assert_one_clear_line,
    digest_in_one_process,
    finish,
    network_flags,
    read_result,
    spoken_text,
    wait_for_line,
)
from ssh_hosts import lan_or_skip

from benchmarks.lan import HOSTS, Lan

PORT = "3002"
FLAGS = [*TINY, "--rounds", "9", "--eval_every", "3"]
MIDDLE, HELD_ROUND = "FedAvg round 3/9", "4"
"""A line, and the round right behind it, where a job waits for the test."""
TIMEOUT_SECONDS = 3
"""Without a sign of life, after which a worker counts as lost."""
SLACK_SECONDS = 60
"""What a busy machine may add to a time that was promised. TCP by itself would wait for a quarter of an hour."""


@pytest.fixture(scope="module")
def wires() -> Iterator[Lan]:
    with lan_or_skip() as lan:
        yield lan


@pytest.fixture
def lan(wires: Lan) -> Iterator[Lan]:
    """The hosts, with all cables plugged in."""
    yield wires
    for host in HOSTS:
        wires.plug_in(host)


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the model that the experiment gives in one process."""
    return digest_in_one_process(FLAGS, tmp_path_factory.mktemp("single") / "run")


class Job:
    """A server on the first host and a worker on each other one. The run waits in its middle until it is to go on."""

    def __init__(
        self,
        launched: Launched,
        lan: Lan,
        run_dir: Path,
        *flags: str,
        server_wait: int = 60,
        network: Sequence[str] = (),
    ) -> None:
        """network: flags of the server and its workers.  flags: of the server alone.  server_wait: of worker 2."""
        self._run_dir = run_dir
        self._hold = run_dir.with_name("hold")
        self._hold.touch()
        where = ("--ip", lan.address["alpha"], "--port", PORT, *network)
        held = ("tests/held_run.py", self._hold, HELD_ROUND, "server.py")
        words = (*held, *where, *FLAGS, "--run_dir", run_dir, *flags)
        self.server = launched.start(*words, network_namespace=lan.namespace("alpha"))
        self.workers = {
            rank: launched.start(
                *("client_worker.py", *where, "--rank", str(rank), "--device", "cpu"),
                *("--join_timeout_seconds", "60", "--server_wait_seconds", str(server_wait if rank == 2 else 60)),
                network_namespace=lan.namespace(host),
            )
            for rank, host in enumerate(HOSTS[1:], start=1)
        }

    def go_on(self) -> None:
        self._hold.unlink()

    def result(self) -> str:
        """Wait for the server to end well. Returns the model's digest."""
        self._hold.unlink(missing_ok=True)
        status, _, errors = finish(self.server)
        assert status == 0, errors
        return str(read_result(self._run_dir)["model_sha256"])

    def log(self) -> str:
        return (self._run_dir / "log.txt").read_text()


def listening(pid: int) -> set[str]:
    """The addresses on which anything listens in the network namespace of a process."""
    addresses = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            if state == "0A":  # TCP_LISTEN
                digits = local.partition(":")[0]
                words = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
                addresses.add(socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)))
    return addresses


def test_three_hosts_train_the_model_of_one_process(launched: Launched, lan: Lan, digest: str, tmp_path: Path) -> None:
    """And the server listens where the others reach it, and nowhere else; gloo only while a pair is formed."""
    job = Job(launched, lan, tmp_path / "run")
    wait_for_line(job.server, MIDDLE)
    processes = (job.server, *job.workers.values())
    listening_on = [listening(process.pid) for process in processes]
    assert listening_on == [{lan.address["alpha"]}, set(), set()]
    assert job.result() == digest
    for worker in job.workers.values():
        status, _, errors = finish(worker)
        assert status == 0, errors


@pytest.mark.parametrize("with_keys", [False, True], ids=["plain", "keys"])
def test_the_servers_port_is_all_that_must_be_open_and_with_keys_nobody_reads_along(
    launched: Launched, lan: Lan, digest: str, keys: Path, tmp_path: Path, with_keys: bool
) -> None:
    """Without keys the same words are seen, so it is no fault of the listening that they are not with them."""
    if shutil.which("nft") is None:
        pytest.skip("a firewall needs the command nft (nftables)")
    with lan.only_port(int(PORT)), lan.overhear() as heard:
        job = Job(launched, lan, tmp_path / "run", network=network_flags("keys" if with_keys else "auto", keys))
        assert job.result() == digest
        for worker in job.workers.values():
            status, _, errors = finish(worker)
            assert status == 0, errors
    assert job.log().count("tensors go over --port") == (0 if with_keys else 2)
    is_heard = [text in heard for text in spoken_text(tmp_path / "run")]
    assert len(heard) > 1_000_000
    assert not any(is_heard) if with_keys else all(is_heard[:3]) and any(is_heard[3:])


def test_a_worker_whose_address_only_its_router_knows_takes_part(
    launched: Launched, lan: Lan, digest: str, tmp_path: Path
) -> None:
    """The other worker, whose address the server can reach, keeps gloo."""
    if shutil.which("nft") is None:
        pytest.skip("a router that translates addresses needs the command nft (nftables)")
    with lan.behind("gamma", "beta"):
        job = Job(launched, lan, tmp_path / "run")
        assert job.result() == digest
        for worker in job.workers.values():
            status, _, errors = finish(worker)
            assert status == 0, errors
    log = job.log()
    assert "worker 1's tensors go over --port, because gloo does not connect (" in log
    assert "worker 2's tensors go over --port" not in log


ON_EACH_TRANSPORT = pytest.mark.parametrize(
    "transport",
    ["gloo", pytest.param("tcp", marks=pytest.mark.slow), pytest.param("keys", marks=pytest.mark.slow)],
)


@ON_EACH_TRANSPORT
def test_a_host_that_is_cut_off_for_good_is_done_without(
    launched: Launched, lan: Lan, digest: str, keys: Path, tmp_path: Path, transport: str
) -> None:
    """Nothing closes the connection of a host that falls silent: without signs of life both would wait for ever."""
    timeout, network = ("--worker_timeout_seconds", str(TIMEOUT_SECONDS)), network_flags(transport, keys)
    job = Job(launched, lan, tmp_path / "run", *timeout, server_wait=5, network=network)
    wait_for_line(job.server, MIDDLE)
    lan.unplug("gamma")
    unplugged = time.monotonic()
    job.go_on()
    wait_for_line(job.server, f"lost worker 2 (no sign of life for {TIMEOUT_SECONDS} s)")
    assert time.monotonic() - unplugged < TIMEOUT_SECONDS + SLACK_SECONDS
    wait_for_line(job.workers[2], f"no sign of life for {TIMEOUT_SECONDS} s; joining anew")
    lost = time.monotonic()
    assert_one_clear_line(job.workers[2], f"no server at {lan.address['alpha']}:{PORT} within 5 s")
    assert time.monotonic() - lost < 5 + SLACK_SECONDS
    assert job.result() == digest
    status, _, errors = finish(job.workers[1])
    assert status == 0, errors


@ON_EACH_TRANSPORT
def test_an_outage_below_the_timeout_loses_nobody(
    launched: Launched, lan: Lan, digest: str, keys: Path, tmp_path: Path, transport: str
) -> None:
    """A cable that is plugged in again at once must not cost a worker."""
    network = network_flags(transport, keys)
    job = Job(launched, lan, tmp_path / "run", "--worker_timeout_seconds", "60", network=network)
    wait_for_line(job.server, MIDDLE)
    lan.unplug("gamma")
    job.go_on()
    time.sleep(2)  # the length of the outage
    lan.plug_in("gamma")
    assert job.result() == digest
    for worker in job.workers.values():
        status, _, errors = finish(worker)
        assert status == 0, errors
        assert "joining anew" not in errors
    assert "lost worker" not in job.log()


@ON_EACH_TRANSPORT
def test_after_an_outage_above_the_timeout_all_join_anew(
    launched: Launched, lan: Lan, digest: str, keys: Path, tmp_path: Path, transport: str
) -> None:
    """The server's own cable: it loses all its workers, waits, and goes on with them in the middle of the round."""
    timeout, network = ("--worker_timeout_seconds", str(TIMEOUT_SECONDS)), network_flags(transport, keys)
    job = Job(launched, lan, tmp_path / "run", *timeout, network=network)
    wait_for_line(job.server, MIDDLE)
    lan.unplug("alpha")
    job.go_on()
    wait_for_line(job.server, "; 0 left")
    for worker in job.workers.values():
        wait_for_line(worker, "joining anew")
    lan.plug_in("alpha")
    assert job.result() == digest
    for rank, worker in job.workers.items():
        status, _, errors = finish(worker)
        assert status == 0, errors
        assert job.log().count(f"worker {rank} joined") >= 2, "a machine that is too busy for this timeout loses more"


def test_who_waits_says_for_whom_and_a_name_that_others_cannot_reach_is_refused(
    launched: Launched, lan: Lan, tmp_path: Path
) -> None:
    """Many systems give a host's own name the address 127.0.1.1; a server there would wait for ever."""
    hosts_file = tmp_path / "hosts"
    hosts_file.write_text("127.0.0.1 localhost\n127.0.1.1 alpha\n")
    see_hosts_file = ("sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', hosts_file)  # in a mount namespace
    waiting = launched.start(
        *("server.py", *FLAGS, "--run_dir", tmp_path / "run", "--ip", lan.address["alpha"], "--port", PORT),
        network_namespace=lan.namespace("alpha"),
    )
    trying = launched.start(
        *("client_worker.py", "--rank", "1", "--ip", "10.77.0.99", "--port", PORT, "--join_timeout_seconds", "10"),
        network_namespace=lan.namespace("beta"),
    )
    on_alpha = ("ip", "netns", "exec", lan.namespace("alpha"), *see_hosts_file, sys.executable)
    named = [
        launched.start(*on_alpha, ROOT / words[0], *words[1:])
        for words in (
            ("server.py", *FLAGS, "--ip", "alpha", "--run_dir", str(tmp_path / "named")),
            ("client_worker.py", "--ip", "alpha", "--rank", "1"),
        )
    ]
    for process in named:
        assert_one_clear_line(process, "--ip alpha means 127.0.1.1", f"this machine has {lan.address['alpha']}")
    assert not (tmp_path / "named").exists(), "a server that cannot be reached leaves no folder behind"
    wait_for_line(trying, f"worker 1: no server at 10.77.0.99:{PORT} yet (")
    assert_one_clear_line(trying, f"no server at 10.77.0.99:{PORT} within 10 s", "firewall")
    wait_for_line(waiting, "server: waiting for workers 1, 2, ")
