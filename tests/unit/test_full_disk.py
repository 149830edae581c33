"""A full disk does not end a run that still has rounds to train, and loses nothing but what was under way."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import digits_dataset, make_config, read_result
from torch import Tensor, nn

from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.files import GrowingFile, replace_file
from perfedavg.recording.run_folder import RunFolder
from perfedavg.settings import ExperimentConfig


class SmallDisk:
    """A file system of 256 KiB, which can be filled and emptied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        with open(self._filler, "ab", buffering=0) as file:
            try:
                while True:
                    os.write(file.fileno(), bytes(512))
            except OSError:
                pass

    def make_room(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.decode().strip()}")
    yield SmallDisk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


class FillsDisk:
    """An executor that fills the disk before one of its requests, and makes room before a later one."""

    def __init__(self, inner: LocalExecutor, disk: SmallDisk, fill_at: int, room_at: int) -> None:
        self._inner = inner
        self.kernels = inner.kernels
        self._disk = disk
        self._actions = {fill_at: disk.fill, room_at: disk.make_room}
        self._requests = 0

    def _count(self) -> None:
        self._requests += 1
        self._actions.get(self._requests, lambda: None)()

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        self._count()
        return self._inner.train(task, parameters)

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        self._count()
        return self._inner.score(task, parameters)


CONFIG = make_config()
NEVER = 1000


def run(path: Path, disk: SmallDisk, fill_at: int, room_at: int, config: ExperimentConfig = CONFIG) -> None:
    folder = RunFolder(path, {}, checkpoint_every=1, resume=path.exists())
    dataset = digits_dataset(20)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    executor = FillsDisk(LocalExecutor(config, model, dataset), disk, fill_at, room_at)
    try:
        run_and_record(config, executor, dataset, model, folder, {"world_size": 1})
    finally:
        folder.close()


def metrics(path: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "idle_share")} for line in lines]


def assert_same(path: Path, reference: Path) -> None:
    assert read_result(path)["model_sha256"] == read_result(reference)["model_sha256"]
    assert (path / "clients.csv").read_bytes() == (reference / "clients.csv").read_bytes()
    assert metrics(path) == metrics(reference)


def test_a_run_goes_on_with_a_full_disk_and_writes_what_it_kept(
    disk: SmallDisk, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Full from the first round to the last but one: metrics, checkpoints and clients.csv all fail meanwhile."""
    run(tmp_path / "reference", disk, NEVER, NEVER)
    capfd.readouterr()
    run(disk.path / "run", disk, 1, 7)
    output, errors = capfd.readouterr()
    assert_same(disk.path / "run", tmp_path / "reference")
    for name in ("metrics.jsonl", "a checkpoint", "clients.csv"):
        assert errors.count(f"{name} cannot be written to {disk.path / 'run'} (No space left on device)") == 1
    for name in ("metrics.jsonl", "a checkpoint"):
        assert errors.count(f"{name} can be written again") == 1
    assert "Traceback" not in errors, "logging keeps silent too"
    assert "results in" in output
    assert not [path for path in (disk.path / "run").rglob("*") if ".partial" in path.name or "checkpoint" in path.name]


def test_results_that_cannot_be_written_are_shown_and_can_be_written_later(
    disk: SmallDisk, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "reference", disk, NEVER, NEVER)
    capfd.readouterr()
    path = disk.path / "run"
    with pytest.raises(OSError, match=f"the results cannot be written to {path} .*make room.*--resume {path}"):
        run(path, disk, 8, NEVER)
    output, errors = capfd.readouterr()
    assert "after fine-tuning" in output
    assert f"continue from the one before it with: single_process.py --resume {path}" in errors
    assert not (path / "result.json").exists()
    assert [entry.name for entry in path.rglob("*.safetensors") if entry.parent.name == "checkpoint"]
    disk.make_room()
    run(path, disk, NEVER, NEVER)
    assert_same(path, tmp_path / "reference")


def test_a_line_is_written_whole_or_later(disk: SmallDisk) -> None:
    """Lines of a fifth of the disk: the last one for which there is room only in part must leave nothing."""
    lines = GrowingFile(disk.path / "lines")
    texts = [letter * 50_000 + "\n" for letter in "abcdefgh"]
    refused = 0
    for text in texts:
        try:
            lines.append(text.encode())
        except OSError:
            refused += 1
    assert refused >= 2
    assert (disk.path / "lines").read_text().splitlines(keepends=True) == texts[: len(texts) - refused]
    assert (disk.path / "lines").read_text().endswith("\n")
    subprocess.run(["mount", "-o", "remount,size=2m", disk.path], check=True)
    lines.flush()
    assert (disk.path / "lines").read_text().splitlines(keepends=True) == texts


def test_a_file_that_cannot_be_replaced_stays_as_it_was(disk: SmallDisk) -> None:
    path = disk.path / "file"
    replace_file(path, b"before")
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, bytes(400_000))
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in disk.path.iterdir()] == ["file"]
