"""Settings of torch in a process that trains: which device, and kernels that give the same bits every time."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from perfedavg.fields import label
from perfedavg.machine.kernels import kernels_are_pinned, mkl_branch, onednn_instruction_set
from perfedavg.settings import Compute, ExperimentConfig, flag

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt(3)


def resolve_device(name: str) -> torch.device:
    """`auto` (the first GPU, or else the CPU), `cpu`, `cuda` or `cuda:i`.

    Raises ValueError where the name is none of these or the GPU is not there.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise ValueError(f"{label(Compute, 'device')} {name} is unknown; use auto, cpu, cuda or cuda:i with i from 0")
    if kind == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= found:
        raise ValueError(
            f"{label(Compute, 'device')} {name} is not there: torch {torch.__version__} finds {found} GPU(s) here; "
            f"use {label(Compute, 'device')} cpu or {label(Compute, 'device')} auto"
        )
    return torch.device("cuda", int(index or 0))


_CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True)
class ComputeDevice:
    """What a process trains clients on.

    kind: `cpu` or `cuda`.
    memory_bytes: that can be had of it; 0 for a CPU.
    num_slots: groups of clients that the process trains on it side by side, 1 or more, where it trains groups.
    """

    kind: str
    memory_bytes: int
    num_slots: int = 1


def describe_device(device: torch.device, threads: int | None = None) -> ComputeDevice:
    """The memory of a GPU is all that it has, so that it is the same in every run on it.

    threads: what the user asked for with --threads; without, groups are trained one at a time.
    """
    memory_bytes = 0 if device.type != "cuda" else torch.cuda.get_device_properties(device).total_memory
    return ComputeDevice(device.type, memory_bytes, threads or 1)


def use_reproducible_kernels() -> None:
    """One intra-op thread, deterministic algorithms, no TF32: the same input gives the same bits.

    Parallelism comes from clients trained side by side (`LocalExecutor`), because the number of intra-op threads
    changes the order of additions inside a kernel. Call it before the first kernel runs.
    """
    os.environ.setdefault(_CUBLAS_VARIABLE, ":4096:8")
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports the compiler
    # Costs time, and serves only to find bugs. torch's types do not list it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextlib.contextmanager
def reproducible_kernels() -> Iterator[None]:
    """`use_reproducible_kernels` for a while, in a process that also does other work; its own settings come back."""
    num_threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    flags = [
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
    ]
    before = [getattr(owner, name) for owner, name in flags]
    chosen_by_user = _CUBLAS_VARIABLE in os.environ
    use_reproducible_kernels()
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(num_threads)
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        for (owner, name), value in zip(flags, before, strict=True):
            setattr(owner, name, value)
        if not chosen_by_user:
            del os.environ[_CUBLAS_VARIABLE]


def describe_kernels(device: torch.device | None) -> dict[str, str]:
    """What decides the bits of what this process computes, by library or device. Equal ones give equal bits.

    device: on which it trains, or None for a process that only steps and adds, as a server does.
    """
    described = {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "torch's kernels": torch.backends.cpu.get_cpu_capability(),
    }
    if device is None:
        return described
    described |= {"oneDNN": onednn_instruction_set(), "MKL": mkl_branch()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["GPU"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    else:
        described["GPU"] = "none"
    return described


def check_portable(config: ExperimentConfig, device: torch.device) -> None:
    """Raises ValueError where the experiment asks for portable kernels and this process does not train with them."""
    if config.portable_kernels == "false":
        return
    if device.type != "cpu":
        raise ValueError(
            f"{flag('portable_kernels')} {config.portable_kernels} is for processors; this process trains on {device}; "
            f"use {label(Compute, 'device')} cpu, or leave it out"
        )
    if not kernels_are_pinned(config.portable_kernels) or torch.backends.cpu.get_cpu_capability() != "AVX2":
        raise ValueError(
            f"{flag('portable_kernels')} {config.portable_kernels} was not known before torch was loaded; call "
            "perfedavg.machine.kernels.pin_kernels first"
        )


def return_freed_memory() -> None:
    """Let the blocks of a model's size go back to the system when they are freed, for a process that lives long.

    glibc keeps them, in every thread, so that a server comes to hold several times what it uses. Mapping each block of
    1 MiB or more on its own ends that, at a price that a process that trains would feel. No effect without mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)
