"""Cables that are slow, that lose packets, or that are long: a run takes longer, and its model is the same."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TINY, Launched, digest_in_one_process, finish, network_flags, read_result

from benchmarks.lan import HOSTS, Lan, LongLan

pytestmark = pytest.mark.slow

CABLES: dict[str, Callable[[], Lan]] = {"bridge": Lan, "relay of 100 ms": lambda: LongLan(0.1)}


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the model that the experiment gives in one process."""
    return digest_in_one_process(TINY, tmp_path_factory.mktemp("single") / "run")


@pytest.mark.parametrize(
    ("cables", "megabits", "percent_lost", "transport"),
    [
        ("bridge", 10, 0, "auto"),
        ("bridge", None, 1, "auto"),
        ("bridge", None, 5, "auto"),
        ("bridge", 10, 5, "auto"),
        ("relay of 100 ms", None, 0, "auto"),
        ("bridge", 10, 5, "tcp"),
        ("relay of 100 ms", None, 0, "tcp"),
        ("bridge", 10, 5, "keys"),
        ("relay of 100 ms", None, 0, "keys"),
    ],
)
def test_the_model_is_that_of_one_process(
    cables: str,
    megabits: float | None,
    percent_lost: int,
    transport: str,
    launched: Launched,
    digest: str,
    keys: Path,
    tmp_path: Path,
) -> None:
    """And nobody is taken for dead, because signs of life get through."""
    missing = {command for command in ("ip", "tc", "nft") if shutil.which(command) is None}
    if missing or os.geteuid() != 0:
        pytest.skip("network namespaces need root, and the commands of iproute2 and nftables")
    with contextlib.ExitStack() as stack:
        try:
            lan = stack.enter_context(CABLES[cables]())
            if megabits is not None:
                lan.slow_down(megabits)
            if percent_lost:
                lan.lose_packets(percent_lost)
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"networks cannot be made here: {getattr(error, 'stderr', None) or error}")
        server, *workers = HOSTS
        where = ("--ip", lan.address[server], "--port", "3002", *network_flags(transport, keys))
        processes = [
            launched.start(
                *("server.py", *where, "--world_size", "3", *TINY, "--run_dir", tmp_path / "run"),
                network_namespace=lan.namespace(server),
            ),
            *(
                launched.start(
                    *("client_worker.py", *where, "--rank", str(rank), "--device", "cpu"),
                    *("--join_timeout_seconds", "60"),
                    network_namespace=lan.namespace(host),
                )
                for rank, host in enumerate(workers, 1)
            ),
        ]
        for process in processes:
            status, _, errors = finish(process)
            assert status == 0, errors
        assert read_result(tmp_path / "run")["model_sha256"] == digest
        log = (tmp_path / "run" / "log.txt").read_text()
        assert "lost worker" not in log
        if megabits is not None:
            (volumes,) = re.findall(r"sent (\d+) bytes, received (\d+) bytes", log)
            sent, received = map(int, volumes)
            assert received < 0.7 * sent, "sums, which have twice a model's bytes, were not packed"
