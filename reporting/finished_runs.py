"""Finished runs, read back from their folders. Imports no torch: who reads results should not wait for it."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from perfedavg.plain_values import check_known_fields, from_plain, parse_json
from perfedavg.recording.runs import CONFIG_FILE, read_object
from perfedavg.settings import ExperimentConfig, Phase

KINDS = ("initial", "personalized")
"""Whose scores: the global model's, and those of the same model after a client has adapted it."""

_MEASURES = ("loss", "accuracy")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Scores:
    """Of unseen clients, uniform means, and the spread of the accuracy over clients. Accuracies are in 0..1.

    None stands for what is no number: any accuracy of a regression, a loss that overflowed.
    """

    loss: float | None
    accuracy: float | None
    accuracy_std: float | None
    accuracy_p10: float | None
    accuracy_p50: float | None
    accuracy_p90: float | None


@dataclass(frozen=True)
class EpochScores:
    """After so many epochs of personalization: uniform means over unseen clients, and population deviations."""

    epochs: int
    loss: float | None
    loss_std: float | None
    accuracy: float | None
    accuracy_std: float | None


@dataclass(frozen=True)
class PhaseResult:
    """How the unseen clients of a run fare after a phase.

    clients: how many they are.
    fraction_hurt: share of them whose score got worse by adapting, 0..1, or None where that is not known.
    by_epoch: of 0, 1, .. epochs of personalization; empty where that was not measured.
    """

    clients: int
    initial: Scores
    personalized: Scores
    fraction_hurt: float | None
    by_epoch: tuple[EpochScores, ...]


@dataclass(frozen=True)
class CurvePoint:
    """A point of the curve that a run draws while it trains, over the unseen clients of `--eval_clients`.

    round_number: counted from 1 over the whole run: those of phase 2 go on from those of phase 1.
    """

    round_number: int
    initial: Scores
    personalized: Scores


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended.

    settings: the experiment, as config.json holds it. Plain values instead of an `ExperimentConfig`, so that runs
        remain readable when later versions know more settings.
    result: what result.json says of the whole run (`model_sha256`, `seconds`, numbers of clients).
    environment: versions and commit.
    phases: the results after each phase, in their order; never empty.
    curve: None where metrics.jsonl is missing or damaged.
    clients: the columns of clients.csv, (num_unseen,) each; None where it is missing or damaged.
    problems: a line for each of the two that could not be read.
    """

    path: Path
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    environment: Mapping[str, Any]
    phases: Mapping[Phase, PhaseResult]
    curve: tuple[CurvePoint, ...] | None
    clients: Mapping[str, NDArray[np.float64]] | None
    problems: tuple[str, ...]

    @property
    def dataset(self) -> str:
        return str(self.settings["dataset"])

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    def client_scores(self, phase: Phase, kind: str, measure: str) -> NDArray[np.float64] | None:
        """A score of each unseen client, (num_unseen,), NaN where it is no number; None where they are not known."""
        return None if self.clients is None else self.clients[f"after_{phase.field}_{kind}_{measure}"]


def find_runs(path: Path) -> list[Path]:
    """The folder itself where it is a run's, else the folders of all runs below it, in order of their names.

    Raises ValueError where there is none, OSError where a folder cannot be read.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; name the folder of a run, or one that holds runs, such as runs")
    found = []
    for folder, subfolders, files in os.walk(path, onerror=_raise):
        if "config.json" in files or "result.json" in files:
            found.append(Path(folder))
            subfolders.clear()
        subfolders.sort()
    if not found:
        raise ValueError(
            f"no run was found in {path} or below it (a run's folder holds config.json and result.json); name the "
            "folder of a run, or one that holds runs"
        )
    return found


def read_finished_run(path: Path) -> FinishedRun:
    """Raises ValueError where the run has not ended, or its config.json or result.json is missing or damaged."""
    if not (path / "result.json").exists():
        raise ValueError(
            f"{path} holds a run that has not ended (there is no result.json); let it end; its log.txt says how it "
            "goes on"
        )
    config, result = _read_object(path / CONFIG_FILE), _read_object(path / "result.json")
    settings = _parse(path / CONFIG_FILE, lambda: _checked_settings(config["experiment"]))
    environment = _parse(path / CONFIG_FILE, lambda: from_plain(dict[str, Any], config.get("environment") or {}))
    phases = _parse(path / "result.json", lambda: _phase_results(_checked_result(result), _phases(settings)))
    curve, curve_problem = _try_parse(
        path / "metrics.jsonl", lambda file: _curve(file, settings["fedavg"]["num_rounds"])
    )
    clients, clients_problem = _try_parse(path / "clients.csv", lambda file: _clients(file, phases))
    problems = tuple(problem for problem in (curve_problem, clients_problem) if problem is not None)
    return FinishedRun(path, settings, result, environment, phases, curve, clients, problems)


def _raise(error: OSError) -> NoReturn:
    raise OSError(f"{error.filename} cannot be read ({error.strerror})") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path} is missing") from error


def _parse(path: Path, parse: Callable[[], Value]) -> Value:
    """What `parse` returns. Raises ValueError, naming the file, where its content is not what it should be."""
    try:
        return parse()
    except KeyError as error:
        raise ValueError(f"{path} is damaged (it lacks {error})") from error
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _try_parse(path: Path, parse: Callable[[Path], Value]) -> tuple[Value | None, str | None]:
    """What `parse` makes of the file, or None and the reason."""
    try:
        return _parse(path, lambda: parse(path)), None
    except FileNotFoundError:
        return None, f"{path} is missing"
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror})"
    except ValueError as error:
        return None, str(error)


def _checked_settings(settings: Any) -> dict[str, Any]:
    """The same. Raises ValueError where a setting has a wrong type or one that every report needs is not there.

    A run of another version may lack settings that this one knows, and have others.
    """
    check_known_fields(ExperimentConfig, settings)
    needed = ["fedavg", "fine_tune", "dataset", "seed", "cohort_size", "batch_size", "eval_every", "eval_clients"]
    _require(settings, needed)
    for phase in (settings["fedavg"], settings["fine_tune"]):
        if phase is not None:
            _require(phase, ["num_rounds", "num_local_epochs", "client_optimizer", "server_optimizer"])
            for whose in ("client_optimizer", "server_optimizer"):
                _require(phase[whose], ["name", "learning_rate"])
    for name in ("cohort_size", "batch_size", "eval_every", "eval_clients"):
        if settings[name] < 1:
            raise ValueError(f"{name} is {settings[name]}, must be 1 or more")
    return dict(settings)


def _require(values: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises KeyError where one of them is not there."""
    for name in names:
        values[name]


def _phases(settings: Mapping[str, Any]) -> list[Phase]:
    """Those after which the run was scored, as `ExperimentConfig.phases` tells them."""
    if settings["fine_tune"] is None:
        return [Phase.FEDAVG]
    return [Phase.FEDAVG, Phase.FINE_TUNE] if settings["fedavg"]["num_rounds"] else [Phase.FINE_TUNE]


@dataclass(frozen=True)
class _WholeRun:
    """What result.json says of a whole run."""

    train_clients: int
    unseen_clients: int
    seconds: float
    model_sha256: str


def _checked_result(result: dict[str, Any]) -> dict[str, Any]:
    """The same. Raises KeyError or ValueError where a fact of the whole run is not there, or of another type."""
    check_known_fields(_WholeRun, result)
    _require(result, [field.name for field in dataclasses.fields(_WholeRun)])
    return result


def _phase_results(result: Mapping[str, Any], phases: Sequence[Phase]) -> dict[Phase, PhaseResult]:
    return {phase: _phase_result(result[f"after_{phase.field}"]) for phase in phases}


def _phase_result(values: Mapping[str, Any]) -> PhaseResult:
    return PhaseResult(
        clients=from_plain(int, values["clients"], "clients"),
        initial=_scores(values["initial"]),
        personalized=_scores(values["personalized"]),
        fraction_hurt=_number(values["fraction_hurt"]),
        by_epoch=tuple(_epoch_scores(entry) for entry in values.get("by_epoch", [])),
    )


def _scores(values: Mapping[str, Any]) -> Scores:
    return Scores(**{field.name: _number(values[field.name]) for field in dataclasses.fields(Scores)})


def _epoch_scores(values: Mapping[str, Any]) -> EpochScores:
    measures = ("loss", "loss_std", "accuracy", "accuracy_std")
    return EpochScores(
        from_plain(int, values["epochs"], "epochs"), **{name: _number(values[name]) for name in measures}
    )


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = from_plain(float, value, "a score")
    return number if math.isfinite(number) else None


def _curve(path: Path, num_fedavg_rounds: int) -> tuple[CurvePoint, ...]:
    points = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = parse_json(line)
            evaluation = record["evaluation"]
            offset = {Phase.FEDAVG: 0, Phase.FINE_TUNE: num_fedavg_rounds}[Phase.of_field(record["phase"])]
            if evaluation is not None:
                scores = (_scores(evaluation[kind]) for kind in KINDS)
                round_number = from_plain(int, record["round_number"], "round_number")
                points.append(CurvePoint(offset + round_number, *scores))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number}: {error}") from error
    return tuple(points)


def _clients(path: Path, phases: Mapping[Phase, PhaseResult]) -> dict[str, NDArray[np.float64]]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ["num_train_examples"]
    names += [f"after_{phase.field}_{kind}_{measure}" for phase in phases for kind in KINDS for measure in _MEASURES]
    columns = {name: np.array([_cell(row[name]) for row in rows]) for name in names}
    for result in phases.values():
        if len(rows) != result.clients:
            raise ValueError(f"it has {len(rows)} rows, and result.json counts {result.clients} clients")
    return columns


def _cell(text: str | None) -> float:
    """Raises TypeError for the cells that a line lacks."""
    if text is None:
        raise TypeError("a line has too few cells")
    return float(text) if text else math.nan
