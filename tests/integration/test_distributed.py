"""Real processes over gloo: the model must not depend on how many there are, nor on the way the run was started."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers import (
    EMNIST_PREFIXES,
    TINY,
    Launched,
    assert_ended,
    children_of,
    finish,
    one_phase,
    read_result,
    stop_in_round,
    wait_for_line,
    wait_until_stopped,
    write_image_files,
)


def run_distributed(
    launched: Launched, run_dir: Path, num_workers: int, data_root: Path, flags: list[str], fresh: bool = False
) -> str:
    """Run with a server and workers. Returns the model's digest.

    fresh: the server and the first worker start from nothing.
    """
    data, size = ("--data_root", data_root), num_workers + 1
    server, port = launched.start_server(run_dir, size, *data, *flags, fresh=fresh)
    workers = [launched.start_worker(port, size, rank, *data, fresh=fresh and rank == 1) for rank in range(1, size)]
    for process in (server, *workers):
        status, _, errors = finish(process)
        assert status == 0, errors
    result = read_result(run_dir)
    assert result["world_size"] == num_workers + 1
    return str(result["model_sha256"])


def run_single(launched: Launched, run_dir: Path, data_root: Path, flags: list[str], fresh: bool = False) -> str:
    words = ("--run_dir", run_dir, "--data_root", data_root, *flags)
    process = launched.start("single_process.py", *words, fresh=fresh)
    status, output, errors = finish(process)
    assert status == 0, errors
    digest = str(read_result(run_dir)["model_sha256"])
    assert digest in output
    return digest


def test_one_or_three_workers_and_none_give_the_same_model(launched: Launched, tmp_path: Path) -> None:
    """On EMNIST's model, whose dropout must follow each client and not its worker; 5 clients among 1 and 3 workers."""
    write_image_files(tmp_path / "EMNIST" / "raw", EMNIST_PREFIXES, (200, 60), num_classes=62)
    flags = [*TINY, "--dataset", "emnist", "--model", "cnn", "--rounds", "2", "--local_epochs", "1"]
    flags += ["--fine_tune_rounds", "1", "--eval_every", "100"]
    digests = {run_single(launched, tmp_path / "single", tmp_path, [*flags, "--threads", "2"])}
    for num_workers in (1, 3):
        digests.add(run_distributed(launched, tmp_path / f"{num_workers}", num_workers, tmp_path, flags))
    assert len(digests) == 1
    scores = {(tmp_path / name / "clients.csv").read_text() for name in ("single", "1", "3")}
    assert len(scores) == 1, "the scores of unseen clients are the same too"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest that TINY alone gives."""
    path = tmp_path_factory.mktemp("plain")
    with Launched() as launched:
        return run_single(launched, path / "run", path, TINY)


@pytest.mark.parametrize("flags", [["--client_batching", "2"], ["--precision", "bf16"]], ids=" ".join)
def test_groups_and_bf16_do_not_depend_on_the_processes_either(
    launched: Launched, tmp_path: Path, flags: list[str], plain: str
) -> None:
    """Five clients a round in groups of 2, 2 and 1, which two workers share out as it comes."""
    digests = {
        run_single(launched, tmp_path / "single", tmp_path, [*TINY, *flags]),
        run_distributed(launched, tmp_path / "two", 2, tmp_path, [*TINY, *flags]),
    }
    assert len(digests) == 1
    assert digests != {plain}


def test_maml_and_the_curve_over_epochs_do_not_depend_on_the_processes_either(
    launched: Launched, tmp_path: Path
) -> None:
    """What a client sends, and what is measured of it epoch by epoch, comes from its identity alone."""
    flags = [*one_phase(TINY), "--fine_tune_method", "maml", "--fine_tune_rounds", "2", "--fine_tune_local_steps", "2"]
    flags += ["--personalization_curve", "2"]
    digest = run_single(launched, tmp_path / "single", tmp_path, flags)
    # The commands of the README, started from nothing.
    assert run_distributed(launched, tmp_path / "two", 2, tmp_path, flags, fresh=True) == digest
    single, two = read_result(tmp_path / "single"), read_result(tmp_path / "two")
    for key in ("after_fedavg", "after_fine_tune"):
        assert single[key] == two[key]
        assert [point["epochs"] for point in single[key]["by_epoch"]] == [0, 1, 2]


def test_quick_start_shows_the_result_and_what_comes_next(launched: Launched, tmp_path: Path) -> None:
    flags = [word for word in TINY if word not in ("--dataset", "digits")]
    process = launched.start("quick_start.py", *flags, "--run_dir", tmp_path / "run", fresh=True)
    status, output, errors = finish(process)
    assert status == 0, errors
    result = read_result(tmp_path / "run")
    assert (result["dataset"], result["world_size"]) == ("digits", 3)
    for text in ("after FedAvg", "after fine-tuning", "personalized", "/run", "quick_start.py ", " --dataset emnist"):
        assert text in output
    assert "FedAvg round 2/3: initial" in errors
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_quick_start_leaves_no_process(number: signal.Signals, launched: Launched, tmp_path: Path) -> None:
    process = launched.start("quick_start.py", *TINY, "--rounds", "100000", "--run_dir", tmp_path / "run")
    wait_for_line(process, "FedAvg round 2/")
    children = children_of(process.pid)
    assert len(children) == 3
    process.send_signal(number)
    status, _, errors = finish(process)
    assert status == 128 + number
    assert f"stopped by {number.name}" in errors
    for pid in children:
        assert_ended(pid)
    assert not (tmp_path / "run" / "result.json").exists()


def test_what_quick_start_starts_are_forks_that_do_not_outlive_it(launched: Launched, tmp_path: Path) -> None:
    """They share the memory of what it has loaded, and SIGKILL leaves it no time to end them."""
    process = launched.start("quick_start.py", *TINY, "--rounds", "100000", "--run_dir", tmp_path / "run")
    wait_for_line(process, "FedAvg round 2/")
    children = children_of(process.pid)
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in children]
    assert names == ["server", "worker 1", "worker 2"]
    shared = [_shared_megabytes(pid) for pid in children]
    assert min(shared) > 50, shared
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    for pid in children:
        assert_ended(pid)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "stopped by SIGTERM" in log
    assert "saved; continue with" in log, "the server saves what it has, as at any early end"


def _shared_megabytes(pid: int) -> float:
    """Of memory that no file is behind, and that a process has in common with another."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    anonymous, private = (int(fields[name].split()[0]) for name in ("Anonymous", "Private_Dirty"))
    return (anonymous - private) / 1024


def test_quick_start_starts_a_dead_worker_again(launched: Launched, tmp_path: Path) -> None:
    process = launched.start("quick_start.py", *TINY, "--rounds", "100000", "--run_dir", tmp_path / "run")
    wait_for_line(process, "FedAvg round 2/")
    server, first, second = children_of(process.pid)
    os.kill(first, signal.SIGKILL)
    wait_for_line(process, "worker 1 is started again (1 of 3 times)")
    wait_for_line(process, "server: worker 1 is ready")
    (new,) = set(children_of(process.pid)) - {server, first, second}
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM
    for pid in (server, second, new):
        assert_ended(pid)


def test_quick_start_ends_with_its_server_and_can_be_resumed(launched: Launched, tmp_path: Path) -> None:
    flags = [*TINY, "--checkpoint_every", "1"]
    stop = stop_in_round(2, tmp_path)
    process = launched.start(*stop, "quick_start.py", *flags, "--run_dir", tmp_path / "run")
    server = wait_until_stopped(process, "server")
    children = children_of(process.pid)
    os.kill(server, signal.SIGKILL)
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGKILL
    assert "server ended by signal SIGKILL" in errors
    assert f"--resume {tmp_path / 'run'}" in errors
    for pid in children:
        assert_ended(pid)
    resumed = launched.start("quick_start.py", "--resume", tmp_path / "run")
    status, _, errors = finish(resumed)
    assert status == 0, errors
    assert read_result(tmp_path / "run")["model_sha256"] == run_single(launched, tmp_path / "single", tmp_path, flags)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round_number"] for line in lines] == [1, 2, 3, 1, 2]


def test_a_worker_stops_at_ctrl_c_while_it_waits(launched: Launched, tmp_path: Path) -> None:
    server, port = launched.start_server(tmp_path / "run", 3, *TINY)
    worker = launched.start_worker(port, 3, 1)
    wait_for_line(server, "worker 1 joined")
    for process in (worker, server):
        process.send_signal(signal.SIGINT)
        assert finish(process)[0] == 128 + signal.SIGINT
