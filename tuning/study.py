"""A search's trials, kept in a folder by Optuna with SQLite, so that it can be stopped, gone on with, and shared.

The folder has study.db, a lock, and a lock for each process that searches, by which the others know that it lives.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfedavg.plain_values import differences
from perfedavg.recording.folders import make_folder
from perfedavg.terminal.console import reason_of
from tuning.space import Dimension, with_effect

if TYPE_CHECKING:
    import filelock
    import optuna

    from perfedavg.settings import ExperimentConfig

NUM_RANDOM_TRIALS = 8
"""Trials drawn at random, the first one among them, before the sampler goes by what they came to."""
NUM_UNPRUNED_TRIALS = 4
"""Trials that come to their end before any is pruned."""
_STUDY_FILE = "study.db"
_SECONDS_TO_WAIT = 120
"""For another process that writes to the study."""
_PLACE, _TEXTS, _SEARCHER, _END, _FAILED = "place", "settings", "searcher", "end", "failed"
"""What is noted of a trial: its place in the search, its flags by name, who runs it; why it ended early, and whether it
failed."""


@dataclass(frozen=True)
class Ended:
    """A trial that has ended.

    place: in the search, from 0, which is the experiment as it is.
    settings: what was searched, as texts by flag.
    state: `complete`, `pruned` or `failed`.
    value: of the objective, None where it did not come to one.
    end: why it ended early.
    """

    place: int
    settings: dict[str, str]
    state: str
    value: float | None
    end: str


class PrunedError(Exception):
    """A trial that is worse than others were at the same round."""


class Study:
    """The trials of one search, as this process takes part in it.

    Same seed, same trials, as long as one process searches: each trial's sampler follows from (seed, place), and a
    trial that a process left behind is repeated in its place.
    """

    def __init__(
        self,
        folder: Path,
        dimensions: Sequence[Dimension],
        experiment: ExperimentConfig,
        identity: Mapping[str, Any],
        seed: int,
        higher_is_better: bool,
        num_warmup_rounds: int,
    ) -> None:
        """experiment: as it is without what is searched.
        identity: what the search is, which a study in the folder must be too.
        num_warmup_rounds: before which no trial is pruned.

        Raises ValueError where the folder cannot be used, or holds the study of another search.
        """
        import filelock

        optuna = _import_optuna()
        self._dimensions = dimensions
        self._experiment = experiment
        self._seed = seed
        self.folder = folder
        self.higher_is_better = higher_is_better
        with _naming(folder):
            make_folder(folder)
            self._lock = filelock.FileLock(folder / "lock", timeout=_SECONDS_TO_WAIT, thread_local=False)
            with self._lock:
                self._searcher, self._alive = self._claim_place()
                self._storage = optuna.storages.RDBStorage(
                    f"sqlite:///{folder / _STUDY_FILE}",
                    engine_kwargs={"connect_args": {"timeout": _SECONDS_TO_WAIT, "factory": _Connection}},
                )
                self._study = optuna.create_study(
                    storage=self._storage,
                    pruner=optuna.pruners.MedianPruner(NUM_UNPRUNED_TRIALS, num_warmup_rounds),
                    study_name="search",
                    direction="maximize" if higher_is_better else "minimize",
                    load_if_exists=True,
                )
                self._check_identity(identity)

    @property
    def states_folder(self) -> Path:
        """For what the clients of this process's trial keep; no other process uses it."""
        return self.folder / f"{self._searcher}-states"

    def begin(self, num_trials: int) -> Trial | None:
        """The next trial of the first so many, those that no process works on any more included; None where none is
        left to begin."""
        optuna = _import_optuna()
        states = optuna.trial.TrialState
        with self._lock:
            for trial in self._study.get_trials(deepcopy=False, states=[states.RUNNING]):
                if not self._is_alive(trial.user_attrs.get(_SEARCHER)):
                    self._study.tell(trial.number, state=states.FAIL)
            trials = self._study.get_trials(deepcopy=False)
            given_up = {trial.user_attrs.get(_PLACE): trial.params for trial in trials if trial.state == states.FAIL}
            taken = {trial.user_attrs.get(_PLACE) for trial in trials if trial.state != states.FAIL}
            place = next(number for number in itertools.count() if number not in taken)
            if place >= num_trials:
                return None
            params = given_up.get(place) or (self._defaults() if place == 0 else {})
            if params and not any(trial.state == states.WAITING for trial in trials):
                self._study.enqueue_trial(params)
            self._study.sampler = optuna.samplers.TPESampler(
                seed=_sampler_seed(self._seed, place), n_startup_trials=NUM_RANDOM_TRIALS
            )
            searched = place > 0 or bool(params)
            dimensions = self._dimensions if searched else ()
            asked = self._study.ask({each.name: each.distribution() for each in dimensions})
            texts = {each.name: each.value_text(asked.params[each.name]) for each in dimensions} if place else {}
            texts = with_effect(texts, self._experiment)
            for name, noted in ((_TEXTS, texts), (_PLACE, place), (_SEARCHER, self._searcher)):
                asked.set_user_attr(name, noted)
        return Trial(place, texts, self._study, asked)

    def ended(self, num_trials: int) -> list[Ended]:
        """The trials among the first so many that have ended, in their order."""
        found = []
        for trial in self._study.get_trials(deepcopy=False):
            noted = trial.user_attrs
            state = {"COMPLETE": "complete", "PRUNED": "failed" if noted.get(_FAILED) else "pruned"}
            if trial.state.name in state and noted[_PLACE] < num_trials:
                value = trial.value if trial.state.name == "COMPLETE" else None
                end = noted.get(_END, "")
                found.append(Ended(noted[_PLACE], noted[_TEXTS], state[trial.state.name], value, end))
        return sorted(found, key=lambda one: one.place)

    def best(self, num_trials: int) -> Ended | None:
        """The best of the trials that came to their end; of equal ones the earliest, so the experiment as it is."""
        complete = [trial for trial in self.ended(num_trials) if trial.value is not None]
        sign = 1 if self.higher_is_better else -1
        return max(complete, key=lambda trial: (sign * (trial.value or 0.0), -trial.place), default=None)

    def close(self) -> None:
        """Let another process repeat the trial that this one works on."""
        self._storage.remove_session()
        self._storage.engine.dispose()
        self._alive.release()

    def _defaults(self) -> dict[str, Any]:
        """The experiment's own values, where all of them are in the space, so that the sampler learns from them too."""
        values = {each.name: each.default_value for each in self._dimensions}
        return {} if None in values.values() else values

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        recorded = self._study.user_attrs.get("identity")
        if recorded is None:
            self._study.set_user_attr("identity", dict(identity))
            return
        differing = differences(json.loads(json.dumps(identity)), recorded)
        if differing:
            raise ValueError(
                f"--studies {self.folder} holds another search: {differing[0]}; move it away, or name another folder"
            )

    def _claim_place(self) -> tuple[str, filelock.BaseFileLock]:
        """The first name that no living process has, and the lock that keeps it."""
        for number in itertools.count():
            lock = self._try(f"searcher{number}")
            if lock is not None:
                return f"searcher{number}", lock
        raise AssertionError("unreachable")

    def _is_alive(self, searcher: str | None) -> bool:
        if searcher is None or searcher == self._searcher:
            return False
        lock = self._try(searcher)
        if lock is not None:
            lock.release()
        return lock is None

    def _try(self, searcher: str) -> filelock.BaseFileLock | None:
        import filelock

        lock = filelock.FileLock(self.folder / f"{searcher}.lock", blocking=False, thread_local=False)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire()
            return lock
        return None


class Trial:
    """A trial that goes on.

    place: in the search, from 0, which is the experiment as it is.
    settings: what is searched, as texts by flag; none in place 0.
    """

    def __init__(self, place: int, settings: dict[str, str], study: optuna.Study, asked: optuna.Trial) -> None:
        self.place = place
        self.settings = settings
        self._study = study
        self._asked = asked

    def report(self, num_rounds: int, value: float) -> None:
        """A point of the curve. Raises PrunedError where the trial should end; that of place 0 never does."""
        self._asked.report(value, num_rounds)
        if self.place and self._asked.should_prune():
            raise PrunedError

    def complete(self, value: float) -> None:
        self._study.tell(self._asked, value)

    def prune(self, end: str, failed: bool = False) -> None:
        """failed: where the settings cannot be used. The sampler learns to avoid them, as it does pruned ones."""
        states = _import_optuna().trial.TrialState
        self._asked.set_user_attr(_END, end)
        self._asked.set_user_attr(_FAILED, failed)
        self._study.tell(self._asked, state=states.PRUNED)


class _Connection(sqlite3.Connection):
    """Waits for the disk once in a while and not at each line: what a power cut takes are trials, to be repeated."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = NORMAL")


def _sampler_seed(seed: int, place: int) -> int:
    import numpy as np

    return int(np.random.SeedSequence([seed, place]).generate_state(1)[0])


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Let whatever is wrong with a study be a ValueError that names its folder."""
    import filelock

    try:
        yield
    except filelock.Timeout as error:
        raise ValueError(f"--studies {folder} is locked by another process; end that, or name another") from error
    except OSError as error:
        raise ValueError(f"--studies {folder} cannot be written ({error.strerror}); name another folder") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("sqlalchemy", "optuna", "alembic"):
            raise
        raise ValueError(
            f"--studies {folder}: {_STUDY_FILE} is damaged ({reason_of(error)}); move that folder away"
        ) from error


def _import_optuna() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import optuna
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    return optuna
