"""Checkpoints: the state of a run in a file, from which it goes on to the same result, to the bit.

A checkpoint is a safetensors file: parameters, state of the server's optimizer and scores as tensors, all else as JSON
in the file's metadata. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from perfedavg.engine.experiment import ExperimentState, RoundRecord
from perfedavg.engine.scores import ClientScore
from perfedavg.machine.kernels import KernelLog
from perfedavg.plain_values import differences, from_plain, parse_json, shown
from perfedavg.recording.files import open_tensors, remove_partial_files, replace_file
from perfedavg.settings import ExperimentConfig, Phase
from perfedavg.terminal.console import say
from perfedavg.training.optimizers import ServerOptimizer

FORMAT_VERSION = 3
_SCORE_PARTS = ("counts", "measures", "by_epoch")
NUM_KEPT = 2
"""Files kept: the one before the last is there for a disk that loses the last one."""

_NAME = re.compile(r"(?P<field>fedavg|fine_tune)-(?P<round>\d+)\.safetensors")
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged file raises, wherever the damage is."""


class _DamagedError(Exception):
    """A checkpoint cannot be read, and why."""


@dataclass(frozen=True)
class _Content:
    """The JSON of a checkpoint. Phases by their `field`; `trained` as `RoundRecord.to_dict` gives it."""

    format_version: int
    config: dict[str, Any]
    fingerprint: str
    versions: dict[str, str | None]
    kernels: dict[str, list[str]]
    phase: str
    num_rounds: int
    trained: dict[str, Any] | None
    scores: list[str]
    phase_seconds: dict[str, float]


@dataclass(frozen=True)
class RunIdentity:
    """What a run must have in common with its checkpoints.

    fingerprint: of the data.  versions: of what else decides bits, such as the commit.
    kernels: how the run's processes compute; those that a checkpoint tells of are added.
    """

    config: ExperimentConfig
    fingerprint: str
    versions: Mapping[str, str | None]
    kernels: KernelLog = field(default_factory=KernelLog)


class Checkpoints:
    """The checkpoints of one run, in a folder that this process alone writes to."""

    def __init__(self, folder: Path, identity: RunIdentity) -> None:
        self._folder = folder
        self._identity = identity
        if folder.is_dir():
            remove_partial_files(folder)

    def save(self, state: ExperimentState) -> None:
        """Write a checkpoint and remove those before the last two. The caller holds the state's lock.

        Raises OSError, and leaves those that are there, where it cannot be written.
        """
        assert not state.torn, "a step has failed in its middle"
        state.read_clock()
        self._folder.mkdir(exist_ok=True)
        name = f"{state.phase.field}-{state.num_rounds:06d}.safetensors"
        replace_file(self._folder / name, _encode(state, self._identity))
        for path in self._paths()[NUM_KEPT:]:
            path.unlink(missing_ok=True)

    def load(self) -> ExperimentState | None:
        """The last state that was saved, or None where none ever was.

        A damaged file is said and set aside, and the one before it taken. Raises ValueError where all are damaged, or
        where they belong to another experiment or other data.
        """
        paths = self._paths()
        damaged: list[str] = []
        for path in paths:
            try:
                state = self._load(path)
            except _DamagedError as error:
                damaged.append(f"{path.name} ({error})")
                continue
            if damaged:
                say(f"damaged, and so set aside: {', '.join(damaged)}; going on from {path.name}")
            for newer in paths[: len(damaged)]:
                newer.rename(newer.with_suffix(".damaged"))
            return state
        if damaged:
            raise ValueError(
                f"no checkpoint in {self._folder} can be read: {', '.join(damaged)}; start a new run, or remove that "
                "folder to let this one start from its first round"
            )
        return None

    def _load(self, path: Path) -> ExperimentState:
        """Raises _DamagedError where it cannot be read, ValueError where it is of another experiment."""
        raw, tensors = _read(path)
        if raw.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format {shown(raw.get('format_version'))}, this version reads {FORMAT_VERSION}; go on "
                "with the version that the run was begun with"
            )
        try:
            content = from_plain(_Content, raw)
        except ValueError as error:
            raise _DamagedError(str(error)) from error
        self._check_identity(content, path)
        return _decode(content, tensors, self._identity.config)

    def remove(self) -> None:
        """Remove them all, with their folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        """The latest first."""
        found = []
        for path in self._folder.glob("*.safetensors"):
            match = _NAME.fullmatch(path.name)
            if match:
                found.append((Phase.of_field(match["field"]), int(match["round"]), path))
        return [path for *_, path in sorted(found, reverse=True)]

    def _check_identity(self, content: _Content, path: Path) -> None:
        """Raises ValueError where the checkpoint is another experiment's, or of other data; says other versions."""
        own = parse_json(json.dumps(self._identity.config.to_dict()))  # tuples become lists, as in the file
        others = differences(own, content.config)
        if others:
            raise ValueError(
                f"{path} is of another experiment: {'; '.join(others)}; restore the run's config.json, or start "
                "a new run"
            )
        if content.fingerprint != self._identity.fingerprint:
            raise ValueError(
                f"{path}: the run was made with other data (fingerprint {content.fingerprint}, not "
                f"{self._identity.fingerprint}); name the folder with the same files in --data_root"
            )
        versions = differences(dict(self._identity.versions), content.versions)
        versions += self._identity.kernels.resume(content.kernels)
        if versions:
            say(
                f"this run was begun with other versions or processors ({'; '.join(versions)}): its result may differ "
                "in the last bits"
            )


def _encode(state: ExperimentState, identity: RunIdentity) -> Iterator[bytes | memoryview]:
    """The file, piece by piece, so that no copy of the model is made: header's length, header, the tensors' bytes.

    The format is that of https://github.com/huggingface/safetensors; its library would hold two copies of all.
    """
    tensors = {f"server.{name}": tensor for name, tensor in state.server.tensors().items()}
    for phase, scores in state.scores.items():
        counts = [(row.client_id, row.num_train_examples, row.num_test_examples) for row in scores]
        measures = [
            (row.initial_loss, row.initial_accuracy, row.personalized_loss, row.personalized_accuracy) for row in scores
        ]
        tensors[f"scores.{phase.field}.counts"] = torch.tensor(counts, dtype=torch.int64)
        tensors[f"scores.{phase.field}.measures"] = torch.tensor(measures, dtype=torch.float64)
        curves = [row.by_epoch for row in scores]
        tensors[f"scores.{phase.field}.by_epoch"] = torch.tensor(curves, dtype=torch.float64)
    content = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "config": identity.config.to_dict(),
            "fingerprint": identity.fingerprint,
            "versions": dict(identity.versions),
            "kernels": identity.kernels.to_dict(),
            "phase": state.phase.field,
            "num_rounds": state.num_rounds,
            "trained": None if state.trained is None else state.trained.to_dict(),
            "scores": [phase.field for phase in state.scores],
            "phase_seconds": {phase.field: seconds for phase, seconds in state.phase_seconds.items()},
        }
    )
    header: dict[str, Any] = {"__metadata__": {"checkpoint": content, "crc32": str(_checksum(content, tensors))}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    yield len(text).to_bytes(8, "little")
    yield text
    yield from map(_bytes_of, tensors.values())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON and the tensors of a checkpoint. Raises _DamagedError."""
    try:
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        text = metadata["checkpoint"]
        if metadata["crc32"] != str(_checksum(text, tensors)):
            raise ValueError("its checksum does not fit")
        return from_plain(dict[str, Any], parse_json(text)), tensors
    except _UNREADABLE as error:
        raise _DamagedError(str(error)) from error


def _decode(content: _Content, tensors: Mapping[str, Tensor], config: ExperimentConfig) -> ExperimentState:
    """Raises _DamagedError where the parts do not fit each other."""
    try:
        phase = Phase.of_field(content.phase)
        settings = config.phases[phase]
        if not 0 <= content.num_rounds <= settings.num_rounds:
            raise ValueError(f"num_rounds is {content.num_rounds}, must be 0 to {settings.num_rounds}")
        prefix = "server."
        server = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return ExperimentState(
            phase=phase,
            num_rounds=content.num_rounds,
            server=ServerOptimizer.from_tensors(settings.server_optimizer, server),
            trained=None if content.trained is None else RoundRecord.from_dict(content.trained),
            scores={Phase.of_field(name): _decode_scores(tensors, name) for name in content.scores},
            phase_seconds={Phase.of_field(name): seconds for name, seconds in content.phase_seconds.items()},
        )
    except _UNREADABLE as error:
        raise _DamagedError(f"its parts do not fit each other: {error}") from error


def _decode_scores(tensors: Mapping[str, Tensor], name: str) -> list[ClientScore]:
    counts, measures, curves = (tensors[f"scores.{name}.{part}"].tolist() for part in _SCORE_PARTS)
    return [
        replace(ClientScore(*row, *measured), by_epoch=tuple((loss, accuracy) for loss, accuracy in curve))
        for row, measured, curve in zip(counts, measures, curves, strict=True)
    ]


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of everything that a checkpoint says, which finds what a disk did to it."""
    checksum = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(_bytes_of(tensor), checksum)
    return checksum


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory (little-endian on every machine that torch is built for), not a copy."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
