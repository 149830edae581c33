"""What a process computes with: limits that must be set before torch is loaded, and how processes are compared."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import make_config

from perfedavg.machine import kernels
from perfedavg.machine.kernels import MAX_NOTED, KernelLog, UnpinnedKernelsError, pin_kernels
from perfedavg.training.compute import check_portable, describe_kernels

AVX512 = {"torch": "2", "torch's kernels": "AVX512", "MKL": "AuthenticAMD AVX512_CORE"}
AVX2 = {"torch": "2", "torch's kernels": "AVX2", "MKL": "AuthenticAMD AVX2"}
PLAIN_FLAGS = "fpu sse sse2 sse4_1 avx"
FLAGS = f"{PLAIN_FLAGS} avx2 fma avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16"


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What /proc/cpuinfo says; to be changed by a test."""
    facts = {"flags": FLAGS, "vendor_id": "AuthenticAMD", "model name": "AMD EPYC"}
    monkeypatch.setattr(kernels, "_cpu_flags", lambda: frozenset(facts["flags"].split()))
    monkeypatch.setattr(kernels, "_cpu_fact", lambda name: facts.get(name, ""))
    monkeypatch.setattr(kernels, "_is_x86", lambda: facts["flags"] != "")
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"):
        monkeypatch.delenv(name, raising=False)
    return facts


@pytest.mark.parametrize("flags", [PLAIN_FLAGS, ""], ids=["no AVX2", "no x86-64"])
def test_portable_kernels_are_refused_where_there_are_none(processor: dict[str, str], flags: str) -> None:
    """In place of a run whose digest is another than it promises."""
    processor["flags"] = flags
    with pytest.raises(ValueError, match=r"--portable_kernels true needs an x86-64 processor with AVX2 .*AMD EPYC"):
        pin_kernels("true")
    assert "MKL_CBWR" not in os.environ
    pin_kernels("false")


def test_kernels_cannot_be_pinned_once_torch_is_there(processor: dict[str, str]) -> None:
    with pytest.raises(UnpinnedKernelsError):
        pin_kernels("true")
    assert "MKL_CBWR" not in os.environ, "or the process would seem to be pinned"


def test_an_executor_refuses_what_would_not_be_portable(processor: dict[str, str]) -> None:
    config = make_config(portable_kernels="true")
    with pytest.raises(ValueError, match="was not known before torch was loaded"):
        check_portable(config, torch.device("cpu"))
    with pytest.raises(ValueError, match="this process trains on cuda:0; use --device cpu"):
        check_portable(config, torch.device("cuda:0"))


@pytest.mark.parametrize("flag", ["--server_optimizer", "--fine_tune_client_optimizer"])
def test_optimizers_with_square_roots_hold_for_one_vendor_only(flag: str) -> None:
    """MKL takes square roots from the processor's approximation, in which vendors differ by a bit."""
    import utils

    argv = ["--dataset", "mnist", flag, "adam", "--portable_kernels"]
    assert utils.get_args("single", argv).experiment.portable_kernels == "true"
    with pytest.raises(ValueError, match=r"any_vendor does not go with .* adam.*use sgd or momentum"):
        utils.get_args("single", [*argv, "any_vendor"])


def test_a_run_is_personalized_with_its_own_kernels(tmp_path: Path) -> None:
    import personalize

    assert personalize.portable_kernels_of(tmp_path) == "false"
    config = make_config(portable_kernels="any_vendor")
    (tmp_path / "config.json").write_text(json.dumps({"experiment": config.to_dict()}))
    assert personalize.portable_kernels_of(tmp_path) == "any_vendor"


def test_a_log_tells_in_what_a_process_differs() -> None:
    """A server's description lacks what it does not compute with, which is no difference."""
    log = KernelLog()
    log.add({"torch": "2", "torch's kernels": "AVX512"})
    assert log.differences(AVX512) == []
    log.add(AVX512)
    assert log.differences(AVX2) == [
        "torch's kernels is AVX2, not AVX512",
        "MKL is AuthenticAMD AVX2, not AuthenticAMD AVX512_CORE",
    ]
    log.add(AVX2)
    assert log.differences(AVX2) == [], "said once"
    assert log.to_dict()["torch's kernels"] == ["AVX2", "AVX512"]
    assert log.to_dict()["torch"] == ["2"]


def test_a_log_goes_on_with_what_was_computed_before() -> None:
    log = KernelLog()
    log.add(AVX2)
    assert log.resume({"torch": ["2"], "torch's kernels": ["AVX512"], "gone": ["x"]}) == [
        "torch's kernels is AVX2, was AVX512"
    ]
    assert log.to_dict()["torch's kernels"] == ["AVX2", "AVX512"]
    assert log.to_dict()["gone"] == ["x"]


def test_a_log_does_not_grow_with_what_workers_make_up() -> None:
    """It is in memory, in each checkpoint and in the run's files."""
    log = KernelLog()
    for number in range(1000):
        log.add({"oneDNN": f"kind {number}", f"library {number}": "a"})
    noted = log.to_dict()
    assert len(noted) == MAX_NOTED
    assert len(noted["oneDNN"]) == MAX_NOTED


def test_limits_of_the_environment_are_seen(processor: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.onednn_instruction_set() == "AVX512_CORE_BF16"
    assert kernels.mkl_branch() == "AuthenticAMD AVX512_CORE_BF16"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert kernels.onednn_instruction_set() == "AVX2"
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert kernels.mkl_branch() == "AuthenticAMD AVX2", "MKL has other AVX2 kernels for each vendor"
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert kernels.mkl_branch() == "COMPATIBLE"
    processor["flags"] = PLAIN_FLAGS
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert kernels.onednn_instruction_set() == "AVX"


def test_a_server_is_described_by_what_it_computes_with() -> None:
    assert describe_kernels(None).items() < describe_kernels(torch.device("cpu")).items()
