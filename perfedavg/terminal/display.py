"""What a person sees on the terminal: one line of progress while a run goes on, a table when it has ended."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

from perfedavg.engine.experiment import ExperimentState, RoundRecord
from perfedavg.engine.scores import RunScores, summarize
from perfedavg.recording.runs import result_key
from perfedavg.settings import ExperimentConfig, Phase, Population
from perfedavg.terminal.console import LOGGER, is_live, reason_of

if TYPE_CHECKING:
    from tqdm import tqdm

_Method = TypeVar("_Method", bound=Callable[..., None])


def _costs_nothing(method: _Method) -> _Method:
    """Let what a method of a display fails at (tqdm takes settings from the environment, say) be in the log alone."""

    @functools.wraps(method)
    def shown(*args: Any) -> None:
        try:
            method(*args)
        except Exception as error:
            LOGGER.warning("progress cannot be shown: %s", reason_of(error))

    return cast(_Method, shown)


class ProgressDisplay:
    """An observer that shows phase, round, time left and the latest accuracies of unseen clients.

    On a terminal it is one line that is redrawn; elsewhere (a file, a pipe) a line for each point of the curve.
    Nothing that it fails at ends the run.
    """

    def __init__(self, config: ExperimentConfig, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._phases = config.phases
        self._rounds_here = 0  # in this process: a run that goes on has more behind it
        self._rounds_left = 0
        self._started = time.monotonic()
        self._bar: tqdm[Any] | None = None

    @_costs_nothing
    def phase_started(self, phase: Phase, num_rounds: int, num_recorded: int) -> None:
        to_come = sum(settings.num_rounds for later, settings in self._phases.items() if later >= phase)
        self._rounds_left = to_come - num_recorded
        if is_live(self._stream):
            from tqdm import tqdm

            self._bar = tqdm(
                total=num_rounds,
                initial=num_recorded,
                desc=phase.label,
                unit="round",
                file=self._stream,
                bar_format="{desc} {n_fmt}/{total_fmt} |{bar:24}| {elapsed}, {remaining} left{postfix}",
            )

    @_costs_nothing
    def round_ended(self, record: RoundRecord) -> None:
        self._rounds_here += 1
        self._rounds_left -= 1
        accuracies = None if record.evaluation is None else _accuracies(record.evaluation)
        if self._bar is not None:
            if accuracies is not None:
                self._bar.set_postfix_str(accuracies, refresh=False)
            self._bar.update()
        elif accuracies is not None:
            elapsed = time.monotonic() - self._started
            left = elapsed / self._rounds_here * self._rounds_left
            num_rounds = self._phases[record.phase].num_rounds
            line = f"{record.phase.label} round {record.round_number}/{num_rounds}: {accuracies}, "
            print(f"{line}{elapsed:.0f} s elapsed, about {left:.0f} s left", file=self._stream, flush=True)

    @_costs_nothing
    def scoring_started(self, phase: Phase, population: Population, num_clients: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"scoring {num_clients} {population.value} clients")

    def checkpoint_due(self, state: ExperimentState) -> None:
        pass

    @_costs_nothing
    def phase_ended(self, phase: Phase, scores: RunScores) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(_accuracies(summarize(scores[phase][Population.UNSEEN])))
            self._bar.close()
            self._bar = None


def result_table(result: dict[str, Any], note: str = "") -> str:
    """The table that ends a run, from the content of result.json. note: about the data."""
    lines = [
        f"{result['unseen_clients']} unseen clients of {result['dataset']}, uniform means",
        *([note] if note else []),
        "",
        f"{'':19}{'initial':^20}{'personalized':^20}{'clients':>9}",
        f"{'':19}{'loss':>9}{'accuracy':>11}{'loss':>9}{'accuracy':>11}{'hurt':>9}",
    ]
    for phase in Phase:
        if result_key(phase) in result:
            row, label = result[result_key(phase)], f"after {phase.label}"
            numbers = "".join(
                f"{row[kind]['loss']:>9.4f}{_percent(row[kind]['accuracy']):>11}"
                for kind in ("initial", "personalized")
            )
            lines.append(f"{label:19}{numbers}{100 * row['fraction_hurt']:>7.1f} %")
    lines += ["", f"model sha256 {result['model_sha256']}, seed {result['seed']}, {result['seconds']:.1f} s"]
    return "\n".join(lines)


def _percent(accuracy: float) -> str:
    """An accuracy, or a dash where there is none, in a regression."""
    return "-" if math.isnan(accuracy) else f"{100 * accuracy:.2f} %"


def _accuracies(summary: dict[str, Any]) -> str:
    initial, personalized = (summary[kind]["accuracy"] for kind in ("initial", "personalized"))
    if math.isnan(initial):
        return f"initial loss {summary['initial']['loss']:.4f}, personalized {summary['personalized']['loss']:.4f}"
    return f"initial {100 * initial:.1f} %, personalized {100 * personalized:.1f} %"
