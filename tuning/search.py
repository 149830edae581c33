"""A search from its first trial to its choice, told line by line."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.commands import flag_words
from launch.flags import parse
from launch.settings import SingleProcess
from perfedavg.fields import to_plain
from perfedavg.terminal.console import command_line, duration, quiet, show
from tuning.space import Dimension, default_texts, read_space, with_effect
from tuning.study import Ended, PrunedError, Study, Trial
from tuning.trial import DivergedError, Objective, Trials, num_rounds, scored_clients, trial_words


@dataclass(frozen=True)
class Plan:
    """A search as it is asked for.

    label: what a person calls it.
    words: the experiment's command line, without what the search sets.
    fixed: flags that no search may change.
    searches: as `--search` takes them; none for the ranges of interest.
    objective: as `--objective` takes it; None for the one that fits the data.
    num_trials: the experiment as it is among them.  trial_rounds: see `trial.trial_words`.
    folder: of the study.
    """

    label: str
    words: Sequence[str]
    fixed: Sequence[str]
    searches: Sequence[str]
    objective: str | None
    num_trials: int
    trial_rounds: int | None
    num_points: int
    seed: int
    folder: Path


@dataclass(frozen=True)
class Choice:
    """What a search came to.

    settings: the best trial's, as texts by flag; where the experiment as it is is best, its own.
    summary: of the study, fit for JSON and TOML.
    """

    settings: dict[str, str]
    summary: dict[str, Any]


def search(plan: Plan, trials: Trials) -> Choice | None:
    """Run the trials of a plan that are left, and tell what they chose; None where other processes still run some.

    Raises ValueError where the search cannot be: the experiment, the space or the folder.
    """
    return _Search(plan, trials).run()


class _Search:
    def __init__(self, plan: Plan, trials: Trials) -> None:
        """Raises ValueError as `search` does."""
        self._plan = plan
        self._trials = trials
        self._words = trial_words(plan.words, plan.seed, plan.trial_rounds, plan.num_points)
        args = parse(SingleProcess, self._words)
        self._config = args.experiment
        self._space = read_space(plan.searches, self._config, plan.fixed)
        if not self._space:
            raise ValueError(f"{plan.label} has no setting with a range of interest; name some with --search")
        self._dataset = trials.dataset(args)
        self._objective = Objective.read(plan.objective, self._config, self._dataset)
        self._rounds = num_rounds(self._config)
        self._study = Study(
            plan.folder,
            self._space,
            self._config,
            self._identity(args.initial_model),
            plan.seed,
            self._objective.higher_is_better,
            sum(self._rounds.values()) // 3,
        )

    def run(self) -> Choice | None:
        plan = self._plan
        try:
            show(self._heading())
            started, num_done = time.monotonic(), 0
            while (trial := self._study.begin(plan.num_trials)) is not None:
                ended = self._run(trial, is_first=not num_done)
                num_done += 1
                num_left = plan.num_trials - len(self._study.ended(plan.num_trials))
                seconds = num_left * (time.monotonic() - started) / num_done
                show(f"{self._line(ended)}{f'; about {duration(seconds)} to go' if num_left else ''}")
            ended_trials = self._study.ended(plan.num_trials)
            if len(ended_trials) < plan.num_trials:
                num_running = plan.num_trials - len(ended_trials)
                show(
                    f"{num_running} of the trials still run in other processes; the last of these tells what is chosen"
                )
                return None
            return self._choose(ended_trials)
        finally:
            self._study.close()

    def _run(self, trial: Trial, is_first: bool) -> Ended:
        """Run a trial to its end, whatever that is but a bug. What is said at the start of each is said once."""
        points: list[tuple[int, float]] = []

        def on_point(number: int, summary: Mapping[str, Any]) -> None:
            points.append((number, self._objective.of(summary)))
            trial.report(*points[-1])

        value, state, end = None, "complete", ""
        try:
            args = parse(SingleProcess, [*self._words, *flag_words(trial.settings)])
            with contextlib.nullcontext() if is_first else quiet():
                summary = self._trials.run(args, self._study.states_folder, on_point)
            value = self._objective.of(summary)
            trial.complete(value)
        except PrunedError:
            (number, reached) = points[-1]
            state, end = (
                "pruned",
                f"after {number} round{'s' if number > 1 else ''} at {self._objective.shown(reached)}",
            )
            trial.prune(end)
        except (DivergedError, ValueError) as error:
            if trial.place == 0 and isinstance(error, ValueError):
                raise
            state, end = "failed", " ".join(str(error).split())
            trial.prune(end, failed=True)
        return Ended(trial.place, trial.settings, state, value, end)

    def _choose(self, ended: Sequence[Ended]) -> Choice:
        best, first = self._study.best(self._plan.num_trials), ended[0]
        if best is None:
            raise ValueError(f"{self._plan.label}: no trial came to its end; {first.end}")
        own = with_effect(default_texts({each.name: each.default for each in self._space}), self._config)
        settings = best.settings or own
        show(f"\n{self._table(first, best, own)}")
        counts = {state: sum(one.state == state for one in ended) for state in ("complete", "pruned", "failed")}
        return Choice(
            settings,
            {
                "trials": len(ended),
                **counts,
                "seed": self._plan.seed,
                "rounds_per_trial": sum(self._rounds.values()),
                "rounds_by_phase": {phase.field: number for phase, number in self._rounds.items()},
                "points_per_trial": self._plan.num_points,
                "objective": self._objective.name,
                "validation_clients": len(scored_clients(self._dataset)),
                "training_clients": len(self._dataset.train_client_ids),
                "default": own,
                **({} if first.value is None else {"default_value": first.value}),
                "best_value": best.value,
                "best_trial": best.place + 1,
                "space": {each.name: each.text for each in self._space},
            },
        )

    def _identity(self, initial_model: Path | None) -> dict[str, Any]:
        """What the trials follow from, and so what two parts of one search must agree in."""
        return {
            "experiment": to_plain(self._config),
            "initial_model": None if initial_model is None else str(initial_model),
            "search": {each.name: each.text for each in self._space},
            "objective": self._objective.name,
            "seed": self._plan.seed,
            "data": self._dataset.fingerprint,
        }

    def _heading(self) -> str:
        plan, num_ended = self._plan, len(self._study.ended(self._plan.num_trials))
        rounds = " + ".join(str(number) for number in self._rounds.values())
        space = "\n".join(f"    {each.name}  {each.text}  (now {_shown(each)})" for each in self._space)
        gone = f"; {num_ended} are done" if num_ended else ""
        scored = f"{self._objective.name} of {len(scored_clients(self._dataset))} validation clients"
        return (
            f"{plan.label}: {plan.num_trials} trials of {rounds} rounds, seed {plan.seed}, by {scored}{gone}\n{space}"
        )

    def _line(self, ended: Ended) -> str:
        settings = ", ".join(f"{name} {text}" for name, text in ended.settings.items()) or "as it is"
        value = "" if ended.value is None else self._objective.shown(ended.value)
        outcome = f"{ended.state} {ended.end}" if ended.state == "pruned" else value or f"failed: {ended.end}"
        return f"[{ended.place + 1}/{self._plan.num_trials}] {settings}: {outcome}"

    def _table(self, first: Ended, best: Ended, own: Mapping[str, str]) -> str:
        rows = [("as it is", own, first)]
        if best.place:
            rows.append((f"chosen (trial {best.place + 1})", best.settings, best))
        lines = []
        for title, settings, trial in rows:
            value = "failed" if trial.value is None else self._objective.shown(trial.value)
            said = ", ".join(f"{name} {text}" for name, text in settings.items())
            lines.append(f"{title:20}{value:>10}   {said}")
        return "\n".join([*lines, *([] if best.place else ["nothing is better than the settings as they are"])])


def run_command(words: Sequence[str], settings: Mapping[str, str]) -> str:
    """What runs the experiment with the chosen settings, for a shell in this project's folder."""
    return command_line([".venv/bin/python", "single_process.py", *words, *flag_words(settings)])


def _shown(dimension: Dimension) -> str:
    return ", ".join(default_texts({dimension.name: dimension.default}).values()) or "left open"
