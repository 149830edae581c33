"""Recorded runs, read back from their folders: the one reader of what a `RunFolder` writes. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from perfedavg.metrics import BASIC_METRICS
from perfedavg.own_module import OwnModuleError
from perfedavg.plain_values import from_plain, parse_json
from perfedavg.settings import ExperimentConfig, Phase, Population

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from perfedavg.recording.model_file import ModelFacts

CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
METRICS_FILE = "metrics.jsonl"
CLIENTS_FILE = "clients.csv"
MODEL_FILE = "model.safetensors"
CLIENT_STATES_FOLDER = "client_states"
INITIAL_MODEL = "initial_model_path"

KINDS = ("initial", "personalized")
"""Scores of the global model, and of the same model after a client has adapted it."""


@dataclass(frozen=True)
class RecordedRun:
    """A run that has begun, as its config.json tells of it.

    initial_model: the file or the run that its initial model was read from, or None.
    environment: versions and commit.
    content: the whole file.
    """

    folder: Path
    initial_model: Path | None
    environment: Mapping[str, Any]
    content: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> RecordedRun:
        """Raises ValueError where the folder holds no run, or its config.json cannot be read or is damaged."""
        path = folder / CONFIG_FILE
        if not path.exists():
            raise ValueError(f"{folder} is not the folder of a run (it has no {CONFIG_FILE})")
        content = read_object(path)
        with _naming(path):
            environment = from_plain(dict[str, Any], content.get("environment") or {}, "environment")
            initial_model = from_plain(str, content.get(INITIAL_MODEL) or "", INITIAL_MODEL)
        return cls(folder, Path(initial_model) if initial_model else None, environment, content)

    def experiment(self, ignore_unknown: bool = False) -> ExperimentConfig:
        """All settings of the experiment, none of them open.

        ignore_unknown: read a later version's run without the settings that this version does not know, and a user's
            own method without its code, which then does nothing.
        Raises ValueError, naming the setting that is damaged, or the user's own code that is not at hand.
        """
        try:
            if "flags" in self.content:
                raise ValueError("it has flags, as runs of earlier versions")
            values = from_plain(dict[str, Any], self.content.get("experiment"), "experiment")
            experiment = from_plain(ExperimentConfig, values, ignore_unknown=ignore_unknown)
            if not experiment.is_settled:
                raise ValueError("its client_batching or initial_model is not settled")
            return experiment
        except OwnModuleError:
            raise  # the file is good
        except ValueError as error:
            path = self.folder / CONFIG_FILE
            raise ValueError(f"{path} is damaged, or of another version of this project ({error})") from error

    @property
    def has_ended(self) -> bool:
        return (self.folder / RESULT_FILE).exists()

    def check_ended(self) -> None:
        """Raises ValueError where the run has no result yet."""
        if not self.has_ended:
            raise ValueError(
                f"{self.folder} holds a run that has not ended (there is no {RESULT_FILE}); log.txt says how it goes on"
            )

    def model(self) -> tuple[dict[str, Tensor], ModelFacts]:
        """The final parameters by name, and what is said of the model. Imports torch. Raises ValueError."""
        from perfedavg.recording.model_file import read_model_file

        return read_model_file(self.folder / MODEL_FILE)

    def client_state(self, client_id: int) -> dict[str, Tensor]:
        """What a client keeps at the end of the run; empty where it keeps nothing. Imports torch. Raises ValueError."""
        from perfedavg.recording.client_states import read_final_state

        return read_final_state(self.folder / CLIENT_STATES_FOLDER, client_id)


def _with_basic_metrics(scores: dict[str, float | None], name: str) -> dict[str, float | None]:
    for metric in BASIC_METRICS:
        if metric not in scores:
            raise ValueError(f"it lacks {name}.{metric}")
    return scores


Scores = Annotated[dict[str, float | None], _with_basic_metrics]
"""What `scores.summarize` says of some clients: means by metric, deviations and percentiles. Accuracies are in 0..1.

None stands for what is no number: any accuracy of a regression, a loss that overflowed. Runs of earlier versions lack
percentiles of losses.
"""


@dataclass(frozen=True)
class PhaseResult:
    """How the clients of a population fare after a phase.

    clients: their number.
    fraction_hurt: share of them whose score got worse by adapting, 0..1; None where that is not known.
    by_epoch: after 0, 1, .. epochs of personalization; empty where that was not measured.
    """

    clients: int
    initial: Scores
    personalized: Scores
    fraction_hurt: float | None
    by_epoch: tuple[Scores, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """What result.json says of a whole run, and of its phases.

    seconds: wall time over all processes that took part in it.
    data_fingerprint: see `contracts.ClientDirectory`; empty where it is not known.
    higher_is_better: by metric; runs of earlier versions have loss and accuracy alone.
    """

    train_clients: int
    unseen_clients: int
    seconds: float
    model_sha256: str
    after_fedavg: PhaseResult | None = None
    after_fine_tune: PhaseResult | None = None
    trained_after_fedavg: PhaseResult | None = None
    trained_after_fine_tune: PhaseResult | None = None
    data_fingerprint: str = ""
    higher_is_better: dict[str, bool] = field(default_factory=BASIC_METRICS.copy)


@dataclass(frozen=True)
class CurvePoint:
    """A point of the curve that a run draws while it trains, over some clients of its main population.

    round_number: counted from 1 over the whole run; those of phase 2 go on from those of phase 1.
    clients: their number, `--eval_clients` at most.
    training_seconds: what the rounds up to this one took, without evaluation; None where it was not kept.
    """

    phase: Phase
    round_number: int
    clients: int
    initial: Scores
    personalized: Scores
    training_seconds: float | None = None


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended.

    settings: the experiment as plain values, as config.json holds it.
    environment: versions and commit.
    results: of each population that was scored, after each phase in their order. The main one always is.
    curve: None where metrics.jsonl is missing or damaged.
    clients: of each population, the columns of figures in clients.csv, (num_clients,) each; None where it is missing or
        damaged.
    client_names: of each population, what the data set calls the clients, or their numbers; as `clients`.
    problems: a line for each of the two that could not be read.
    """

    path: Path
    settings: Mapping[str, Any]
    result: RunResult
    environment: Mapping[str, Any]
    results: Mapping[Population, Mapping[Phase, PhaseResult]]
    curve: tuple[CurvePoint, ...] | None
    clients: Mapping[Population, Mapping[str, NDArray[np.float64]]] | None
    client_names: Mapping[Population, tuple[str, ...]] | None
    problems: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """Raises ValueError where the run has not ended, or its config.json or result.json is missing or damaged."""
        run = RecordedRun.read(folder)
        run.check_ended()
        experiment = run.experiment(ignore_unknown=True)
        result, results = _read_result(folder / RESULT_FILE, list(experiment.phases))
        curve, clients, names, problems = None, None, None, []
        try:
            curve = _read_curve(folder, experiment.fedavg.num_rounds)
        except ValueError as error:
            problems.append(str(error))
        try:
            clients, names = _read_clients(folder / CLIENTS_FILE, results, list(result.higher_is_better))
        except ValueError as error:
            problems.append(str(error))
        settings = json.loads(json.dumps(experiment.to_dict()))
        return cls(folder, settings, result, run.environment, results, curve, clients, names, tuple(problems))

    @property
    def population(self) -> Population:
        """The main one: unseen clients or, where the run has none, those that trained."""
        return Population.main(self.result.unseen_clients)

    @property
    def phases(self) -> Mapping[Phase, PhaseResult]:
        """How the clients of the main population fare after each phase; never empty."""
        return self.results[self.population]

    def best_point(self, kind: str, metric: str = "accuracy", phase: Phase | None = None) -> CurvePoint | None:
        """The point of the curve with the best mean, and of several the first. It is chosen by the scores that it is
        reported by, as where others publish the best round's figure, and so looks better than it is.

        kind: of KINDS.  phase: by default the whole run.
        None without a curve, and where the metric is no number at any point of it.
        """
        sign = 1 if self.result.higher_is_better[metric] else -1
        points = [point for point in self.curve or () if phase in (None, point.phase)]
        scored = [(sign * value, point) for point in points if (value := getattr(point, kind).get(metric)) is not None]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None

    @property
    def dataset(self) -> str:
        return str(self.settings["dataset"])

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    def client_scores(
        self, phase: Phase, kind: str, metric: str, population: Population | None = None
    ) -> NDArray[np.float64] | None:
        """A score of each client of a population, by default the main one, (num_clients,), NaN where it is no number.

        None where they are not known.
        """
        columns = (self.clients or {}).get(population or self.population)
        return None if columns is None else columns.get(f"{result_key(phase)}_{kind}_{metric}")


def result_key(phase: Phase, population: Population = Population.UNSEEN) -> str:
    """What the scores after a phase are called in result.json; without a population also in columns of clients.csv."""
    return f"{'' if population is Population.UNSEEN else f'{population.value}_'}after_{phase.field}"


def find_runs(path: Path) -> list[Path]:
    """The folder itself where it is a run's, else the folders of all runs below it, in order of their names.

    Raises ValueError where there is none, OSError where a folder cannot be read.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; name the folder of a run, or one that holds runs, such as runs")
    found = []
    for folder, subfolders, files in os.walk(path, onerror=_raise_unreadable):
        if CONFIG_FILE in files or RESULT_FILE in files:
            found.append(Path(folder))
            subfolders.clear()
        subfolders.sort()
    if not found:
        raise ValueError(
            f"no run was found in {path} or below it (a run's folder holds {CONFIG_FILE} and {RESULT_FILE}); name the "
            "folder of a run, or one that holds runs"
        )
    return found


def _raise_unreadable(error: OSError) -> NoReturn:
    raise OSError(f"{error.filename} cannot be read ({error.strerror})") from error


def read_unfinished_run(folder: Path) -> RecordedRun:
    """The run that --resume goes on with. Raises ValueError where there is none, or it has ended or is damaged."""
    try:
        run = RecordedRun.read(folder)
    except ValueError as error:
        raise ValueError(
            f"--resume {error}; name another folder, such as runs/<date-time>-<dataset>, or start a new run"
        ) from error
    if run.has_ended:
        raise ValueError(
            f"--resume {folder}: that run has ended, its result is in {RESULT_FILE}; to train its model further, start "
            f"a new run with --initial_model {folder}"
        )
    return run


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, where there is none."""
    with _naming(path):
        return from_plain(dict[str, Any], parse_json(path.read_bytes()))


def read_metrics(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl, and what each says of its round.

    Raises ValueError at the first one that is damaged, such as half a line that a killed process left, or where there
    is no such file.
    """
    path = folder / METRICS_FILE
    with _naming(path), open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith("\n"):
                    raise ValueError("it is cut short")
                values = from_plain(dict[str, Any], parse_json(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield line.removesuffix("\n"), values


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let whatever is wrong with a file be a ValueError that names it."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path} is missing") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _read_result(path: Path, phases: Sequence[Phase]) -> tuple[RunResult, dict[Population, dict[Phase, PhaseResult]]]:
    values = read_object(path)
    with _naming(path):
        result = from_plain(RunResult, values, ignore_unknown=True)
        results: dict[Population, dict[Phase, PhaseResult]] = {}
        for population in Population:
            after = {phase: getattr(result, result_key(phase, population)) for phase in phases}
            missing = [phase for phase, one in after.items() if one is None]
            if not missing:
                results[population] = after
            elif population is Population.main(result.unseen_clients) or len(missing) < len(phases):
                raise ValueError(f"it lacks {result_key(missing[0], population)}")
    return result, results


@dataclass(frozen=True)
class _Round:
    """seconds: of the round alone.  training_seconds: up to the end of it, where lines before it were left out."""

    phase: str
    round_number: int
    evaluation: PhaseResult | None
    seconds: float | None = None
    training_seconds: float | None = None


def _read_curve(folder: Path, num_fedavg_rounds: int) -> tuple[CurvePoint, ...]:
    offsets = {Phase.FEDAVG.field: 0, Phase.FINE_TUNE.field: num_fedavg_rounds}
    points = []
    seconds: float | None = 0.0
    for number, (_, values) in enumerate(read_metrics(folder), start=1):
        with _naming(folder / METRICS_FILE):
            try:
                record = from_plain(_Round, values, ignore_unknown=True)
                if record.phase not in offsets:
                    raise ValueError(f"phase is {record.phase!r}, must be {' or '.join(offsets)}")
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
        round_number = offsets[record.phase] + record.round_number
        if seconds is None or record.seconds is None or number != round_number:
            seconds = record.training_seconds  # lines of rounds before it were left out
        else:
            seconds += record.seconds
        if record.evaluation is not None:
            phase, scored = Phase.of_field(record.phase), record.evaluation
            points.append(CurvePoint(phase, round_number, scored.clients, scored.initial, scored.personalized, seconds))
    return tuple(points)


def _read_clients(
    path: Path, results: Mapping[Population, Mapping[Phase, PhaseResult]], metrics: Sequence[str]
) -> tuple[dict[Population, dict[str, NDArray[np.float64]]], dict[Population, tuple[str, ...]]]:
    import numpy as np

    phases = next(iter(results.values()))
    names = ["client_id", "num_train_examples"]
    names += [f"{result_key(phase)}_{kind}_{metric}" for phase in phases for kind in KINDS for metric in metrics]
    with _naming(path), open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for name in names:
            if name not in (reader.fieldnames or ()):
                raise ValueError(f"it lacks {name}")
        rows = list(reader)
        columns, called = {}, {}
        for population, by_phase in results.items():
            # Runs of earlier versions scored unseen clients alone, and do not say so.
            own = [row for row in rows if row.get("population", Population.UNSEEN.value) == population.value]
            columns[population] = {name: np.array([_cell(row[name]) for row in own]) for name in names}
            called[population] = tuple(row.get("client_name") or str(row["client_id"]) for row in own)
            for result in by_phase.values():
                if len(own) != result.clients:
                    raise ValueError(f"it has {len(own)} rows, and {RESULT_FILE} counts {result.clients} clients")
    return columns, called


def _cell(text: str | None) -> float:
    if text is None:
        raise ValueError("a line has too few cells")
    return float(text) if text else math.nan
