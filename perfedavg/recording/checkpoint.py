"""Checkpoints: the state of a run in a file, from which it goes on to the same result, to the bit.

A checkpoint is a safetensors file: parameters, state of the server's optimizer, scores, and in which files the clients'
states are, as tensors, all else as JSON in the file's metadata. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from perfedavg.engine.experiment import ExperimentState, RoundRecord
from perfedavg.engine.scores import ClientScore
from perfedavg.machine.kernels import KernelLog
from perfedavg.own_module import changed_sources, sources
from perfedavg.plain_values import differences, from_plain, parse_json, shown
from perfedavg.recording.client_states import References, StateFiles
from perfedavg.recording.files import checked_file, read_checked, remove_partial_files, replace_file
from perfedavg.settings import ExperimentConfig, Phase, Population
from perfedavg.terminal.console import say
from perfedavg.training.optimizers import ServerOptimizer

FORMAT_VERSION = 5
NUM_KEPT = 2
"""Files kept: the one before the last is there for a disk that loses the last one."""

_KIND = "checkpoint"
_CLIENT_STATES = "client_states"
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
    """The checkpoints of one run, in a folder that this process alone writes to.

    client_states: the files that they refer to.
    """

    def __init__(self, folder: Path, identity: RunIdentity, client_states: StateFiles) -> None:
        self._folder = folder
        self._identity = identity
        self._client_states = client_states
        self._references: dict[str, References] = {}  # of each that is there and can be read, by its name
        if folder.is_dir():
            remove_partial_files(folder)

    def save(self, state: ExperimentState) -> None:
        """Write a checkpoint and remove those before the last two. The caller holds the state's lock.

        Raises OSError, and leaves those that are there, where it cannot be written; ValueError where what clients keep
        has been lost.
        """
        assert not state.step_failed, "a step has failed in its middle"
        state.read_clock()
        references = References(state.phase, state.client_states.versions())
        self._folder.mkdir(exist_ok=True)
        name = f"{state.phase.field}-{state.num_rounds:06d}.safetensors"
        replace_file(self._folder / name, _encode(state, self._identity, references))
        self._references[name] = references
        for path in self._paths()[NUM_KEPT:]:
            path.unlink(missing_ok=True)
            self._references.pop(path.name, None)
        self._client_states.keep(list(self._references.values()))

    def load(self) -> ExperimentState | None:
        """The last state that was saved, or None where none ever was.

        A damaged file, or one that refers to one, is reported and set aside, and the one before it taken. Clients keep
        what that refers to. Raises ValueError where all are damaged, or belong to another experiment or other data.
        """
        paths = self._paths()
        damaged: list[str] = []
        for path in paths:
            try:
                state, references = self._load(path)
            except _DamagedError as error:
                damaged.append(f"{path.name} ({error})")
                continue
            if damaged:
                say(f"damaged, and so set aside: {', '.join(damaged)}; going on from {path.name}")
            for newer in paths[: len(damaged)]:
                newer.rename(newer.with_suffix(".damaged"))
            self._references = {path.name: references, **self._read_references(paths[len(damaged) + 1 :])}
            self._client_states.go_on(references, list(self._references.values()))
            return state
        if damaged:
            raise ValueError(
                f"no checkpoint in {self._folder} can be read: {', '.join(damaged)}; start a new run, or remove that "
                "folder to let this one start from its first round"
            )
        self._client_states.go_on(None, ())
        return None

    def _read_references(self, paths: Sequence[Path]) -> dict[str, References]:
        """Of those that can be read, by their names."""
        found = {}
        for path in paths:
            with contextlib.suppress(_DamagedError, ValueError):
                found[path.name] = _decode_references(*self._read(path))
        return found

    def _load(self, path: Path) -> tuple[ExperimentState, References]:
        """Raises _DamagedError where it cannot be read, ValueError where it is of another experiment or version."""
        content, tensors = self._read(path)
        self._check_identity(content, path)
        references = _decode_references(content, tensors)
        state = _decode(content, tensors, self._identity.config, self._client_states)
        try:
            self._client_states.check(references)
        except ValueError as error:
            raise _DamagedError(str(error)) from error
        return state, references

    def _read(self, path: Path) -> tuple[_Content, dict[str, Tensor]]:
        """Raises as `_load` does."""
        try:
            text, tensors = read_checked(path, _KIND)
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
        return content, tensors

    def remove(self) -> None:
        """Remove them all, with their folder, and of what they refer to all but what clients keep at the end."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._client_states.finish()

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


def _encode(state: ExperimentState, identity: RunIdentity, references: References) -> bytes:
    """The content of the file."""
    tensors = {f"server.{name}": tensor for name, tensor in state.server.tensors().items()}
    rounds = sorted(references.rounds.items())
    tensors[_CLIENT_STATES] = torch.tensor(rounds, dtype=torch.int64).reshape(-1, 2)  # (clients, 2): id, round
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
    return checked_file(_KIND, json.dumps(asdict(content)), tensors)


def _decode_references(content: _Content, tensors: Mapping[str, Tensor]) -> References:
    try:
        return References(Phase.of_field(content.phase), dict(tensors[_CLIENT_STATES].tolist()))
    except _UNREADABLE as error:
        raise _DamagedError(f"its parts do not fit each other: {error}") from error


def _decode(
    content: _Content, tensors: Mapping[str, Tensor], config: ExperimentConfig, client_states: StateFiles
) -> ExperimentState:
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
            client_states=client_states,
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
