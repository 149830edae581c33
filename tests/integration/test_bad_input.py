"""What a user can get wrong in starting a run: one clear line with the value and the fix, status 2, never a hang."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    MNIST_PREFIXES,
    ROOT,
    TINY,
    Launched,
    assert_one_clear_line,
    finish,
    free_port,
    wait_for_line,
    write_image_files,
)


@pytest.mark.parametrize("entry_point", ["single_process.py", "server.py", "quick_start.py"])
def test_settings_that_make_no_experiment(entry_point: str, launched: Launched) -> None:
    process = launched.start(entry_point, "--dataset", "digits", "--client_num_per_round", "31")
    assert_one_clear_line(process, "--client_num_per_round 31 exceeds the 30 training clients")


def test_fewer_clients_a_round_than_workers(launched: Launched) -> None:
    for flags in (("server.py", "--world_size", "4"), ("quick_start.py", "--workers", "3")):
        process = launched.start(*flags, *TINY, "--client_num_per_round", "2")
        assert_one_clear_line(process, "--client_num_per_round 2", "3 workers", "raise it to 3")


def test_unknown_data_set(launched: Launched) -> None:
    assert_one_clear_line(launched.start("single_process.py", "--dataset", "cifar"), "cifar", "emnist")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--device", "cuda:1"]])
def test_a_gpu_that_is_not_there(flags: list[str], launched: Launched) -> None:
    process = launched.start("single_process.py", *TINY, *flags)
    assert_one_clear_line(process, f"--device {flags[1]}", "0 GPU(s)", "--device cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_nccl_without_a_gpu(launched: Launched, tmp_path: Path) -> None:
    server, _ = launched.start_server(tmp_path / "run", 2, *TINY, "--backend", "nccl")
    assert_one_clear_line(server, "--backend nccl", "GPU", "--backend gloo")


def test_malformed_device(launched: Launched) -> None:
    assert_one_clear_line(launched.start("single_process.py", *TINY, "--device", "tpu"), "--device tpu", "auto")


def test_a_run_folder_that_cannot_be_written(launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    process = launched.start("single_process.py", *TINY, "--run_dir", tmp_path / "file" / "run")
    assert_one_clear_line(process, f"--run_dir {tmp_path / 'file' / 'run'}", "another folder")


def test_missing_data_without_network(launched: Launched, tmp_path: Path) -> None:
    """A name server that does not answer stands for a machine without network."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text("import socket\ndef refuse(*a, **k): raise OSError('no network')\nsocket.getaddrinfo = refuse\n")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    words = ("single_process.py", "--run_dir", tmp_path / "run", "--data_root", tmp_path / "data")
    process = launched.start(*words, env=environment)
    assert_one_clear_line(process, "emnist is not in", str(tmp_path / "data" / "EMNIST" / "raw"), "--dataset digits")


def test_a_damaged_file_on_one_worker_ends_the_run_with_its_name(launched: Launched, tmp_path: Path) -> None:
    for name in ("good", "bad"):
        write_image_files(tmp_path / name / "MNIST" / "raw", MNIST_PREFIXES, (400, 100), num_classes=10)
    damaged = tmp_path / "bad" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    flags = [*TINY, "--dataset", "mnist"]
    server, port = launched.start_server(tmp_path / "run", 3, *flags, "--data_root", tmp_path / "good")
    healthy = launched.start_worker(port, 3, 1, "--data_root", tmp_path / "good")
    broken = launched.start_worker(port, 3, 2, "--data_root", tmp_path / "bad")
    assert_one_clear_line(broken, f"{damaged} is damaged")
    assert_one_clear_line(server, f"worker 2: {damaged} is damaged")
    assert_one_clear_line(healthy, f"the server ended the run: worker 2: {damaged} is damaged")


def test_other_data_on_a_worker_than_on_the_server(launched: Launched, tmp_path: Path) -> None:
    write_image_files(tmp_path / "a" / "MNIST" / "raw", MNIST_PREFIXES, (400, 100), num_classes=10)
    write_image_files(tmp_path / "b" / "MNIST" / "raw", MNIST_PREFIXES, (400, 105), num_classes=10)
    flags = [*TINY, "--dataset", "mnist"]
    server, port = launched.start_server(tmp_path / "run", 2, *flags, "--data_root", tmp_path / "a")
    launched.start_worker(port, 2, 1, "--data_root", tmp_path / "b")
    assert_one_clear_line(server, "worker 1 reads other data", "--data_root")


def test_a_port_in_use(launched: Launched, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = launched.start("server.py", *TINY, "--port", port, "--run_dir", tmp_path / "run")
        assert_one_clear_line(process, f"--port {port}", "Address already in use")
    assert not (tmp_path / "run").exists(), "a server that cannot listen leaves no folder behind"


def test_nothing_is_left_of_a_run_that_never_began(launched: Launched, tmp_path: Path) -> None:
    """Its input is refused after the folder was made; a folder that was there before is as it was."""
    words = ["--dataset", "folder", "--data_root", tmp_path / "nowhere", "--run_dir"]
    own = tmp_path / "own"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    (own / "log.txt").write_text("mine too\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    serving = ["--port", str(free_port()), "--world_size", "2"]
    for script, place, more in [
        ("single_process.py", tmp_path / "new" / "run", []),
        ("single_process.py", own, []),
        ("server.py", tmp_path / "new" / "run", serving),
        ("quick_start.py", empty, []),
    ]:
        status, _, errors = finish(launched.start(script, *words, place, *more))
        assert status == 2, errors
        assert f"{tmp_path / 'nowhere'} is no folder" in errors
        assert not (tmp_path / "new").exists()
    assert {path.name: path.read_text() for path in own.iterdir()} == {"notes.txt": "mine", "log.txt": "mine too\n"}
    assert list(empty.iterdir()) == []


def test_nothing_is_left_of_a_run_without_a_name(launched: Launched, tmp_path: Path) -> None:
    """Nor of one that a signal ends before its workers have come."""
    before = set((ROOT / "runs").glob("*"))
    process = launched.start("quick_start.py", "--dataset", "folder", "--data_root", tmp_path / "nowhere")
    assert finish(process)[0] == 2
    assert not any(path.name.endswith("-folder") for path in set((ROOT / "runs").glob("*")) - before)
    server, _ = launched.start_server(tmp_path / "run", 2, *TINY)
    while not (tmp_path / "run" / "log.txt").exists():
        assert server.poll() is None
        time.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    assert finish(server)[0] == 128 + signal.SIGTERM
    assert not (tmp_path / "run").exists()


def test_an_address_of_another_machine(launched: Launched, tmp_path: Path) -> None:
    process = launched.start("server.py", *TINY, "--ip", "203.0.113.77", "--run_dir", tmp_path / "run")
    assert_one_clear_line(process, "--ip 203.0.113.77", "an address of this machine")
    process = launched.start("server.py", *TINY, "--ip", "0.0.0.0", "--run_dir", tmp_path / "run")
    assert_one_clear_line(process, "--ip 0.0.0.0", "workers can reach")


def test_an_unknown_interface(launched: Launched, tmp_path: Path) -> None:
    server, _ = launched.start_server(tmp_path / "run", 2, *TINY, "--ethernet", "eth99")
    assert_one_clear_line(server, "--ethernet eth99", "lo")


def test_a_server_that_is_not_there(launched: Launched) -> None:
    port = free_port()
    patient = launched.start_worker(port, 2, 1)
    wait_for_line(patient, f"no server at 127.0.0.1:{port} yet")
    worker = launched.start_worker(port, 2, 1, "--join_timeout_seconds", "1")
    assert_one_clear_line(worker, f"no server at 127.0.0.1:{port} within 1 s", "Connection refused")


def test_something_else_at_the_servers_port(launched: Launched) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        worker = launched.start_worker(port, 2, 1, "--join_timeout_seconds", "2")
        assert_one_clear_line(worker, f"127.0.0.1:{port}", "is not a server of this project")


def test_wrong_world_size_wrong_rank_and_a_rank_in_use(launched: Launched, tmp_path: Path) -> None:
    """None of them disturbs the run, which goes on when the right workers come."""
    assert_one_clear_line(launched.start_worker(9, 3, 0), "--rank 0", "use 1 or more")
    assert_one_clear_line(launched.start_worker(9, 1, 1), "--world_size 1")
    server, port = launched.start_server(tmp_path / "run", 3, *TINY)
    assert_one_clear_line(launched.start_worker(port, 4, 1), "--world_size is 3, this worker's 4")
    racers = [launched.start_worker(port, 3, 1) for _ in range(2)]
    while all(racer.poll() is None for racer in racers):  # the winner of the rank waits for worker 2
        time.sleep(0.05)
    loser = next(racer for racer in racers if racer.poll() is not None)
    assert_one_clear_line(loser, "--rank 1 is taken by another worker")
    racers.remove(loser)
    for process in (launched.start_worker(port, 3, 2), *racers, server):
        status, _, errors = finish(process)
        assert status == 0, errors


def test_workers_that_never_come(launched: Launched, tmp_path: Path) -> None:
    """The server's clock makes a leap when worker 2 has joined, so that this is sure to be in time."""
    (tmp_path / "leaping_server.py").write_text(
        f"""
import runpy, sys, time, types
sys.path.insert(0, {str(ROOT)!r})
from multi_process import server
take_join, passed = server.WorkerPool._take_join, [0]

def take_join_and_leap(pool, *args):
    take_join(pool, *args)
    passed.append(301)

server.WorkerPool._take_join = take_join_and_leap
server.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() + sum(passed))
runpy.run_path({str(ROOT / "server.py")!r}, run_name="__main__")
"""
    )
    port = free_port()
    flags = ("--port", str(port), "--world_size", "3", "--run_dir", str(tmp_path / "run"), *TINY)
    server = launched.start(tmp_path / "leaping_server.py", *flags, "--join_timeout_seconds", "300")
    worker = launched.start_worker(port, 3, 2)
    assert_one_clear_line(server, "worker 1 did not join within 300 s", f"--port {port}", "--rank 1")
    assert_one_clear_line(worker, "the server ended the run: worker 1 did not join")
