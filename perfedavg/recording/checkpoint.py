"""Checkpoints: the state of a run in a file, from which it goes on to the same result, to the bit.

A checkpoint is a safetensors file: parameters, states of the server's optimizer and of clients, and scores as tensors,
all else as JSON in the file's metadata. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from perfedavg.engine.client_states import ClientStates, StatesInMemory
from perfedavg.engine.experiment import ExperimentState, RoundRecord
from perfedavg.engine.scores import ClientScore
from perfedavg.machine.kernels import KernelLog
from perfedavg.own_module import changed_sources, sources
from perfedavg.plain_values import differences, from_plain, parse_json, shown
from perfedavg.recording.files import read_tensors, remove_partial_files, replace_file
from perfedavg.settings import ExperimentConfig, Phase, Population
from perfedavg.terminal.console import say
from perfedavg.training.optimizers import ServerOptimizer

FORMAT_VERSION = 5
NUM_KEPT = 2
"""Files kept: the one before the last is there for a disk that loses the last one."""

_NAME = re.compile(r"(?P<field>fedavg|fine_tune)-(?P<round>\d+)\.safetensors")
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged file raises, wherever the damage is."""


class _DamagedError(Exception):
    """A checkpoint cannot be read, and why."""


@dataclass(frozen=True)
class _Content:
    """The JSON of a checkpoint.

    Phases by their `field`; `pending_record` as `RoundRecord.to_dict` gives it; `scores` names the populations that
    were scored after each phase; `sources` as `own_module.sources`.
    """

    format_version: int
    config: dict[str, Any]
    fingerprint: str
    versions: dict[str, str | None]
    kernels: dict[str, list[str]]
    phase: str
    num_rounds: int
    pending_record: dict[str, Any] | None
    scores: dict[str, list[str]]
    phase_seconds: dict[str, float]
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunIdentity:
    """What a run must have in common with its checkpoints.

    fingerprint: digest of the data.
    versions: what else decides bits, such as the commit.
    kernels: how the run's processes compute; `Checkpoints.load` adds those of earlier processes.
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
        assert not state.step_failed, "a step has failed in its middle"
        state.read_clock()
        self._folder.mkdir(exist_ok=True)
        name = f"{state.phase.field}-{state.num_rounds:06d}.safetensors"
        replace_file(self._folder / name, _encode(state, self._identity))
        for path in self._paths()[NUM_KEPT:]:
            path.unlink(missing_ok=True)

    def load(self) -> ExperimentState | None:
        """The last state that was saved, or None where none ever was.

        A damaged file is reported and set aside, and the one before it taken. Raises ValueError where all are damaged,
        or belong to another experiment or other data.
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
        """Raises _DamagedError where it cannot be read, ValueError where it is of another experiment or version."""
        try:
            tensors, metadata = read_tensors(path)
            text = metadata["checkpoint"]
            if metadata["crc32"] != _checksum(text, tensors):
                raise ValueError("its checksum does not fit")
            values = from_plain(dict[str, Any], parse_json(text))
            version = values.get("format_version")
            content = from_plain(_Content, values) if version == FORMAT_VERSION else None
        except _UNREADABLE as error:
            raise _DamagedError(str(error)) from error
        if content is None:
            raise ValueError(
                f"{path} has format {shown(version)}, this version reads {FORMAT_VERSION}; go on with the version that "
                "the run was begun with"
            )
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
        """Raises ValueError where the checkpoint is of another experiment or other data; reports other versions."""
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
        changed = changed_sources(content.sources)
        if changed:
            say(f"the code of {', '.join(changed)} has changed since the run was begun: its result may differ")


def _encode(state: ExperimentState, identity: RunIdentity) -> bytes:
    """The content of the file."""
    tensors = {f"server.{name}": tensor for name, tensor in state.server.tensors().items()}
    assert isinstance(state.client_states, StatesInMemory)
    for client_id, kept in state.client_states.current.items():
        tensors |= {f"client.{client_id}.{name}": tensor.contiguous() for name, tensor in kept.items()}
    for phase, by_population in state.scores.items():
        for population, scores in by_population.items():
            tensors[_scores_name(phase.field, population.value)] = _encode_scores(scores)
    content = _Content(
        format_version=FORMAT_VERSION,
        config=identity.config.to_dict(),
        fingerprint=identity.fingerprint,
        versions=dict(identity.versions),
        kernels=identity.kernels.to_dict(),
        phase=state.phase.field,
        num_rounds=state.num_rounds,
        pending_record=None if state.pending_record is None else state.pending_record.to_dict(),
        scores={phase.field: [population.value for population in scored] for phase, scored in state.scores.items()},
        phase_seconds={phase.field: seconds for phase, seconds in state.phase_seconds.items()},
        sources=sources(),
    )
    text = json.dumps(asdict(content))
    return safetensors.torch.save(tensors, {"checkpoint": text, "crc32": _checksum(text, tensors)})


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
            client_states=StatesInMemory(_decode_states(tensors)),
            server=ServerOptimizer.from_tensors(settings.server_optimizer, server),
            pending_record=None if content.pending_record is None else RoundRecord.from_dict(content.pending_record),
            scores={
                Phase.of_field(phase): {
                    Population(population): _decode_scores(
                        tensors[_scores_name(phase, population)], config.metric_names
                    )
                    for population in scored
                }
                for phase, scored in content.scores.items()
            },
            phase_seconds={Phase.of_field(name): seconds for name, seconds in content.phase_seconds.items()},
        )
    except _UNREADABLE as error:
        raise _DamagedError(f"its parts do not fit each other: {error}") from error


def _scores_name(phase: str, population: str) -> str:
    return f"scores.{phase}.{population}"


def _encode_scores(scores: Sequence[ClientScore]) -> Tensor:
    """A row a client, float64: its counts, then the value of every metric: initial, personalized, after each epoch."""
    rows = []
    for score in scores:
        values = [list(by_metric.values()) for by_metric in (score.initial, score.personalized, *score.by_epoch)]
        rows.append([score.client_id, score.num_train_examples, score.num_test_examples, *chain(*values)])
    return torch.tensor(rows, dtype=torch.float64)


def _decode_scores(rows: Tensor, metrics: Sequence[str]) -> list[ClientScore]:
    scores = []
    for client_id, num_train, num_test, *values in rows.tolist():
        parts = [values[first : first + len(metrics)] for first in range(0, len(values), len(metrics))]
        initial, personalized, *by_epoch = (dict(zip(metrics, part, strict=True)) for part in parts)
        counts = (int(client_id), int(num_train), int(num_test))
        scores.append(ClientScore(*counts, initial, personalized, tuple(by_epoch)))
    return scores


def _decode_states(tensors: Mapping[str, Tensor]) -> ClientStates:
    states: ClientStates = {}
    for name, tensor in tensors.items():
        if name.startswith("client."):
            _, client_id, kept = name.split(".", 2)
            states.setdefault(int(client_id), {})[kept] = tensor
    return states


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of everything that a checkpoint says, which finds what a disk did to it."""
    checksum = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
    return str(checksum)
