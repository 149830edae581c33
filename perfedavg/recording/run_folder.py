"""A run's folder: everything that is known of a run, written as it goes, each file whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
from torch import nn

from perfedavg.contracts import ClientDirectory, client_label, client_name
from perfedavg.engine.experiment import ExperimentOutcome, ExperimentState, RoundRecord
from perfedavg.engine.scores import ClientScore, summarize
from perfedavg.machine.kernels import KernelLog
from perfedavg.plain_values import from_plain
from perfedavg.recording.checkpoint import Checkpoints, RunIdentity
from perfedavg.recording.events import EventFile
from perfedavg.recording.files import GrowingFile, remove_partial_files, replace_file
from perfedavg.recording.folders import make_folder, remove_empty
from perfedavg.recording.model_file import model_file
from perfedavg.recording.plots import write_plots
from perfedavg.recording.runs import (
    CLIENTS_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    MODEL_FILE,
    RESULT_FILE,
    read_metrics,
    read_unfinished_run,
    result_key,
)
from perfedavg.settings import ExperimentConfig, Phase
from perfedavg.terminal.console import command_line, optional, reason_of, say
from perfedavg.training.flat_model import unflatten_into

LOGGER = logging.getLogger("perfedavg")

CHECKPOINT_FOLDER = "checkpoint"

NUM_NAMED = 10
"""Clients that a line for the user names, where there may be thousands."""

_NAMES = "client_names"
"""In a line of metrics.jsonl: the names of the clients that were refused, by their ids."""

_PACKAGES = ("fedlab", "torch", "torchvision", "numpy")


class RunFolder:
    """The folder of one run, and the observer that fills it.

    config.json    every setting, versions, commit, how the run was started, and each time it went on
    metrics.jsonl  a line a round, written as the round ends
    clients.csv    a row an unseen client: its scores before and after personalization, after each phase
    checkpoint/    the last states from which the run can go on; gone when the run has ended
    result.json    the summary; written when all that was measured is there: a folder without it holds an unfinished run
    plots/         the accuracy curve, and the accuracy of unseen clients before and after, as PNG; drawn after that, so
                   a run that ends meanwhile has none, and `report.py` draws the same
    tensorboard/   the same curve and what is known of each round, for TensorBoard, written as the round ends
    model.safetensors  the final global model
    log.txt        what was logged
    .lock          held by the process that writes here

    A full disk does not end the run as long as there are rounds to train: what could not be written is said once,
    kept, and written when there is room.
    """

    def __init__(
        self,
        path: Path,
        flags: Mapping[str, Any] | None = None,
        checkpoint_every: int = 10,
        resume: bool = False,
        restart_command: str = "single_process.py",
        is_made_for_it: bool = False,
    ) -> None:
        """Create the folder, or with `resume` open one that holds an unfinished run; take its lock, open its log.

        flags: the experiment's flags, kept in config.json for whoever resumes it.
        checkpoint_every: rounds between two checkpoints, 1 or more.
        restart_command: what goes on with the run once --resume stands behind it, for a shell in any folder.
        is_made_for_it: whether the folder, although it is there, was made for this run and by nobody else.
        Raises ValueError where the folder holds a run (with `resume`: holds none, or one that has ended), cannot be
        written, or is in use by another process.
        """
        self.path = path
        self._flags = dict(flags or {})
        self._checkpoint_every = checkpoint_every
        self._resumes = resume
        self._restart_command = restart_command
        self._made = [path] if is_made_for_it else []
        self._log_size = 0
        self._clients: ClientDirectory | None = None
        self._metrics = GrowingFile(path / METRICS_FILE)
        self._curve: list[RoundRecord] = []
        self._scores: dict[Phase, list[ClientScore]] = {}
        self._failing: set[str] = set()
        self._events: EventFile | None = None
        self._checkpoints: Checkpoints | None = None
        self._saved: tuple[Phase, int, bool, int] | None = None
        self._lock, self._log_handler = self._open()
        LOGGER.addHandler(self._log_handler)

    def _open(self) -> tuple[filelock.BaseFileLock, logging.Handler]:
        flag = "--resume" if self._resumes else "--run_dir"
        if self._resumes:
            read_unfinished_run(self.path)
        try:
            self._made += make_folder(self.path)
            lock = _lock(self.path)
            remove_partial_files(self.path)
            self._log_size = _size(self.path / "log.txt")
            log_handler = _RunLog(self.path / "log.txt", encoding="utf-8", errors="backslashreplace")
        except filelock.Timeout as error:
            raise ValueError(
                f"{flag} {self.path} is in use by another process; wait until that has ended, or name another folder"
            ) from error
        except OSError as error:
            remove_empty(self._made)
            raise ValueError(f"{flag} {self.path} cannot be written ({error.strerror}); name another folder") from error
        if not self._resumes and (self.path / CONFIG_FILE).exists():
            log_handler.close()
            lock.release()
            raise ValueError(
                f"--run_dir {self.path} already holds a run; name another folder, or move that one away (an "
                f"unfinished one goes on with: {self.continue_command})"
            )
        log_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        return lock, log_handler

    @property
    def shown_path(self) -> str:
        """The path as a person would type it here."""
        try:
            relative = os.path.relpath(self.path)
        except OSError:  # the current folder has been removed
            return str(self.path)
        return str(self.path.absolute()) if relative.startswith(os.pardir) else relative

    @property
    def continue_command(self) -> str:
        """What goes on with the run after an early end, for a shell in any folder."""
        return f"{self._restart_command} --resume {command_line([self.path.absolute()])}"

    def discard_unless_begun(self) -> None:
        """Where the run has not begun, leave what was there before: no folder, or the user's own as it was."""
        if (self.path / CONFIG_FILE).exists():
            return
        self.close()
        with contextlib.suppress(OSError):
            if self._log_size:
                os.truncate(self.path / "log.txt", self._log_size)
            else:
                (self.path / "log.txt").unlink(missing_ok=True)
            (self.path / ".lock").unlink(missing_ok=True)
        remove_empty(self._made)

    def name_clients(self, clients: ClientDirectory) -> None:
        """From now on, clients are called by their names too, where the data set knows them."""
        self._clients = clients

    def close(self) -> None:
        """Let others use the folder, and log no more to it. A process that ends need not call it."""
        LOGGER.removeHandler(self._log_handler)
        self._log_handler.close()
        self._lock.release()

    def begin(
        self,
        config: ExperimentConfig,
        fingerprint: str,
        run_settings: dict[str, Any],
        kernels: KernelLog | None = None,
    ) -> ExperimentState | None:
        """Write config.json, from which on the folder holds a run; or find the state where the run goes on.

        fingerprint: of the data.  run_settings: what does not change the result (command, processes, devices).
        kernels: how its processes compute, to which later ones may be added; those of the run's earlier part are.
        Returns None for a run that starts at its first round. Raises ValueError where the folder's run is another
        experiment, was made with other data, or has no checkpoint that can be read; OSError for a full disk.
        """
        try:
            state = self._begin(config, fingerprint, run_settings, kernels or KernelLog())
        except OSError as error:
            raise OSError(f"{self.path} cannot be written ({error.strerror}); make room there") from error
        LOGGER.info("if this ends early, it goes on with: %s", self.continue_command)
        return state

    def _begin(
        self, config: ExperimentConfig, fingerprint: str, run_settings: dict[str, Any], kernels: KernelLog
    ) -> ExperimentState | None:
        assert config.is_settled, "a run is one experiment for good"
        environment = {**_environment(), "kernels": kernels.to_dict()}
        identity = RunIdentity(config, fingerprint, {"commit": environment["commit"]}, kernels)
        self._checkpoints = Checkpoints(self.path / CHECKPOINT_FOLDER, identity)
        self._events = EventFile(self.path / "tensorboard", config.phases)
        if not self._resumes:
            settings = {
                "flags": self._flags,
                "experiment": config.to_dict(),
                "run": run_settings,
                "environment": environment,
            }
            self._metrics.replace(b"")  # so that it is there also where there is no round
            self._write(CONFIG_FILE, _json(settings))
            return None
        state = self._checkpoints.load()
        recorded = dict(read_unfinished_run(self.path).content)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        resumption = {"time": now, "run": run_settings, "environment": environment}
        recorded["resumed"] = [*from_plain(list[Any], recorded.get("resumed", []), "config.json: resumed"), resumption]
        self._write(CONFIG_FILE, _json(recorded))
        self._cut_metrics_back(config, state)
        if state is None:
            say(f"{self.shown_path} has no checkpoint yet, so it starts from its first round")
        else:
            self._saved = state.progress
            say(f"{self.shown_path} goes on after {state.label}")
        return state

    def phase_started(self, phase: Phase, num_rounds: int, num_recorded: int) -> None:
        LOGGER.info("%s: %d rounds, %d of them done", phase.label, num_rounds, num_recorded)

    def round_ended(self, record: RoundRecord) -> None:
        if record.refused:
            _say_refused(record, self._clients)
        if record.train_loss is not None and not math.isfinite(record.train_loss):
            say(
                f"{record.phase.label} round {record.round_number}: the clients' mean loss is {record.train_loss}; if "
                f"this goes on, start again with a lower {_rate_flag(record.phase)}"
            )
        for rank, reason in record.lost_workers.items():
            LOGGER.warning("%s round %d: worker %d was lost: %s", record.phase.label, record.round_number, rank, reason)
        values = record.to_dict() | self._names_of(record.refused)
        line = json.dumps(_without_nan(values), allow_nan=False)
        self._attempt(METRICS_FILE, lambda: self._metrics.append(f"{line}\n".encode()))
        self._write_events(lambda events: events.append(record))
        if record.evaluation is not None:
            self._curve.append(record)

    def settled(self, state: ExperimentState) -> None:
        if state.num_rounds % self._checkpoint_every == 0 or state.phase in state.scores:
            with state.lock:
                self._attempt("a checkpoint", lambda: self.save_checkpoint(state))

    def scoring_started(self, phase: Phase, num_clients: int) -> None:
        LOGGER.info("%s: scoring %d unseen clients", phase.label, num_clients)

    def phase_ended(self, phase: Phase, scores: Mapping[Phase, Sequence[ClientScore]]) -> None:
        _say_diverged(phase, scores[phase], self._clients)
        self._attempt(CLIENTS_FILE, lambda: self._write(CLIENTS_FILE, _clients_csv(scores, self._clients)))

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run has a state to go on from, read or not."""
        return any((self.path / CHECKPOINT_FOLDER).glob("*.safetensors"))

    def keep_start(self, state: ExperimentState) -> None:
        """Save a state before its first round, for a start that cannot be made again from the seed.

        Raises OSError, one line with the fix, where there is no room.
        """
        try:
            with state.lock:
                self.save_checkpoint(state)
        except OSError as error:
            raise OSError(f"{self.path} cannot be written ({error.strerror}); make room there") from error

    def save_checkpoint(self, state: ExperimentState) -> None:
        """Save the state, and before it the lines of metrics.jsonl that it stands for. The caller holds its lock.

        Does nothing where it has been saved already. Raises OSError, and keeps the checkpoints that are there.
        """
        assert self._checkpoints is not None, "the run has begun"
        if state.progress != self._saved:
            self._metrics.flush(to_disk=True)
            self._checkpoints.save(state)
            self._saved = state.progress

    def result(self, config: ExperimentConfig, outcome: ExperimentOutcome, facts: dict[str, Any]) -> dict[str, Any]:
        """The content of result.json. facts: what else is to stand in it, such as the number of processes."""
        result: dict[str, Any] = {
            "dataset": config.dataset,
            "seed": config.seed,
            "rounds": config.fedavg.num_rounds,
            **facts,
            "model_sha256": outcome.model_sha256,
            "seconds": outcome.seconds,
            "phases": {
                phase.field: {"rounds": config.phases[phase].num_rounds, "seconds": outcome.phase_seconds[phase]}
                for phase in outcome.scores
            },
        }
        for phase, scores in outcome.scores.items():
            result[result_key(phase)] = summarize(scores)
        return result

    def write_result(
        self, outcome: ExperimentOutcome, model: nn.Module, metadata: Mapping[str, str], result: dict[str, Any]
    ) -> None:
        """Write model, clients.csv and, last, result.json; then remove the checkpoints.

        `model` takes the final parameters.  metadata: of model.safetensors, see `model_file.ModelFacts`.
        Raises OSError, one line with the fix, where there is no room; the checkpoints are then kept.
        """
        unflatten_into(model, outcome.parameters.clone())
        try:
            self._metrics.flush(to_disk=True)
            self._write(MODEL_FILE, model_file(model, metadata))
            self._write(CLIENTS_FILE, _clients_csv(outcome.scores, self._clients))
            self._write(RESULT_FILE, _json(result))
        except OSError as error:
            raise OSError(
                f"the results cannot be written to {self.path} ({error.strerror}); make room there, then continue "
                f"with: {self.continue_command}"
            ) from error
        self._scores = outcome.scores
        if self._checkpoints is not None:
            self._checkpoints.remove()

    def draw_plots(self) -> None:
        """Draw the plots of the run, whose results have been written. Where that fails, a line says so."""
        plots = self.path / "plots"
        with optional(f"no plots in {plots} (the results are complete; report.py draws the same)"):
            write_plots(plots, self._curve, self._scores)

    def _cut_metrics_back(self, config: ExperimentConfig, state: ExperimentState | None) -> None:
        """Keep the lines of the rounds that the state has recorded, and restore the curve from them."""
        expected = [] if state is None else _recorded_rounds(config, state)
        lines: list[str] = []
        records: list[RoundRecord] = []
        with contextlib.suppress(ValueError):  # of the first line that is damaged
            for (line, values), place in zip(read_metrics(self.path), expected, strict=False):
                values.pop(_NAMES, None)
                record = RoundRecord.from_dict(values)
                if (record.phase, record.round_number) != place:
                    break
                lines.append(line)
                records.append(record)
        if len(lines) < len(expected):
            say(
                f"{self.path / METRICS_FILE} has been damaged: the lines of {len(expected) - len(lines)} rounds "
                "behind the checkpoint are lost, the model is not"
            )
        self._metrics.replace("".join(f"{line}\n" for line in lines).encode())
        self._write_events(lambda events: events.replace(records))
        self._curve = [record for record in records if record.evaluation is not None]

    def _write_events(self, write: Callable[[EventFile], None]) -> None:
        """The run goes on without them where they cannot be made at all, as with a tensorboard that does not import."""
        if self._events is None:
            return
        try:
            self._attempt("tensorboard", partial(write, self._events))
        except Exception as error:
            self._events = None
            say(f"no events for TensorBoard from now on: {reason_of(error)}")

    def _names_of(self, client_ids: Iterable[int]) -> dict[str, Any]:
        """What a line of the metrics says beside a record: the names of clients, where the data set names any."""
        names = {client_id: client_name(self._clients, client_id) for client_id in client_ids}
        known = {client_id: name for client_id, name in names.items() if name is not None}
        return {_NAMES: known} if known else {}

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write, or say once that there is no room for it, and once when there is again."""
        try:
            write()
        except OSError as error:
            if what not in self._failing:
                say(
                    f"{what} cannot be written to {self.shown_path} ({error.strerror}); the run goes on, "
                    "and writes it when there is room"
                )
            self._failing.add(what)
        else:
            if what in self._failing:
                say(f"{what} can be written again")
            self._failing.discard(what)

    def _write(self, name: str, content: bytes) -> None:
        replace_file(self.path / name, content)


class _RunLog(logging.FileHandler):
    """The run's log. On a full disk, lines are lost without a word: the run is what counts."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        pass


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The project's commit, with `+changes` where the work tree differs from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _clients_csv(scores: Mapping[Phase, Sequence[ClientScore]], clients: ClientDirectory | None) -> bytes:
    """A row an unseen client, in order of id; the scores' columns are prefixed with the phase they were taken after.

    Where the data set names clients, their names follow the ids.
    """
    rows_by_client = list(zip(*scores.values(), strict=True))
    names = [client_name(clients, rows[0].client_id) for rows in rows_by_client]
    has_names = any(name is not None for name in names)
    counts = ("num_train_examples", "num_test_examples")
    measured = ("initial_loss", "initial_accuracy", "personalized_loss", "personalized_accuracy")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    identity = ("client_id", "client_name") if has_names else ("client_id",)
    writer.writerow([*identity, *counts, *(f"{result_key(phase)}_{name}" for phase in scores for name in measured)])
    for rows, client in zip(rows_by_client, names, strict=True):
        own = (rows[0].client_id, client) if has_names else (rows[0].client_id,)
        values = [getattr(row, name) for row in rows for name in measured]
        writer.writerow([*own, *(getattr(rows[0], name) for name in counts), *values])
    return text.getvalue().encode()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(_without_nan(value), indent=2, allow_nan=False) + "\n").encode()


def _without_nan(value: Any) -> Any:
    """The same with null for each number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _recorded_rounds(config: ExperimentConfig, state: ExperimentState) -> list[tuple[Phase, int]]:
    """The rounds, in order, of which a state says that they were recorded."""
    counts = {phase: settings.num_rounds for phase, settings in config.phases.items() if phase < state.phase}
    counts[state.phase] = state.num_recorded
    return [(phase, number) for phase, count in counts.items() for number in range(1, count + 1)]


def _size(path: Path) -> int:
    """0 where there is no file."""
    return path.stat().st_size if path.exists() else 0


def _lock(path: Path) -> filelock.BaseFileLock:
    """Take the lock of a run's folder, until it is released or the process ends. Raises Timeout where it is taken."""
    lock = filelock.FileLock(path / ".lock", blocking=False, thread_local=False)
    with contextlib.suppress(NotImplementedError):  # a file system without locks: there, nobody is kept out
        lock.acquire()
    return lock


def _say_refused(record: RoundRecord, clients: ClientDirectory | None) -> None:
    refused, cohort = record.refused, record.client_ids
    line = (
        f"{record.phase.label} round {record.round_number}: refused {len(refused)} of {len(cohort)} updates "
        f"(clients {_labels(refused, clients)}); see metrics.jsonl"
    )
    if len(refused) == len(cohort):
        line += f". The model is left as it was; if this goes on, start again with a lower {_rate_flag(record.phase)}"
    say(line)


def _say_diverged(phase: Phase, scores: Sequence[ClientScore], clients: ClientDirectory | None) -> None:
    """Where unseen clients have losses that are no numbers, and so the means over all of them."""
    diverged = [
        score.client_id
        for score in scores
        if not (math.isfinite(score.initial_loss) and math.isfinite(score.personalized_loss))
    ]
    if diverged:
        named = _labels(diverged[:NUM_NAMED], clients) + (", ..." if len(diverged) > NUM_NAMED else "")
        say(
            f"after {phase.label}: the loss of {len(diverged)} of {len(scores)} unseen clients is infinite or not a "
            f"number (clients {named}), and so is the mean; they adapt at --local_lr, which a lower one may mend"
        )


def _rate_flag(phase: Phase) -> str:
    return "--local_lr" if phase is Phase.FEDAVG else "--fine_tune_local_lr"


def _labels(client_ids: Iterable[int], clients: ClientDirectory | None) -> str:
    return ", ".join(client_label(clients, client_id) for client_id in client_ids)
