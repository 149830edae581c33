"""The rows of a report: runs that differ only in the seed, and what a row is called."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from perfedavg.fields import flags_of
from perfedavg.methods import METHODS, FedAvg, Method
from perfedavg.metrics import BASIC_METRICS
from perfedavg.recording.runs import KINDS, FinishedRun, PhaseResult
from perfedavg.settings import ExperimentConfig, Phase, Population
from reporting.figures import counted

_IN_THE_NAME = ("cohort_size", "joint", "fedavg", "fedavg num_local_epochs", "fedavg num_local_steps")
"""Flat settings that a row's name says."""
_SHOWN_DIGITS = 12
"""Of an initial model's digest, where rows are told apart by it."""
_FLAGS = {path[0]: flag for path, flag in flags_of(ExperimentConfig).items() if len(path) == 1}
_IGNORED = {name for name, flag in _FLAGS.items() if flag.setting.reported == "never"}

Settings = Mapping[str, Any]
"""Of an experiment, as config.json holds them; flat ones have names such as `fine_tune method`."""


@dataclass(frozen=True)
class Row:
    """Runs that differ only in the seed.

    name: clients a round and E, or what takes their place.
    differences: other settings in which it differs from most other rows.
    runs: in order of their seeds, one a seed; never empty.
    nickname: replaces name and differences, with what must always be shown: the methods where no other row has them, or
        else, where the name is long, the folder of runs in `<folder>/seed<k>`; or empty.
    """

    name: str
    differences: str
    runs: tuple[FinishedRun, ...]
    nickname: str = ""

    @property
    def label(self) -> str:
        """What a report calls it. No two rows of a data set have the same label."""
        return self.nickname or self.description

    @property
    def description(self) -> str:
        """Name and differences."""
        return f"{self.name}, {self.differences}" if self.differences else self.name

    @property
    def settings(self) -> Settings:
        """The first run's."""
        return self.runs[0].settings

    @property
    def population(self) -> Population:
        """Its runs' main one: unseen clients or, where there are none, those that trained."""
        return self.runs[0].population

    @cached_property
    def results(self) -> dict[Phase, list[PhaseResult]]:
        """How the clients of the main population fare after each phase, in each seed, the phases in their order."""
        return self.results_of(self.population)

    def results_of(self, population: Population) -> dict[Phase, list[PhaseResult]]:
        """How a population fares, in those seeds that scored it; empty where none did."""
        results = [run.results[population] for run in self.runs if population in run.results]
        return {phase: [one[phase] for one in results] for phase in self.runs[0].phases} if results else {}

    @property
    def populations(self) -> list[Population]:
        """Those that were scored."""
        return [population for population in Population if self.results_of(population)]

    @property
    def metrics(self) -> dict[str, bool]:
        """What its clients were scored by besides loss and accuracy, and whether higher is better."""
        metrics: dict[str, bool] = {}
        for run in self.runs:
            metrics |= run.result.higher_is_better
        return {name: higher_is_better for name, higher_is_better in metrics.items() if name not in BASIC_METRICS}

    @property
    def folder(self) -> str:
        """The name of the folder that holds all its runs, each as seed<k>; empty where there is none."""
        folders = {run.path.parent.name if run.path.name == f"seed{run.seed}" else "" for run in self.runs}
        return folders.pop() if len(folders) == 1 else ""

    @property
    def title(self) -> str:
        """Its methods, as people call them: `FedAvg + Reptile`."""
        fedavg, fine_tune = self.settings["fedavg"], self.settings["fine_tune"]
        parts = []
        if self.settings["joint"] and fedavg["num_rounds"]:
            parts.append("Joint training")
        elif fedavg["num_rounds"]:
            parts.append("FedSGD" if self.is_fedsgd else method_title(fedavg["method"]))
        parts += [] if fine_tune is None else [method_title(fine_tune["method"])]
        return " + ".join(parts) or ("Local only" if self.is_local_only else "Initial model only")

    @property
    def is_fedavg(self) -> bool:
        """Whether phase 1 is FedAvg over clients, of their own settings' epochs or steps."""
        fedavg = self.settings["fedavg"]
        return fedavg["method"]["name"] == FedAvg.name and fedavg["num_rounds"] > 0 and not self.settings["joint"]

    @property
    def is_fedsgd(self) -> bool:
        """Whether a client of phase 1 takes a single step of FedAvg."""
        return self.is_fedavg and self.settings["fedavg"]["num_local_steps"] == 1

    @property
    def is_local_only(self) -> bool:
        """Whether a client trains by itself alone, from random weights."""
        has_phases = self.settings["fedavg"]["num_rounds"] > 0 or self.settings["fine_tune"] is not None
        return not has_phases and self.settings["initial_model"] is None

    @property
    def results_by_epoch(self) -> dict[Phase, list[PhaseResult]]:
        """Of those seeds that were also scored between the epochs of personalization, without phases that have none."""
        measured = {phase: [one for one in results if one.by_epoch] for phase, results in self.results.items()}
        return {phase: results for phase, results in measured.items() if results}

    @property
    def has_accuracy(self) -> bool:
        """Whether the clients' task has accuracies, unlike a regression."""
        results = itertools.chain.from_iterable(self.results.values())
        return any(getattr(result, kind)["accuracy"] is not None for result in results for kind in KINDS)

    def after(self, phase: Phase) -> str:
        """What the results of a phase come after."""
        if phase is not Phase.FEDAVG:
            return phase.label
        if self.settings["fedavg"]["num_rounds"] == 0:
            return "no training"
        return "joint training" if self.settings["joint"] else method_title(self.settings["fedavg"]["method"])

    @property
    def has_cohort_and_epochs(self) -> bool:
        """Whether it is FedAvg(E) with cohorts of clients, so that clients a round and E name it."""
        fedavg = self.settings["fedavg"]
        return bool(fedavg["num_rounds"] and fedavg["num_local_steps"] is None and not self.settings["joint"])

    @property
    def cohort_and_epochs(self) -> tuple[int, int]:
        """Clients a round, and E."""
        return self.settings["cohort_size"], self.settings["fedavg"]["num_local_epochs"]


def leave_out_repeats(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[str]]:
    """The runs without those that repeat another one with the same seed, and a line for each of these.

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


def group_rows(runs: Sequence[FinishedRun], order: Sequence[str] = ()) -> list[Row]:
    """The rows of runs on one data set: FedAvg(E) by clients a round and E, then those that differ, then baselines.

    order: of the folders of rows, where these are a table's; others come behind.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        groups.setdefault(_row_key(run.settings), []).append(run)
    parts = [part for group in groups.values() for part in _parted_by_origin(group)]
    differences = _differences([flat_settings(part[0].settings) for part, _ in parts])
    rows = [
        Row(_name(part[0].settings), ", ".join([*words, *origin]), tuple(part))
        for words, (part, origin) in zip(differences, parts, strict=True)
    ]
    folders, titles = Counter(row.folder for row in rows), Counter(row.title for row in rows)
    rows = [replace(row, nickname=_nickname(row, folders, titles)) for row in rows]
    places = {folder: place for place, folder in enumerate(order)}
    return sorted(_made_distinct(rows), key=lambda row: (places.get(row.folder, len(places)), _sort_key(row)))


def _made_distinct(rows: Sequence[Row]) -> list[Row]:
    """The rows, with their folders in the names of those whose labels are the same."""
    labels = Counter(row.label for row in rows)
    return [
        replace(row, nickname=f"{row.label} ({row.runs[0].path})") if labels[row.label] > 1 else row for row in rows
    ]


def common_settings(all_flat: Sequence[Settings]) -> Settings:
    """The flat settings of rows that more of them have than have any other value.

    Those of a phase are counted among the rows that have the phase.
    """
    common = {}
    for name in _names(all_flat):
        phase, is_of_phase, _ = name.partition(" ")
        texts = [
            json.dumps(flat[name], sort_keys=True) if name in flat else None
            for flat in all_flat
            if not is_of_phase or flat[phase]
        ]
        (most, count), *others = Counter(texts).most_common(2)
        if most is not None and all(number < count for _, number in others):
            common[name] = json.loads(most)
    return common


def _names(all_flat: Sequence[Settings]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(all_flat)))


def flat_settings(settings: Settings) -> dict[str, Any]:
    """The settings that act on the result, by flat names.

    Whether there is a phase is a setting with its name. Whether there is an initial model is one, but not which: like
    the seed, it says what chance a run had. The client optimizer of phase 1 also personalizes, with or without a
    phase 1, and so is none of its settings.
    """
    phases = {phase.field: dict(settings[phase.field] or {}) for phase in Phase}
    personalizer = phases["fedavg"].pop("client_optimizer")
    if not phases["fedavg"]["num_rounds"]:
        phases["fedavg"] = {}
    idle = _IGNORED | (set() if any(phases.values()) else {"cohort_size"})
    flat = {name: value for name, value in settings.items() if name not in phases and name not in idle}
    flat |= {"client_optimizer": personalizer, "initial_model": settings["initial_model"] is not None}
    for name, phase in phases.items():
        idle = {"num_local_steps" if phase.get("num_local_steps") is None else "num_local_epochs"}
        flat[name] = bool(phase)
        flat |= {f"{name} {key}": value for key, value in phase.items() if key not in idle}
    return flat


def _row_key(settings: Settings, *which: int | str) -> str:
    return json.dumps([settings["dataset"], flat_settings(settings), *which], sort_keys=True)


def _origin(run: FinishedRun) -> str:
    """What the run's initial model was, as text; empty for random weights."""
    return str(run.settings["initial_model"] or "")


def _parted_by_origin(group: list[FinishedRun]) -> list[tuple[list[FinishedRun], list[str]]]:
    """The runs of a row, with no words; or several rows, each with words for its initial model.

    Each seed may start from a model of its own; only where a seed has several, they part the row.
    """
    if len({run.seed for run in group}) == len(group):
        return [(group, [])]
    parts: dict[str, list[FinishedRun]] = {}
    for run in group:
        parts.setdefault(_origin(run), []).append(run)
    return [(part, [f"initial_model {origin[:_SHOWN_DIGITS]}"]) for origin, part in parts.items()]


def _nickname(row: Row, folders: Mapping[str, int], titles: Mapping[str, int]) -> str:
    """Empty for a row that is called by clients a round and E, and for one whose folder says nothing.

    folders, titles: how many rows have each.
    """
    name = row.title
    if titles[name] > 1:
        name = row.folder if folders[row.folder] == 1 else ""
        if not name or (row.has_cohort_and_epochs and not row.differences):
            return ""
    shown = {key: value for key, value in row.settings.items() if _is_always_shown(key, value) and value != name}
    return ", ".join([name, *(word for key in shown for word in _words(key, row.settings, [row.settings]))])


def _is_always_shown(name: str, value: Any) -> bool:
    """Whether the value changes what the figures mean, and so is said even where all rows have it."""
    return name in _FLAGS and _FLAGS[name].setting.reported == "always" and value != _FLAGS[name].default


def _sort_key(row: Row) -> tuple[bool, bool, tuple[int, int], str]:
    if row.has_cohort_and_epochs:
        return False, row.differences != "", row.cohort_and_epochs, row.label
    return True, False, (0, 0), row.label


def method_title(choice: Settings) -> str:
    """What people call a method: `Per-FedAvg` for `per_fedavg`; a user's own goes by its class."""
    name = str(choice["name"])
    method = METHODS.get(name)
    if method is None:
        return name.rpartition(":")[2]
    assert issubclass(method, Method)
    return method.title or method.__name__


def _name(settings: Settings) -> str:
    fedavg, cohort_size = settings["fedavg"], settings["cohort_size"]
    who = "joint" if settings["joint"] else f"{counted(cohort_size, 'client')} a round"
    if fedavg["num_rounds"] == 0:
        return "untrained" if settings["fine_tune"] is None else f"no FedAvg, {who}"
    steps = fedavg["num_local_steps"]
    return f"E {fedavg['num_local_epochs']}, {who}" if steps is None else f"{counted(steps, 'local step')}, {who}"


def _differences(all_flat: Sequence[Settings]) -> list[list[str]]:
    """For each row, in words, the settings that differ from the value that most rows have."""
    common, differences = common_settings(all_flat), []
    for flat in all_flat:
        said = {*_IN_THE_NAME, *(() if flat["fedavg"] or flat["fine_tune"] else ("fine_tune",))}
        words: list[str] = []
        for name in _names(all_flat):
            if name not in flat or name in said:
                continue
            if name not in common or flat[name] != common[name] or _is_always_shown(name, flat[name]):
                words += _words(name, flat, all_flat)
                said |= {f"{name} method"}
        differences.append(words)
    return differences


def _words(name: str, flat: Settings, all_flat: Sequence[Settings]) -> list[str]:
    """A setting of a row as its label shows it. all_flat: the settings of all rows."""
    value, values = flat[name], [other[name] for other in all_flat if name in other]
    if name in {phase.field for phase in Phase}:
        label, method = Phase.of_field(name).label, f"{name} method"
        if not value:
            return [f"no {label}"]
        return [f"{label} by {_choice_words(flat[method], [other[method] for other in all_flat if method in other])}"]
    if isinstance(value, bool):
        return [name if value else f"no {name}"]
    if isinstance(value, dict):
        return [f"{'method' if name == 'fedavg method' else name} {_choice_words(value, values)}"]
    return [f"{name} {'none' if value is None else value}"]


def _choice_words(choice: Settings, others: Sequence[Settings]) -> str:
    """An optimizer or a method: its name, its rate, and what else tells it from others of its name."""
    alike = [other for other in others if other["name"] == choice["name"]]
    telling = [
        f"{name} {value}"
        for name, value in choice.items()
        if name not in ("name", "learning_rate") and any(other.get(name) != value for other in alike)
    ]
    rate = [f"{choice['learning_rate']:g}"] if "learning_rate" in choice else []
    return " ".join([choice["name"], *rate, *telling])


def whose(rows: Sequence[Row]) -> str:
    """Whom the main figures of rows are of, in words."""
    populations = {row.population for row in rows}
    return f"{' or '.join(population.value for population in Population if population in populations)} clients"
