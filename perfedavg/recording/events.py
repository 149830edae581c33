"""A run's curves for TensorBoard: `tensorboard --logdir runs` shows them while it goes on."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perfedavg.engine.experiment import RoundRecord
from perfedavg.recording.files import GrowingFile
from perfedavg.settings import Phase, PhaseConfig, Population

FILE_NAME = "events.out.tfevents.perfedavg"
"""TensorBoard reads files with `tfevents` in their name."""


class EventFile:
    """The file of a run's events, one a round, which grows as the rounds end.

    The step of an event is its round, counted through the phases. Numbers that are not finite are left out.
    """

    def __init__(
        self, folder: Path, phases: Mapping[Phase, PhaseConfig], metrics: Sequence[str], population: Population
    ) -> None:
        """population: whom the points of the curve are of."""
        self._folder = folder
        self._population = population
        self._file = GrowingFile(folder / FILE_NAME)
        self._has_header = False
        self._metrics = metrics
        self._num_rounds = {phase: settings.num_rounds for phase, settings in phases.items()}

    def append(self, record: RoundRecord) -> None:
        """Add a round. Raises OSError, and keeps it, where it cannot be written yet."""
        self._folder.mkdir(exist_ok=True)
        self._file.append(self._begin() + self._event(record))

    def replace(self, records: Iterable[RoundRecord]) -> None:
        """Let the file hold these rounds and no others, in one step. Raises OSError."""
        self._folder.mkdir(exist_ok=True)
        self._has_header = False
        self._file.replace(self._begin() + b"".join(map(self._event, records)))

    def _begin(self) -> bytes:
        """What the file begins with, where that is not there yet."""
        header = b"" if self._has_header else _framed(file_version="brain.Event:2")
        self._has_header = True
        return header

    def _event(self, record: RoundRecord) -> bytes:
        from tensorboard.compat.proto.summary_pb2 import Summary

        before = sum(num_rounds for phase, num_rounds in self._num_rounds.items() if phase < record.phase)
        scalars = _scalars(record, self._metrics, self._population)
        scalars = {tag: value for tag, value in scalars.items() if value is not None and math.isfinite(value)}
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        return _framed(step=before + record.round_number, summary=summary)


def _scalars(record: RoundRecord, metrics: Sequence[str], population: Population) -> dict[str, float | None]:
    scalars: dict[str, float | None] = {
        "training/loss": record.train_loss,
        "training/update_norm": record.update_norm,
        "round/seconds": record.seconds,
        "round/idle_share": record.idle_share,
        "round/refused_updates": len(record.refused),
    }
    if record.evaluation is not None:
        for kind in ("initial", "personalized"):
            for metric in metrics:
                scalars[f"{population.value}_{metric}/{kind}"] = record.evaluation[kind][metric]
        scalars[f"{population.value}_accuracy/fraction_hurt"] = record.evaluation["fraction_hurt"]
    return scalars


def _framed(**fields: Any) -> bytes:
    """An event as the file holds it, with its length and checksums."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return record.getvalue()
