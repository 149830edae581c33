"""A run's folder: everything that is known of a run, written as it goes, each file whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from perfedavg.config import ExperimentConfig, Phase
from perfedavg.experiment import ExperimentOutcome, RoundRecord
from perfedavg.flat_model import unflatten_into
from perfedavg.plots import write_plots
from perfedavg.scores import ClientScore, summarize

LOGGER = logging.getLogger("perfedavg")

RESULT_KEYS = {Phase.FEDAVG: "after_fedavg", Phase.REPTILE: "after_fine_tune"}
"""The names in result.json and in clients.csv of the scores taken after each phase."""

_PACKAGES = ("fedlab", "torch", "torchvision", "numpy")


class RunFolder:
    """The folder of one run, and the observer that fills it.

    config.json    every setting, versions, commit, how the run was started
    metrics.jsonl  a line a round, flushed as the round ends
    clients.csv    a row an unseen client: its scores before and after personalization, after each phase
    result.json    the summary; written last, so a folder without it holds an unfinished run
    plots/         the accuracy curve, and the accuracy of unseen clients before and after, as PNG
    model.safetensors  the final global model
    log.txt        what was logged
    """

    def __init__(self, path: Path) -> None:
        """Create the folder and its log. Raises ValueError where it holds a run already or cannot be written."""
        self.path = path
        self._scores: dict[Phase, Sequence[ClientScore]] = {}
        self._curve: list[RoundRecord] = []
        if (path / "config.json").exists():
            raise ValueError(f"--run_dir {path} already holds a run; name another folder, or move that one away")
        try:
            path.mkdir(parents=True, exist_ok=True)
            log_handler = logging.FileHandler(path / "log.txt", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--run_dir {path} cannot be written ({error.strerror}); name another folder") from error
        log_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(log_handler)

    def write_config(self, config: ExperimentConfig, run_settings: dict[str, Any]) -> None:
        """Write config.json, from which on the folder holds a run.

        run_settings: what does not change the result (command, number of processes, devices).
        """
        settings = {"experiment": config.to_dict(), "run": run_settings, "environment": _environment()}
        self._write("config.json", _json(settings))

    def phase_started(self, phase: Phase, num_rounds: int) -> None:
        LOGGER.info("%s: %d rounds", phase.label, num_rounds)

    def round_ended(self, record: RoundRecord) -> None:
        line = {**dataclasses.asdict(record), "phase": phase_name(record.phase)}
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(line) + "\n")
        if record.evaluation is not None:
            self._curve.append(record)

    def scoring_started(self, phase: Phase, num_clients: int) -> None:
        LOGGER.info("%s: scoring %d unseen clients", phase.label, num_clients)

    def phase_ended(self, phase: Phase, scores: Sequence[ClientScore]) -> None:
        self._scores[phase] = scores
        self._write("clients.csv", _clients_csv(self._scores))

    def write_result(
        self, config: ExperimentConfig, outcome: ExperimentOutcome, model: nn.Module, facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Write model, plots and result.json, and return the latter's content. `model` takes the final parameters.

        facts: what else is to stand in result.json, such as the number of processes.
        """
        unflatten_into(model, outcome.parameters.clone())
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        metadata = {"dataset": config.dataset, "architecture": config.architecture, "format": "pt"}
        self._write("model.safetensors", safetensors.torch.save(state, metadata))
        write_plots(self.path / "plots", self._curve, outcome.scores)
        result: dict[str, Any] = {
            "dataset": config.dataset,
            "seed": config.seed,
            "rounds": config.fedavg.num_rounds,
            **facts,
            "model_sha256": outcome.model_sha256,
            "seconds": outcome.seconds,
            "phases": {
                phase_name(phase): {
                    "rounds": config.phases[phase].num_rounds,
                    "seconds": outcome.phase_seconds[phase],
                }
                for phase in outcome.scores
            },
        }
        for phase, scores in outcome.scores.items():
            result[RESULT_KEYS[phase]] = summarize(scores)
        self._write("result.json", _json(result))
        return result

    def _write(self, name: str, content: bytes) -> None:
        """Replace a file in one step, so that a reader or a crash never sees half of it."""
        temporary = self.path / f".{name}.{os.getpid()}"
        temporary.write_bytes(content)
        os.replace(temporary, self.path / name)


def phase_name(phase: Phase) -> str:
    """The phase's name in files: `fedavg` or `fine_tune`, like the fields of ExperimentConfig."""
    return {Phase.FEDAVG: "fedavg", Phase.REPTILE: "fine_tune"}[phase]


def make_default_folder(parent: Path, dataset: str) -> Path:
    """Create `<parent>/<date-time>-<dataset>`, with a number behind it where another run has just taken that."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{dataset.replace(':', '.')}"
    for number in itertools.count(1):
        path = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The project's commit, with `+changes` where the work tree differs from it; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _clients_csv(scores: dict[Phase, Sequence[ClientScore]]) -> bytes:
    """A row an unseen client, in order of id; the scores' columns are prefixed with the phase they were taken after."""
    identity = ("client_id", "num_train_examples", "num_test_examples")
    measured = ("initial_loss", "initial_accuracy", "personalized_loss", "personalized_accuracy")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*identity, *(f"{RESULT_KEYS[phase]}_{name}" for phase in scores for name in measured)])
    for rows in zip(*scores.values(), strict=True):
        values = [getattr(row, name) for row in rows for name in measured]
        writer.writerow([*(getattr(rows[0], name) for name in identity), *values])
    return text.getvalue().encode()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
