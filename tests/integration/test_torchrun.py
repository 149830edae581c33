"""Runs that are started by torchrun, or by another launcher with its variables."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    TINY,
    Launched,
    Process,
    assert_one_clear_line,
    digest_in_one_process,
    finish,
    free_port,
    read_result,
)

TORCHRUN = ("-m", "torch.distributed.run")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the model that the experiment gives in one process."""
    return digest_in_one_process(TINY, tmp_path_factory.mktemp("single") / "run")


def torchrun(launched: Launched, run_dir: Path, *options: str) -> Process:
    script = (ROOT / "server_or_worker.py", *TINY, "--device", "cpu", "--run_dir", run_dir)
    return launched.start(*TORCHRUN, *options, *script, fresh=True)


def at_free_port() -> tuple[str, ...]:
    """Its own choice is the same on every machine, where another test may have it."""
    return "--master_addr", "127.0.0.1", "--master_port", str(free_port())


def test_torchrun_gives_the_model_of_one_process(launched: Launched, digest: str, tmp_path: Path) -> None:
    """Its own store listens on MASTER_PORT; the server must find another port, and the workers find the server."""
    status, _, errors = finish(torchrun(launched, tmp_path / "run", "--nproc_per_node", "2", *at_free_port()))
    assert status == 0, errors
    assert read_result(tmp_path / "run")["model_sha256"] == digest


@pytest.mark.slow
def test_torchrun_of_two_nodes_gives_the_model_of_one_process(launched: Launched, digest: str, tmp_path: Path) -> None:
    """Each node has its own torchrun; the static rendezvous takes the port that its user names."""
    shared = ("--nnodes", "2", "--nproc_per_node", "2", *at_free_port())
    nodes = [torchrun(launched, tmp_path / "run", *shared, "--node_rank", str(node)) for node in range(2)]
    for node in nodes:
        status, _, errors = finish(node)
        assert status == 0, errors
    assert read_result(tmp_path / "run")["model_sha256"] == digest
    assert "worker 3 is ready" in (tmp_path / "run" / "log.txt").read_text()


def with_launcher(*values: object) -> dict[str, str]:
    return {**os.environ, **dict(zip(LAUNCHER_VARIABLES, map(str, values), strict=True))}


def test_a_launchers_variables_say_who_is_who(launched: Launched, digest: str, tmp_path: Path) -> None:
    """As Kubernetes' operators set them: nothing but the server has MASTER_PORT."""
    port = free_port()
    server = launched.start(
        "server.py", *TINY, "--run_dir", tmp_path / "run", env=with_launcher(0, 3, "127.0.0.1", port)
    )
    first = launched.start("client_worker.py", "--device", "cpu", env=with_launcher(1, 3, "127.0.0.1", port))
    second = launched.start("server_or_worker.py", *TINY, "--device", "cpu", env=with_launcher(2, 3, "127.0.0.1", port))
    for process in (server, first, second):
        status, _, errors = finish(process)
        assert status == 0, errors
    assert read_result(tmp_path / "run")["model_sha256"] == digest


def test_who_is_started_with_the_rank_of_another_says_so(launched: Launched, tmp_path: Path) -> None:
    where = ("127.0.0.1", free_port())
    server = launched.start("server.py", *TINY, "--run_dir", tmp_path / "run", env=with_launcher(1, 3, *where))
    assert_one_clear_line(server, "RANK 1 in the environment is a worker's", "client_worker.py", "server_or_worker.py")
    assert not (tmp_path / "run").exists()
    worker = launched.start("client_worker.py", env=with_launcher(0, 3, *where))
    assert_one_clear_line(worker, "RANK 0 in the environment is the server's", "server.py")
