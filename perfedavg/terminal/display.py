"""What a person sees on the terminal: one line of progress while a run goes on, a table when it has ended."""

from __future__ import annotations

import functools
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

from perfedavg.contracts import ClientDirectory
from perfedavg.engine.experiment import ExperimentState, RoundRecord
from perfedavg.engine.scores import RunScores, confidence_95, summarize
from perfedavg.own_files import shown_dataset
from perfedavg.recording.runs import KINDS, result_key
from perfedavg.settings import ExperimentConfig, Phase, Population
from perfedavg.terminal.console import LOGGER, duration, is_live, reason_of, say
from perfedavg.terminal.time_to_go import TimeToGo, describe_dear_methods

if TYPE_CHECKING:
    from tqdm import tqdm

SILENCE_SECONDS = 30.0
"""Where lines are printed, there is one at least so often."""
BAR_SECONDS = 2.0
"""So often the line on a terminal is drawn again."""
_Method = TypeVar("_Method", bound=Callable[..., None])


def _costs_nothing(method: _Method) -> _Method:
    """Let what a method of a display fails at (tqdm takes settings from the environment, say) be in the log alone."""

    @functools.wraps(method)
    def shown(self: ProgressDisplay, *args: Any) -> None:
        try:
            with self._lock:
                method(self, *args)
        except Exception as error:
            LOGGER.warning("progress cannot be shown: %s", reason_of(error))

    return cast(_Method, shown)


class ProgressDisplay:
    """An observer that shows phase, round, time to go and the latest accuracies of the clients of the curve.

    On a terminal it is one line that is redrawn; elsewhere (a file, a pipe) a line for each point of the curve, and one
    where there was none for a while. First it says which methods take long. Nothing that it fails at ends the run. Used
    with `with`.
    """

    def __init__(self, config: ExperimentConfig, clients: ClientDirectory, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._config = config
        self._phases = config.phases
        self._population = Population.main(len(clients.unseen_client_ids))
        self._time = TimeToGo(config, clients)
        self._prices = describe_dear_methods(config, clients)
        self._phase = next(iter(self._phases))
        self._num_rounds = 0  # of the phase, that have ended
        self._scored: list[Population] = []
        self._scoring: Population | None = None  # what is under way, if it is not a round
        self._accuracies = ""
        self._started = self._since = self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._show_now_and_then, name="progress", daemon=True)

    def __enter__(self) -> ProgressDisplay:
        for line in self._prices:
            say(line)
        self._clock.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._clock.join()
        if self._bar is not None:
            self._bar.close()

    @_costs_nothing
    def phase_started(self, phase: Phase, num_rounds: int, num_recorded: int) -> None:
        self._phase, self._num_rounds, self._scored, self._scoring = phase, num_recorded, [], None
        self._since = time.monotonic()
        if is_live(self._stream):
            from tqdm import tqdm

            self._bar = tqdm(
                total=num_rounds,
                initial=num_recorded,
                desc=self._config.phase_label(phase),
                file=self._stream,
                bar_format="{desc} {n_fmt}/{total_fmt} |{bar:24}| {elapsed}{postfix}",
            )

    @_costs_nothing
    def round_ended(self, record: RoundRecord) -> None:
        now = time.monotonic()
        if self._scoring is not None:
            self._end_scoring(now)
        elif record.evaluation is not None:
            self._time.add_point(max(0.0, now - self._since - record.seconds))
        self._time.add_round(record.phase, record.seconds)
        self._num_rounds, self._since = record.round_number, now
        if record.evaluation is not None:
            self._accuracies = _accuracies(record.evaluation)
        if self._bar is not None:
            self._draw_bar(refresh=False)
            self._bar.update(record.round_number - self._bar.n)
        elif record.evaluation is not None:
            self._print_line()

    @_costs_nothing
    def scoring_started(self, phase: Phase, population: Population, num_clients: int) -> None:
        now = time.monotonic()
        self._time.expect_scoring(population, num_clients)
        if self._scoring is not None:
            self._end_scoring(now)
        self._scoring, self._since, self._num_rounds = population, now, self._phases[phase].num_rounds
        if self._bar is not None:
            self._draw_bar()

    def checkpoint_due(self, state: ExperimentState) -> None:
        pass

    @_costs_nothing
    def phase_ended(self, phase: Phase, scores: RunScores) -> None:
        if self._scoring is not None:
            self._end_scoring(time.monotonic())
        if self._bar is not None:
            self._bar.set_postfix_str(_accuracies(summarize(scores[phase][self._population])))
            self._bar.close()
            self._bar = None

    def _end_scoring(self, now: float) -> None:
        assert self._scoring is not None, "clients are being scored"
        self._time.add_scoring(self._scoring, now - self._since)
        self._scored.append(self._scoring)
        self._scoring, self._since = None, now

    def _show_now_and_then(self) -> None:
        while not self._ended.wait(self._seconds_to_tick()):
            self._tick()

    def _seconds_to_tick(self) -> float:
        is_quiet_for = time.monotonic() - self._last_line
        return BAR_SECONDS if is_live(self._stream) else max(0.0, SILENCE_SECONDS - is_quiet_for)

    @_costs_nothing
    def _tick(self) -> None:
        """Show how the time goes by, where nothing else has shown anything for a while."""
        if self._bar is not None:
            self._draw_bar()
        elif time.monotonic() - self._last_line >= SILENCE_SECONDS:
            self._print_line()

    def _draw_bar(self, refresh: bool = True) -> None:
        assert self._bar is not None, "there is one"
        parts = [self._time_left(), self._activity(), self._accuracies]
        self._bar.set_postfix_str(", ".join(part for part in parts if part), refresh)

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        place = (
            f"{self._config.phase_label(self._phase)} round {self._num_rounds}/{self._phases[self._phase].num_rounds}"
        )
        parts = [self._activity(), self._accuracies, f"{duration(self._last_line - self._started)} elapsed"]
        parts += [self._time_left()]
        print(f"{place}: {', '.join(part for part in parts if part)}", file=self._stream, flush=True)

    def _activity(self) -> str:
        return "" if self._scoring is None else f"scoring {self._scoring.value} clients"

    def _time_left(self) -> str:
        """Empty where it cannot be told yet. What is under way counts by the time that it was expected to take."""
        left = self._time.of_run(self._phase, self._num_rounds, self._scored)
        if left is None:
            return ""
        expected = self._time.of_scoring(self._scoring) if self._scoring else self._time.of_round(self._phase)
        return f"about {duration(left - min(time.monotonic() - self._since, expected or 0.0))} to go"


def result_table(result: dict[str, Any], config: ExperimentConfig, note: str = "") -> str:
    """The table that ends a run, from the content of result.json. note: about the data."""
    widths = {metric: 16 if metric == "accuracy" else max(9, len(metric) + 2) for metric in result["higher_is_better"]}
    width = sum(widths.values())
    names = "".join(f"{metric:>{width}}" for metric, width in widths.items())
    population, trained = Population.main(result["unseen_clients"]), _result_keys(result, Population.TRAINED)
    of_training = ""
    for key in list(trained.values())[:1]:
        of_training = f"{result[key]['clients']} of {result['train_clients']} training clients"
    whose = f"{result['unseen_clients']} unseen clients" if population is Population.UNSEEN else of_training
    lines = [
        f"{whose} of {shown_dataset(result['dataset'])}, uniform means ± 95 % intervals over clients",
        *([note] if note else []),
        "",
        f"{'':19}{'initial':^{width}}{'personalized':^{width}}{'clients':>9}",
        f"{'':19}{names}{names}{'hurt':>9}",
        *_result_rows(result, config, population, widths),
    ]
    if trained and population is Population.UNSEEN:
        lines += ["", of_training, *_result_rows(result, config, Population.TRAINED, widths)]
    lines += ["", f"model sha256 {result['model_sha256']}, seed {result['seed']}, {result['seconds']:.1f} s"]
    return "\n".join(lines)


def _result_rows(
    result: dict[str, Any], config: ExperimentConfig, population: Population, widths: Mapping[str, int]
) -> list[str]:
    """A line a phase. widths: of the columns, by metric."""
    lines = []
    for phase, key in _result_keys(result, population).items():
        row = result[key]
        label = f"after {config.phase_label(phase)}" if config.phases[phase].num_rounds else "untrained"
        numbers = "".join(
            f"{_accuracy(row, kind) if metric == 'accuracy' else format(row[kind][metric], '.4f'):>{width}}"
            for kind in KINDS
            for metric, width in widths.items()
        )
        lines.append(f"{label:19}{numbers}{100 * row['fraction_hurt']:>7.1f} %")
    return lines


def _result_keys(result: dict[str, Any], population: Population) -> dict[Phase, str]:
    keys = {phase: result_key(phase, population) for phase in Phase}
    return {phase: key for phase, key in keys.items() if key in result}


def _accuracy(summary: Mapping[str, Any], kind: str) -> str:
    """A mean accuracy, of several clients with its interval; a dash where there is none, in a regression."""
    accuracy, num_clients = summary[kind]["accuracy"], summary["clients"]
    if math.isnan(accuracy):
        return "-"
    interval = confidence_95(summary[kind]["accuracy_std"], num_clients)
    return f"{100 * accuracy:.2f}{f' ± {100 * interval:.1f}' if num_clients > 1 else ''} %"


def _accuracies(summary: dict[str, Any]) -> str:
    initial, personalized = (summary[kind]["accuracy"] for kind in ("initial", "personalized"))
    if math.isnan(initial):
        return f"initial loss {summary['initial']['loss']:.4f}, personalized {summary['personalized']['loss']:.4f}"
    return f"initial {100 * initial:.1f} %, personalized {100 * personalized:.1f} %"
