"""One trial: an experiment that is trained and scored in this process, and of which nothing is recorded."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from datasets.registry import find
from launch.flags import parse
from launch.settings import SingleProcess
from perfedavg.metrics import better_when_higher
from perfedavg.settings import ClientsConfig, ExperimentConfig, Phase, Population, flag

if TYPE_CHECKING:
    from perfedavg.contracts import FederatedDataset

_OBJECTIVE = re.compile(r"(?P<kind>initial|personalized)_(?P<metric>\w+?)(?P<percentile>_p10|_p50|_p90)?")
_LONG = 10_000
OnPoint = Callable[[int, Mapping[str, Any]], None]
"""Is told of a point of the curve: rounds so far, over all phases, and the summary of the clients' scores."""


class DivergedError(Exception):
    """A trial that cannot come to anything, with the reason."""


@dataclass(frozen=True)
class Objective:
    """What a trial is judged by: a mean, or a percentile, over the validation clients.

    kind: `initial` or `personalized`.  metric: such as `accuracy`, or `accuracy_p10` for the tenth percentile.
    """

    kind: str
    metric: str
    higher_is_better: bool

    @classmethod
    def read(cls, text: str | None, config: ExperimentConfig, dataset: FederatedDataset) -> Objective:
        """text: such as `personalized_accuracy`; None for that, or in a regression for `personalized_loss`.

        Raises ValueError where clients are not scored by that.
        """
        is_regression = dataset.client_data(scored_clients(dataset)[0]).test_labels.is_floating_point()
        text = text or f"personalized_{'loss' if is_regression else 'accuracy'}"
        better = better_when_higher(config.own_metrics)
        known = [name for name in better if not (is_regression and name == "accuracy")]
        found = _OBJECTIVE.fullmatch(text)
        if found is None or found["metric"] not in known:
            named = ", ".join(f"{kind}_{metric}" for kind in ("personalized", "initial") for metric in known)
            raise ValueError(f"--objective {text} is unknown; use one of {named}, or with _p10 behind it a percentile")
        return cls(found["kind"], f"{found['metric']}{found['percentile'] or ''}", better[found["metric"]])

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.metric}"

    def of(self, summary: Mapping[str, Any]) -> float:
        """Its value in a summary of scores. Raises DivergedError where that is no number."""
        value = summary[self.kind][self.metric]
        if value is None or not math.isfinite(value):
            raise DivergedError(f"{self.name} is no finite number")
        return float(value)

    def shown(self, value: float) -> str:
        if self.metric.startswith("accuracy"):
            return f"{100 * value:.2f} %"
        return f"{value:.4f}" if abs(value) < _LONG else f"{value:.3g}"


def scored_clients(dataset: FederatedDataset) -> Sequence[int]:
    """The validation clients."""
    return dataset.unseen_client_ids


class Trials:
    """Runs trials one after the other, on data that are read once as long as they are the same."""

    def __init__(self) -> None:
        self._read: tuple[object, FederatedDataset] | None = None

    def dataset(self, args: Any) -> FederatedDataset:
        """The experiment's data, with validation clients in place of the unseen ones."""
        config: ExperimentConfig = args.experiment
        names = [field.name for field in dataclasses.fields(ClientsConfig)]
        which = (args.data_root, *(getattr(config, name) for name in (*names, "joint", "validation")))
        if self._read is None or self._read[0] != which:
            self._read = which, utils.get_datasets(config, args.data_root)
        return self._read[1]

    def run(self, args: Any, states: Path, on_point: OnPoint) -> dict[str, Any]:
        """Train and score the experiment; returns the summary of the validation clients' scores after its last phase.

        states: a folder of the trial's own, for what clients keep between rounds; gone afterwards.
        on_point: may end the trial by an exception.
        Raises DivergedError where it cannot come to anything, ValueError where it cannot be run.
        """
        from perfedavg.engine.experiment import ExperimentState, experiment_rounds
        from perfedavg.engine.scores import summarize
        from perfedavg.recording.client_states import StateFiles
        from perfedavg.training.flat_model import flatten
        from perfedavg.training.layout import count_buffer_entries

        dataset = self.dataset(args)
        config, executor, model = utils.prepare_training(args, dataset)
        shutil.rmtree(states, ignore_errors=True)
        kept = StateFiles(states)
        try:
            state = ExperimentState.fresh(config, flatten(model), count_buffer_entries(model), kept)
            for number, record in enumerate(experiment_rounds(config, executor, dataset, state), 1):
                if len(record.refused) == len(record.client_ids):
                    raise DivergedError(f"every update of round {number} was refused")
                if record.evaluation is not None:
                    on_point(number, record.evaluation)
            (*_, last_phase) = config.phases
            return summarize(state.scores[last_phase][Population.UNSEEN])
        finally:
            kept.finish()
            shutil.rmtree(states, ignore_errors=True)


def trial_words(words: Sequence[str], seed: int, trial_rounds: int | None, num_points: int) -> list[str]:
    """The command line of a trial without what is searched: of single_process.py, with what a search sets.

    words: the experiment's own.  trial_rounds: of all phases together, or None for as many as the experiment has; never
    more than these.  num_points: of the curve.
    Where clients are drawn anew with each seed, those of another seed are as good as validation clients.
    Raises ValueError where the words make no experiment.
    """
    words = [*words, f"{flag('seed')}={seed}"]
    words += [f"{flag(field)}=0" for field in ("num_trained_scored", "num_curve_epochs")]  # which no trial needs
    config: ExperimentConfig = parse(SingleProcess, words).experiment
    if "validation" not in find(config.dataset).meaningless:
        words.append(f"{flag('validation')}=true")
    rounds = num_rounds(config)
    total = sum(rounds.values())
    if trial_rounds is not None and trial_rounds < total:
        left, left_before = trial_rounds, total
        for phase, number in rounds.items():
            rounds[phase] = max(1, round(left * number / left_before)) if number else 0
            left, left_before = left - rounds[phase], left_before - number
            words.append(f"{flag(f'{phase.field}.num_rounds')}={rounds[phase]}")
    return [*words, f"{flag('eval_every')}={max(1, sum(rounds.values()) // num_points)}"]


def num_rounds(config: ExperimentConfig) -> dict[Phase, int]:
    """Of a trial, by phase."""
    return {phase: settings.num_rounds for phase, settings in config.phases.items()}
