"""What launchers such as torchrun say in the environment, and what flags say instead."""

from __future__ import annotations

import re

import pytest

import utils
from client_worker import main as worker_main
from launch.settings import LAUNCHER_ADDRESS, LAUNCHER_PORT, LAUNCHER_RANK, LAUNCHER_SIZE
from server import refuse_rank_of_worker
from server_or_worker import hold_port_at, is_on_one_machine, own_rank, torchrun_has_port

LAUNCHER = {LAUNCHER_ADDRESS: "10.0.0.9", LAUNCHER_PORT: "23456", LAUNCHER_SIZE: "5", LAUNCHER_RANK: "2"}


@pytest.fixture(autouse=True)
def _launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("role", ["server", "worker", "server_or_worker"])
def test_what_flags_do_not_say_a_launcher_does(role: str) -> None:
    args = utils.get_args(role, [])
    assert (args.ip, args.port, args.world_size) == ("10.0.0.9", 23456, 5)
    args = utils.get_args(role, ["--ip", "10.0.0.1", "--port", "3003", "--world_size", "7"])
    assert (args.ip, args.port, args.world_size) == ("10.0.0.1", 3003, 7)


def test_a_worker_has_the_rank_that_the_launcher_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert utils.get_args("worker", []).rank == 2
    assert utils.get_args("worker", ["--rank", "4"]).rank == 4
    monkeypatch.delenv(LAUNCHER_RANK)
    with pytest.raises(ValueError, match=r"^--rank must be given, or RANK in the environment$"):
        utils.get_args("worker", [])


def test_a_variable_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCHER_PORT, "tcp://10.0.0.9:80")  # as Kubernetes' links call the port of a service
    with pytest.raises(ValueError, match=r"--port tcp://10.0.0.9:80 must be .* \(which MASTER_PORT says"):
        utils.get_args("server", [])
    assert utils.get_args("server", ["--port", "3003"]).port == 3003


def test_the_rank_of_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would otherwise wait for who is never to come."""
    with pytest.raises(ValueError, match=r"RANK 2 .* is a worker's, .* start client_worker.py with it"):
        refuse_rank_of_worker(utils.get_args("server", []), LAUNCHER)
    monkeypatch.setenv(LAUNCHER_RANK, "0")
    monkeypatch.setattr("sys.argv", ["client_worker.py"])
    with pytest.raises(ValueError, match=r"RANK 0 .* is the server's, .* start server.py with it"):
        worker_main()


def test_a_server_that_flags_describe_whole_is_nobodys_worker() -> None:
    """quick_start.sh in a pod of a launcher, whose variables are of another run."""
    args = utils.get_args("server", ["--ip", "127.0.0.1", "--port", "3002", "--world_size", "3"])
    refuse_rank_of_worker(args, LAUNCHER)
    refuse_rank_of_worker(args, {LAUNCHER_RANK: "2"})
    refuse_rank_of_worker(args, {})


def test_a_rank_must_be_there_for_who_may_be_either() -> None:
    assert [own_rank({LAUNCHER_RANK: text}) for text in ("0", "12")] == [0, 12]
    for environment in ({LAUNCHER_ADDRESS: "10.0.0.9"}, {LAUNCHER_RANK: "first"}, {LAUNCHER_RANK: "-1"}):
        with pytest.raises(ValueError, match=re.escape("start server_or_worker.py with torchrun or another launcher")):
            own_rank(environment)


def test_a_port_is_asked_for_where_torchrun_listens_on_its_own() -> None:
    args = utils.get_args("server_or_worker", [])
    assert torchrun_has_port(args, {**LAUNCHER, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert not torchrun_has_port(args, {**LAUNCHER, "TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert not torchrun_has_port(args, LAUNCHER), "other launchers leave it free for the server"
    chosen = utils.get_args("server_or_worker", ["--port", "3003"])
    assert not torchrun_has_port(chosen, {**LAUNCHER, "TORCHELASTIC_USE_AGENT_STORE": "True"})


def test_only_ranks_of_one_machine_meet_on_its_loopback_address() -> None:
    assert is_on_one_machine({LAUNCHER_SIZE: "3", "LOCAL_WORLD_SIZE": "3"})
    assert not is_on_one_machine({LAUNCHER_SIZE: "3", "LOCAL_WORLD_SIZE": "1"})
    assert not is_on_one_machine(LAUNCHER), "other launchers do not say"


@pytest.mark.parametrize("host", ["203.0.113.77", "no-such-host.invalid"])
def test_an_address_of_no_machine_of_ours_is_named(host: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot listen on --ip {re.escape(host)} .*use an address of this machine"):
        hold_port_at(host)
