"""A run's curves for TensorBoard: `tensorboard --logdir runs` shows them while it goes on."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from perfedavg.engine.experiment import RoundRecord
from perfedavg.recording.files import GrowingFile
from perfedavg.settings import Phase, PhaseConfig

FILE_NAME = "events.out.tfevents.perfedavg"
"""TensorBoard reads files with `tfevents` in their name."""


class EventFile:
    """The file of a run's events, one a round, which grows as the rounds end.

    The step of an event is its round, counted through the phases. Numbers that are not finite are left out.
    """

    def __init__(self, folder: Path, phases: Mapping[Phase, PhaseConfig]) -> None:
        self._folder = folder
        self._file = GrowingFile(folder / FILE_NAME)
        self._has_header = False
        self._offsets: dict[Phase, int] = {}
        before = 0
        for phase, settings in phases.items():
            self._offsets[phase] = before
            before += settings.num_rounds

    def append(self, record: RoundRecord) -> None:
        """Add a round. Raises OSError, and keeps it, where it cannot be written yet."""
        header = b"" if self._has_header else _header()
        self._has_header = True
        self._folder.mkdir(exist_ok=True)
        self._file.append(header + self._event(record))

    def replace(self, records: Iterable[RoundRecord]) -> None:
        """Let the file hold these rounds and no others, in one step. Raises OSError."""
        self._has_header = True
        self._folder.mkdir(exist_ok=True)
        self._file.replace([_header(), *map(self._event, records)])

    def _event(self, record: RoundRecord) -> bytes:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in _scalars(record).items()
            if math.isfinite(value)
        ]
        step = self._offsets[record.phase] + record.round_number
        return _framed(Event(wall_time=time.time(), step=step, summary=Summary(value=values)).SerializeToString())


def _scalars(record: RoundRecord) -> dict[str, float]:
    scalars = {
        "training/update_norm": record.update_norm,
        "round/seconds": record.seconds,
        "round/idle_share": record.idle_share,
        "round/refused_updates": float(len(record.refused)),
    }
    if record.train_loss is not None:
        scalars["training/loss"] = record.train_loss
    if record.evaluation is not None:
        for kind in ("initial", "personalized"):
            for name in ("loss", "accuracy"):
                value = record.evaluation[kind][name]
                scalars[f"unseen_{name}/{kind}"] = math.nan if value is None else value
        scalars["unseen_accuracy/fraction_hurt"] = record.evaluation["fraction_hurt"]
    return scalars


def _header() -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    return _framed(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())


def _framed(event: bytes) -> bytes:
    """The event as the file holds it, with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(event)
    return record.getvalue()
