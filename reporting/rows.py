"""The rows of a report: runs that differ only in the seed, what a row is called, and its figures over the seeds."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perfedavg.recording.runs import KINDS, CurvePoint, FinishedRun, PhaseResult
from perfedavg.settings import Phase

_SEED_OR_LESS = ("seed", "client_batching", "num_curve_epochs")
"""Settings in which the runs of a row may differ: who is drawn, how sums are rounded, and what else is measured."""
_IN_THE_NAME = ("cohort_size", "joint", "fedavg", "fedavg num_local_epochs", "fedavg num_local_steps")
_ALWAYS_SAID = {"local_split": "tail", "validation": True}
"""What changes the meaning of the figures is said even where all rows have it in common."""
_OF_ONE_METHOD = ("fine_tune support_fraction",)
"""Settings that only some methods have: that a row has one of them is said by its method."""
_SHOWN_DIGITS = 12
"""Of an initial model's digest, where rows are told apart by it."""
_PHASES = tuple(phase.field for phase in Phase)


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds, and the sample deviation, which is None with a single seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Row:
    """Runs that differ only in the seed.

    name: clients a round and E, or what takes their place.  differences: what else differs from most other rows.
    runs: in order of their seeds, one a seed; never empty.
    nickname: in place of name and differences, where these are long: the folder of runs in `<folder>/seed<k>`, and what
    may not remain unsaid; or empty.
    """

    name: str
    differences: str
    runs: tuple[FinishedRun, ...]
    nickname: str = ""

    @property
    def label(self) -> str:
        """What it is called in a report. No two rows of a data set have the same label."""
        return self.nickname or self.description

    @property
    def description(self) -> str:
        """What it is, in full."""
        return f"{self.name}, {self.differences}" if self.differences else self.name

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of the experiment, as config.json holds them; the seed is the first run's."""
        return self.runs[0].settings

    @property
    def phases(self) -> list[Phase]:
        """Those after which there are results."""
        return list(self.runs[0].phases)

    def results(self, phase: Phase) -> list[PhaseResult]:
        return [run.phases[phase] for run in self.runs]

    @property
    def has_accuracy(self) -> bool:
        """Whether the clients' task is one that has accuracies, unlike a regression."""
        return any(
            getattr(result, kind).accuracy is not None
            for run in self.runs
            for result in run.phases.values()
            for kind in KINDS
        )

    def after(self, phase: Phase) -> str:
        """After what the results of a phase are."""
        is_trained = phase is not Phase.FEDAVG or self.settings["fedavg"]["num_rounds"] > 0
        return phase.label if is_trained else "no training"

    @property
    def has_cohort_and_epochs(self) -> bool:
        """Whether it is FedAvg(E), with cohorts, so that clients a round and E name it."""
        return not _is_special(self.settings)

    @property
    def cohort_and_epochs(self) -> tuple[int, int]:
        """Clients a round, and E: how the published tables name an experiment."""
        return self.settings["cohort_size"], self.settings["fedavg"]["num_local_epochs"]

    @property
    def can_be_compared(self) -> bool:
        """Whether published figures for its clients a round and E may stand beside its own."""
        method = (self.settings["fine_tune"] or {}).get("method", "reptile")
        return self.has_cohort_and_epochs and method == "reptile" and not self.settings.get("validation")


def seed_mean(values: Sequence[float | None]) -> SeedMean | None:
    """Mean and sample deviation of one value a seed; None where one of them is no number, or there is none."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    return SeedMean(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def rounds_to_target(curve: Sequence[CurvePoint], kind: str, target: float) -> int | None:
    """The first round of the curve, initial or personalized, at which its mean accuracy was the target or more.

    None where it never was. The curve has a point every `eval_every` rounds, which is how exact the answer is.
    """
    for point in curve:
        accuracy = getattr(point, kind).accuracy
        if accuracy is not None and accuracy >= target:
            return point.round_number
    return None


def leave_out_repeats(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[str]]:
    """The runs without those that are another one of the list again, with the same seed, and a line for each of these.

    Counted twice, they would make the deviation over seeds too small.
    """
    first: dict[str, FinishedRun] = {}
    lines = []
    for run in runs:
        key = _row_key(run.settings, run.seed, _origin(run))
        if key in first:
            lines.append(f"{run.path} is the same experiment with the same seed as {first[key].path}")
        else:
            first[key] = run
    return list(first.values()), lines


def group_rows(runs: Sequence[FinishedRun]) -> list[Row]:
    """The rows of runs on one data set: FedAvg(E) by clients a round and E, then those that differ, then baselines."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        groups.setdefault(_row_key(run.settings), []).append(run)
    parts = [part for group in groups.values() for part in _parted_by_origin(group)]
    all_settings = [runs[0].settings for runs, _ in parts]
    rows = [
        Row(_name(settings), ", ".join([*differences, *origin]), tuple(part))
        for settings, differences, (part, origin) in zip(all_settings, _differences(all_settings), parts, strict=True)
    ]
    folders = Counter(_common_folder(row) for row in rows)
    rows = [replace(row, nickname=_nickname(row)) if folders[_common_folder(row)] == 1 else row for row in rows]
    return sorted(rows, key=_place)


def _common_folder(row: Row) -> str:
    """The name of the folder that holds all runs of a row, each as seed<k>; empty where there is none."""
    folders = {run.path.parent.name if run.path.name == f"seed{run.seed}" else "" for run in row.runs}
    return folders.pop() if len(folders) == 1 else ""


def _nickname(row: Row) -> str:
    """Empty for a plain row, which is called by clients a round and E, and for one whose folder says nothing."""
    folder = _common_folder(row)
    if not folder or (row.has_cohort_and_epochs and not row.differences):
        return ""
    said = {name: value for name, value in _ALWAYS_SAID.items() if row.settings.get(name) == value != folder}
    return ", ".join([folder, *(word for name, value in said.items() for word in _words(name, value, []))])


def _place(row: Row) -> tuple[bool, bool, tuple[int, int], str]:
    """By which rows are sorted."""
    if row.has_cohort_and_epochs:
        return False, row.differences != "", row.cohort_and_epochs, row.label
    return True, False, (0, 0), row.label


def common_settings(rows: Sequence[Row]) -> dict[str, Any]:
    """The settings, by flat name such as `fine_tune method`, that more rows have than have any other."""
    flat_settings = [_flatten(row.settings) for row in rows]
    names = dict.fromkeys(itertools.chain.from_iterable(flat_settings))
    common = {name: _most_common(name, flat_settings) for name in names}
    return {name: value for name, value in common.items() if value is not _NOTHING}


_NOTHING = object()
"""Stands for a setting that is not there, and for a most common value where no value is."""


def _row_key(settings: Mapping[str, Any], *which: int | str) -> str:
    return json.dumps([settings["dataset"], _flatten(settings), *which], sort_keys=True)


def _origin(run: FinishedRun) -> str:
    """What the run's initial model was, as text; empty for random weights."""
    return str(run.settings.get("initial_model") or "")


def _parted_by_origin(group: list[FinishedRun]) -> list[tuple[list[FinishedRun], list[str]]]:
    """The runs of a row, and what is to be said of it; several rows where a seed has several initial models.

    Each seed may start from a phase 1 of its own.
    """
    if len({run.seed for run in group}) == len(group):
        return [(group, [])]
    parts: dict[str, list[FinishedRun]] = {}
    for run in group:
        parts.setdefault(_origin(run), []).append(run)
    return [(part, [f"initial_model {origin[:_SHOWN_DIGITS]}"]) for origin, part in parts.items()]


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that act on the result, by flat names. Whether there is a phase is a setting named like it, and
    whether there is an initial model, but not which: as the seed, it says what chance a run had.

    The client optimizer of phase 1 also personalizes, with or without a phase 1, and so is none of its settings.
    """
    fedavg, fine_tune = settings["fedavg"], settings["fine_tune"]
    personalizer = fedavg["client_optimizer"]
    fedavg = {name: value for name, value in fedavg.items() if name != "client_optimizer"}
    phases = {"fedavg": fedavg if fedavg["num_rounds"] else {}, "fine_tune": fine_tune or {}}
    idle = {*_SEED_OR_LESS, *(() if any(phases.values()) else ("cohort_size",))}
    flat = {name: value for name, value in settings.items() if name not in phases and name not in idle}
    flat["client_optimizer"] = personalizer
    flat["initial_model"] = settings.get("initial_model") is not None
    for name, phase in phases.items():
        flat[name] = bool(phase)
        flat |= {f"{name} {key}": value for key, value in _acting(phase).items()}
    return flat


def _acting(phase: Mapping[str, Any]) -> dict[str, Any]:
    """A phase's settings without those that others make idle."""
    idle = {"num_local_steps" if phase.get("num_local_steps") is None else "num_local_epochs"}
    if phase.get("method") == "reptile":
        idle.add("support_fraction")
    return {name: value for name, value in phase.items() if name not in idle}


def _is_special(settings: Mapping[str, Any]) -> bool:
    """Whether it is something else than FedAvg(E) with cohorts of clients."""
    fedavg = settings["fedavg"]
    return bool(fedavg["num_rounds"] == 0 or fedavg.get("num_local_steps") is not None or settings.get("joint"))


def _name(settings: Mapping[str, Any]) -> str:
    fedavg, cohort_size = settings["fedavg"], settings["cohort_size"]
    who = "joint" if settings.get("joint") else f"{cohort_size} client{'' if cohort_size == 1 else 's'} a round"
    if fedavg["num_rounds"] == 0:
        return "untrained" if settings["fine_tune"] is None else f"no FedAvg, {who}"
    steps = fedavg.get("num_local_steps")
    if steps is None:
        return f"E {fedavg['num_local_epochs']}, {who}"
    return f"{steps} local step{'' if steps == 1 else 's'}, {who}"


def _differences(all_settings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each row, in words, what differs from the value that most rows have."""
    flat_settings = [_flatten(settings) for settings in all_settings]
    differences: list[list[str]] = [[] for _ in flat_settings]
    for name in dict.fromkeys(itertools.chain.from_iterable(flat_settings)):
        if name in _IN_THE_NAME:
            continue
        common = _most_common(name, flat_settings)
        values = [flat.get(name, _NOTHING) for flat in flat_settings]
        for value, flat, words in zip(values, flat_settings, differences, strict=True):
            is_said = value != common or _ALWAYS_SAID.get(name, _NOTHING) == value
            is_in_name = name == "fine_tune" and not flat["fedavg"] and not flat["fine_tune"]
            if is_said and value is not _NOTHING and not is_in_name:
                words += _words(name, value, values)
    return differences


def _most_common(name: str, flat_settings: Sequence[Mapping[str, Any]]) -> Any:
    """The value that more rows have than have any other one; _NOTHING where two are as frequent.

    For the settings of a phase, among the rows that have the phase.
    """
    phase, is_of_phase, _ = name.partition(" ")
    values = [flat.get(name, _NOTHING) for flat in flat_settings if not is_of_phase or flat[phase]]
    if name in _OF_ONE_METHOD:
        values = [value for value in values if value is not _NOTHING]
    counts = Counter("" if value is _NOTHING else json.dumps(value, sort_keys=True) for value in values)
    (most, count), *others = counts.most_common(2)
    if (others and others[0][1] == count) or not most:
        return _NOTHING
    return json.loads(most)


def _words(name: str, value: Any, values: Sequence[Any]) -> list[str]:
    """A setting as the label says it: nothing for what is only absent. values: those of all rows."""
    if name in _PHASES:
        return [] if value else [f"no {Phase.of_field(name).label}"]
    if isinstance(value, bool):
        return [name] if value else []
    if isinstance(value, dict):
        return [f"{name} {_optimizer_words(value, [other for other in values if other is not _NOTHING])}"]
    return [f"{name} {'none' if value is None else value}"]


def _optimizer_words(optimizer: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Name, rate, and what else tells it from other optimizers of its name."""
    alike = [other for other in others if other["name"] == optimizer["name"]]
    telling = [
        f"{name} {value}"
        for name, value in optimizer.items()
        if name not in ("name", "learning_rate") and any(other.get(name) != value for other in alike)
    ]
    return " ".join([optimizer["name"], f"{optimizer['learning_rate']:g}", *telling])
