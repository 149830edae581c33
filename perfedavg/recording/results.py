"""The content of result.json and clients.csv, and JSON as a run's files hold it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from perfedavg.contracts import ClientDirectory, client_name
from perfedavg.engine.experiment import ExperimentOutcome
from perfedavg.engine.scores import RunScores, summarize
from perfedavg.metrics import better_when_higher
from perfedavg.recording.runs import KINDS, result_key
from perfedavg.settings import ExperimentConfig, Population

_COUNTS = ("num_train_examples", "num_test_examples")


def summarize_run(config: ExperimentConfig, outcome: ExperimentOutcome, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of result.json. facts: what else is to stand in it, such as the number of processes."""
    return {
        "dataset": config.dataset,
        "seed": config.seed,
        "rounds": config.fedavg.num_rounds,
        **facts,
        "higher_is_better": better_when_higher(config.own_metrics),
        "model_sha256": outcome.model_sha256,
        "seconds": outcome.seconds,
        "phases": {
            phase.field: {"rounds": config.phases[phase].num_rounds, "seconds": outcome.phase_seconds[phase]}
            for phase in outcome.scores
        },
        **{
            result_key(phase, population): summarize(scores)
            for population in Population
            for phase, by_population in outcome.scores.items()
            if (scores := by_population.get(population))
        },
    }


def clients_csv(scores: RunScores, clients: ClientDirectory) -> bytes:
    """A row a scored client, those of each population in order of id, with its name where the data set names any.

    scores: of the same clients after each phase, whose name is the prefix of their columns.
    """
    rows = [
        (population, row)
        for population in Population
        for row in zip(*(by_population.get(population, ()) for by_population in scores.values()), strict=True)
    ]
    names = [client_name(clients, first.client_id) for _, (first, *_) in rows]
    has_names = any(name is not None for name in names)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [
        f"{result_key(phase)}_{kind}_{metric}"
        for phase, score in zip(scores, rows[0][1], strict=True)
        for kind in KINDS
        for metric in getattr(score, kind)
    ]
    writer.writerow(["client_id", "population", *(["client_name"] if has_names else []), *_COUNTS, *columns])
    for (population, row), name in zip(rows, names, strict=True):
        counts = [getattr(row[0], count) for count in _COUNTS]
        values = [value for score in row for kind in KINDS for value in getattr(score, kind).values()]
        named = [name] if has_names else []
        writer.writerow([row[0].client_id, population.value, *named, *counts, *values])
    return text.getvalue().encode()


def to_json(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    """JSON with a newline at its end, and null for each number that is not finite, which JSON does not know."""
    return (json.dumps(_without_nan(value), indent=indent, allow_nan=False) + "\n").encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
