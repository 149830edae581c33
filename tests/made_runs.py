"""Finished runs that are made in memory, with scores as a test needs them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from helpers import make_config
from numpy.typing import NDArray

from perfedavg.methods import FedAvg
from perfedavg.recording.runs import FinishedRun, PhaseResult, RunResult, result_key
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig, Population

SGD = OptimizerConfig("sgd", 0.1)
Scores = Mapping[int, tuple[float, float]]
"""Initial and personalized accuracy by client."""


def experiment(method: Any = None, fine_tune: Any = None, **changes: Any) -> ExperimentConfig:
    phase = PhaseConfig(10, 5, SGD, SGD, method=method or FedAvg())
    second = None if fine_tune is None else dataclasses.replace(phase, method=fine_tune)
    return make_config(**{"fedavg": phase, "fine_tune": second, **changes})


def run(
    config: ExperimentConfig,
    unseen: Scores | None,
    trained: Scores | None = None,
    fingerprint: str = "data",
    name: str = "run",
) -> FinishedRun:
    """A finished run in memory, with these scores after its last phase, and half of them after the phase before."""
    given = {Population.UNSEEN: unseen, Population.TRAINED: trained}
    scored = {population: scores for population, scores in given.items() if scores is not None}
    clients: dict[Population, dict[str, NDArray[np.float64]]] = {}
    results: dict[Population, dict[Phase, PhaseResult]] = {}
    for population, scores in scored.items():
        values = np.array(list(scores.values()))
        clients[population] = {"client_id": np.array(list(scores), dtype=float)}
        for phase in config.phases:
            last = values if phase is max(config.phases) else values / 2
            for place, kind in enumerate(("initial", "personalized")):
                for metric in ("loss", "accuracy"):
                    clients[population][f"{result_key(phase)}_{kind}_{metric}"] = last[:, place]
            initial, personalized = ({"loss": mean, "accuracy": mean} for mean in last.mean(axis=0).tolist())
            hurt = float(np.mean(last[:, 1] < last[:, 0]))
            results.setdefault(population, {})[phase] = PhaseResult(len(scores), initial, personalized, hurt)
    names = {population: tuple(map(str, scores)) for population, scores in scored.items()}
    settings = json.loads(json.dumps(config.to_dict()))
    result = RunResult(8, len(unseen or ()), 1.0, "0" * 64, data_fingerprint=fingerprint)
    return FinishedRun(Path(name), settings, result, {}, results, (), clients, names, ())
