"""The cores that a process may use: those that it is bound to, and no more than its container may use at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perfedavg.machine.cores import usable_cores

NUM_BOUND = 8


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(NUM_BOUND)))


def machine(folder: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A folder as /sys/fs/cgroup with these files, and a file as /proc/self/cgroup."""
    (folder / "membership").write_text(membership)
    for name, content in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder / "cgroup", folder / "membership"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, NUM_BOUND),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, NUM_BOUND),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/gone\n", {"cpu.max": "300000 100000\n"}, 3),
        (
            "3:cpu,cpuacct:/a\n2:memory:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, NUM_BOUND),
        ("0::/\n", {}, NUM_BOUND),
        ("", {}, NUM_BOUND),
    ],
)
def test_a_containers_quota_counts(tmp_path: Path, membership: str, files: dict[str, str], expected: int) -> None:
    """More threads than the quota allows would all be stopped for most of each period."""
    assert usable_cores(*machine(tmp_path, membership, files)) == expected


def test_a_quota_does_not_add_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert usable_cores(*machine(tmp_path, "0::/\n", {"cpu.max": "400000 100000\n"})) == 1
