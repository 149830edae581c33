"""Processors that compute differently in one run: said and recorded, made alike, or not able to do what is asked."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, TINY, Launched, assert_one_clear_line, finish, read_result, write_plays

from perfedavg.machine.kernels import check_processor

PLAIN = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
"""Environment of a process that computes as a processor without AVX does."""
AVX2 = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""The same for AVX2, with which there is no bfloat16 in hardware."""
PORTABLE_FLAGS = "--dataset digits --client_num_in_total 10 --client_num_per_round 2 --rounds 2 --model mlp "
PORTABLE_FLAGS += "--unseen_fraction 0.2 --local_test_fraction 0.2 "
PORTABLE_FLAGS += "--fine_tune_rounds 2 --fine_tune_server_optimizer sgd --personalization_epochs 1 --eval_every 1"
SINE = "--dataset sine --client_num_in_total 102 --client_num_per_round 5 --rounds 2 --local_epochs 1 "
SINE += "--fine_tune_method none --personalization_epochs 1 --eval_every 2 --client_batching 1"
"""Data that no kernel of torch makes."""


def start_worker(
    launched: Launched, port: int, rank: int, env: dict[str, str], *flags: str | Path
) -> subprocess.Popen[str]:
    return launched.start(
        "client_worker.py", "--port", str(port), "--rank", str(rank), "--device", "cpu", *flags, env=env
    )


def test_a_worker_that_computes_otherwise_is_said_and_recorded(launched: Launched, tmp_path: Path) -> None:
    """The model then depends on who trained whom, and nothing else would tell."""
    server, port = launched.start_server(tmp_path / "run", 3, *SINE.split())
    workers = [start_worker(launched, port, 1, dict(os.environ)), start_worker(launched, port, 2, PLAIN)]
    status, _, errors = finish(server)
    assert status == 0, errors
    assert [finish(worker)[0] for worker in workers] == [0, 0]
    lines = [line for line in errors.splitlines() if "computes otherwise than the others" in line]
    assert len(lines) in (1, 2), "the other worker's too, where it is ready last and its oneDNN is another: " + errors
    assert "torch's kernels is" in lines[0]
    recorded = read_result(tmp_path / "run")["kernels"]
    assert len(recorded["torch"]) == 1
    assert len(recorded["torch's kernels"]) == 2
    assert "DEFAULT" in recorded["torch's kernels"]
    assert len(recorded["oneDNN"]) == 2


@pytest.fixture
def portable_digest() -> str:
    try:
        check_processor("any_vendor")
    except ValueError as error:
        pytest.skip(str(error))
    digests = json.loads((ROOT / "tests" / "numerics" / "portable_digests.json").read_text())
    return str(digests["any_vendor"]["mlp"])


def test_a_worker_takes_over_portable_kernels(launched: Launched, tmp_path: Path, portable_digest: str) -> None:
    """It starts itself again, once and under its own process id, because it learns of them after it loaded torch."""
    flags = [*PORTABLE_FLAGS.split(), "--portable_kernels", "any_vendor"]
    server, port = launched.start_server(tmp_path / "run", 2, *flags)
    worker = start_worker(launched, port, 1, PLAIN, "--threads", "1")
    status, _, errors = finish(server)
    assert status == 0, errors
    worker_status, _, worker_errors = finish(worker)
    assert worker_status == 0, worker_errors
    assert worker_errors.count("starts again") == 1, worker_errors
    assert "computes otherwise" not in errors
    result = read_result(tmp_path / "run")
    assert result["kernels"]["torch's kernels"] == ["AVX2"]
    assert result["model_sha256"] == portable_digest


def test_quick_start_hands_portable_kernels_on(launched: Launched, tmp_path: Path, portable_digest: str) -> None:
    flags = [*PORTABLE_FLAGS.split(), "--portable_kernels", "any_vendor", "--run_dir", str(tmp_path / "run")]
    status, _, errors = finish(launched.start("quick_start.py", *flags))
    assert status == 0, errors
    assert read_result(tmp_path / "run")["model_sha256"] == portable_digest


def test_a_worker_that_cannot_compute_in_bf16_says_so(launched: Launched, tmp_path: Path) -> None:
    """oneDNN has no bfloat16 LSTM for it. The worker's machine decides, and the server says it before a round."""
    write_plays(tmp_path)
    flags = ("--dataset", "shakespeare", "--client_num_per_round", "1", "--unseen_fraction", "0.5")
    server, port = launched.start_server(
        tmp_path / "run", 2, *flags, "--data_root", tmp_path, "--precision", "bf16", "--rounds", "1"
    )
    worker = start_worker(launched, port, 1, AVX2, "--data_root", tmp_path)
    reason = ("--precision bf16: this machine cannot train the model so on cpu", "use --precision float32")
    assert_one_clear_line(server, "worker 1", *reason)
    assert_one_clear_line(worker, *reason)


def test_a_worker_that_bf16_makes_slower_says_so(launched: Launched, tmp_path: Path) -> None:
    """It would take tens of times as long, without a word."""
    server, port = launched.start_server(tmp_path / "run", 3, *TINY, "--precision", "bf16")
    workers = [start_worker(launched, port, rank, AVX2) for rank in (1, 2)]
    status, _, errors = finish(server)
    assert status == 0, errors
    assert [finish(worker)[0] for worker in workers] == [0, 0]
    said = [number for number, line in enumerate(errors.splitlines()) if "bf16 is slower than float32" in line]
    rounds = [number for number, line in enumerate(errors.splitlines()) if "FedAvg round" in line]
    assert len(said) == 1, "once for a machine, not for each of its workers"
    assert said[0] < rounds[0]
