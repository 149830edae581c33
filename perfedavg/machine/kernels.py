"""Which kernels a process computes with: pinned to what unlike processors have in common, or described and compared.

Imports no torch: torch, oneDNN and MKL read their settings once, when they are loaded or first used.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

PORTABLE_KERNELS = ("false", "true", "any_vendor")
"""What --portable_kernels may be: the processor's own kernels; those that all processors of one vendor with AVX2 have;
those that all x86-64 processors with AVX2 have."""

_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
ENVIRONMENTS = {
    "false": {},
    "true": {**_AVX2, "MKL_CBWR": "AVX2"},
    "any_vendor": {**_AVX2, "MKL_CBWR": "COMPATIBLE"},
}
"""What limits torch's own kernels, oneDNN's and MKL's. MKL has other AVX2 kernels for Intel's processors than for
AMD's; all have its COMPATIBLE ones, which are slower."""
_NEEDED = {"avx2", "fma"}

_ONEDNN_SETS = {
    "SSE41": {"sse4_1"},
    "AVX": {"avx"},
    "AVX2": {"avx2", "fma"},
    "AVX2_VNNI": {"avx_vnni"},
    "AVX512_CORE": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "AVX512_CORE_VNNI": {"avx512_vnni"},
    "AVX512_CORE_BF16": {"avx512_bf16"},
    "AVX512_CORE_FP16": {"avx512_fp16"},
    "AVX512_CORE_AMX": {"amx_tile", "amx_bf16", "amx_int8"},
}
"""oneDNN's instruction sets, weakest first, under the names that ONEDNN_MAX_CPU_ISA takes: what each adds."""


class UnpinnedKernelsError(Exception):
    """This process has loaded torch with other kernels than the run asks for. portable: one of PORTABLE_KERNELS."""

    def __init__(self, portable: str) -> None:
        super().__init__(f"torch was loaded before --portable_kernels {portable} was known")
        self.portable = portable


def pin_kernels(portable: str) -> None:
    """Let this process, and those that it starts, compute with portable kernels. Call it before torch is loaded.

    portable: one of PORTABLE_KERNELS, of which `false` changes nothing.
    Raises ValueError where the processor has no such kernels, UnpinnedKernelsError where torch is loaded already.
    """
    check_processor(portable)
    if "torch" in sys.modules and not kernels_are_pinned(portable):
        raise UnpinnedKernelsError(portable)
    os.environ.update(ENVIRONMENTS[portable])


def pin_kernels_or_restart(portable: str, script: Path, argv: Sequence[str]) -> None:
    """Pin the kernels of an entry point, which where torch is loaded already, as in a fork, starts itself again."""
    try:
        pin_kernels(portable)
    except UnpinnedKernelsError:
        restart_pinned(portable, script, argv)


def kernels_are_pinned(portable: str) -> bool:
    return all(os.environ.get(name) == value for name, value in ENVIRONMENTS[portable].items())


def restart_pinned(portable: str, script: Path, argv: Sequence[str]) -> None:
    """Start this process again, under its process id, as a Python script with portable kernels. Does not return.

    Raises ValueError where the processor has no such kernels.
    """
    check_processor(portable)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, str(script), *argv], {**os.environ, **ENVIRONMENTS[portable]})


def check_processor(portable: str) -> None:
    """Raises ValueError where the processor has no such kernels."""
    if portable == "false" or (_is_x86() and _cpu_flags() >= _NEEDED):
        return
    raise ValueError(
        f"--portable_kernels {portable} needs an x86-64 processor with AVX2 and FMA, which this machine's "
        f"({_cpu_fact('model name') or platform.machine()}) is not; leave it out, or use other machines"
    )


def onednn_instruction_set() -> str:
    """The best of oneDNN's instruction sets that it may use here; the machine's name where it is no x86-64."""
    if not _is_x86():
        return platform.machine()
    names = list(_ONEDNN_SETS)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    allowed = names[: names.index(limit) + 1] if limit in names else names
    best = "none"
    for name in allowed:
        if _ONEDNN_SETS[name] <= _cpu_flags():
            best = name
    return best


def mkl_branch() -> str:
    """What MKL chooses its kernels by: the vendor and the instruction set, but for those that all processors have."""
    limit = os.environ.get("MKL_CBWR", "")
    if limit == "COMPATIBLE":
        return limit
    return f"{processor_vendor()} {limit or onednn_instruction_set()}"


def processor_vendor() -> str:
    """Such as `AuthenticAMD`; the machine's name where the system does not tell."""
    return _cpu_fact("vendor_id") or platform.machine()


MAX_NOTED = 64
"""Libraries and devices, and kinds of each, that a log notes: more than any run has, however many a worker makes up."""


class KernelLog:
    """How the processes of a run were seen to compute, over all of its resumptions; a run of one kind has one of each.

    A description maps a library or device to what decides its bits here (see `compute.describe_kernels`). The server's
    names less than a worker's, because it computes less.
    """

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def differences(self, kernels: Mapping[str, str]) -> list[str]:
        """In what a process differs from those that were noted, as `name is X, not Y`."""
        return [
            f"{name} is {value}, not {', '.join(sorted(self._seen[name]))}"
            for name, value in kernels.items()
            if value not in self._seen.get(name, {value})
        ]

    def add(self, kernels: Mapping[str, str]) -> None:
        """Note a process, as far as there is room: see MAX_NOTED."""
        for name, value in kernels.items():
            if name in self._seen or len(self._seen) < MAX_NOTED:
                kinds = self._seen.setdefault(name, set())
                if len(kinds) < MAX_NOTED:
                    kinds.add(value)

    def resume(self, earlier: Mapping[str, Sequence[str]]) -> list[str]:
        """Note what an earlier part of the run computed with. Returns in what it differed, as `name is X, was Y`."""
        differences = [
            f"{name} is {', '.join(sorted(self._seen[name]))}, was {', '.join(values)}"
            for name, values in earlier.items()
            if set(values) != self._seen.get(name, set(values))
        ]
        for name, values in earlier.items():
            self._seen.setdefault(name, set()).update(values)
        return differences

    def to_dict(self) -> dict[str, list[str]]:
        """By library or device, the kinds that were seen; one each where all of the run rounds alike."""
        return {name: sorted(values) for name, values in self._seen.items()}


@cache
def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpu_fact("flags").split())


def _cpu_fact(name: str) -> str:
    """A line of the first processor in /proc/cpuinfo, or an empty text where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")
