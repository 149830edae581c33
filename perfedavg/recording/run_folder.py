"""A run's folder: everything that is known of a run, written as it goes, each file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from perfedavg.contracts import ClientDirectory, client_name
from perfedavg.engine.experiment import ExperimentOutcome, ExperimentState, RoundRecord
from perfedavg.engine.scores import RunScores
from perfedavg.machine.kernels import KernelLog
from perfedavg.machine.versions import describe_environment
from perfedavg.own_module import sources
from perfedavg.plain_values import from_plain
from perfedavg.recording.checkpoint import Checkpoints, RunIdentity
from perfedavg.recording.client_states import StateFiles
from perfedavg.recording.divergence import say_divergence_in_round, say_divergence_in_scores
from perfedavg.recording.events import EventFile
from perfedavg.recording.files import GrowingFile, replace_file
from perfedavg.recording.folders import ClaimedFolder
from perfedavg.recording.model_file import ModelFacts, model_file
from perfedavg.recording.results import clients_csv, to_json
from perfedavg.recording.runs import (
    CLIENT_STATES_FOLDER,
    CLIENTS_FILE,
    CONFIG_FILE,
    INITIAL_MODEL,
    METRICS_FILE,
    MODEL_FILE,
    RESULT_FILE,
    read_metrics,
    read_unfinished_run,
)
from perfedavg.settings import ExperimentConfig, Phase, Population
from perfedavg.terminal.console import LOGGER, command_line, reason_of, say
from perfedavg.training.flat_model import unflatten_into

CHECKPOINT_FOLDER = "checkpoint"

_NAMES = "client_names"
"""In a line of metrics.jsonl: the names of the clients that were refused, by their ids."""


class RunFolder:
    """The folder of one run, and the observer that fills it.

    config.json        every setting, versions, commit, how the run was started, and each time it was resumed
    metrics.jsonl      a line a round, written as the round ends
    clients.csv        a row a scored client: its scores before and after personalization, after each phase
    checkpoint/        the last states from which the run can go on; gone when it has ended
    client_states/     what the method lets each client keep that has trained; only where it does
    model.safetensors  the final global model
    result.json        the summary, written when all that was measured is there: without it, the run is unfinished
    plots/             the accuracy curve, and the clients' accuracies before and after; drawn by `reporting`
    tensorboard/       the same curve and what is known of each round, written as the round ends
    log.txt            what was logged
    workers/           what each worker printed, where they were started over ssh; written by `over_ssh`
    .lock              held by the process that writes here

    A full disk does not end the run as long as there are rounds to train: what could not be written is reported once,
    kept, and written when there is room.
    """

    def __init__(
        self,
        path: Path,
        initial_model: Path | None = None,
        checkpoint_every: int = 10,
        resume: bool = False,
        restart_command: str = "single_process.py",
        is_made_for_it: bool = False,
    ) -> None:
        """Create the folder, or with `resume` open one that holds an unfinished run; take its lock, open its log.

        initial_model: the file or the run that the initial model is read from, kept in config.json for a resumption.
        checkpoint_every: rounds between two checkpoints, 1 or more.
        restart_command: what goes on with the run once --resume stands behind it, for a shell in any folder.
        is_made_for_it: whether the folder, although it is there, was made for this run and by nobody else.
        Raises ValueError where the folder holds a run (with `resume`: holds none, or one that has ended), cannot be
        written, or is in use by another process.
        """
        self.path = path
        self._initial_model = initial_model
        self._checkpoint_every = checkpoint_every
        self._resumes = resume
        self._restart_command = restart_command
        self.client_states = StateFiles(path / CLIENT_STATES_FOLDER)
        self._metrics = GrowingFile(path / METRICS_FILE)
        self._failing: set[str] = set()
        self._saved: tuple[Phase, int, bool, int] | None = None
        if resume:
            read_unfinished_run(path)
        self._claim = ClaimedFolder(path, "--resume" if resume else "--run_dir", is_made_for_it)
        if not resume and self._has_begun:
            self.close()
            raise ValueError(
                f"--run_dir {path} already holds a run; name another folder, or move that one away (an unfinished one "
                f"goes on with: {self.continue_command})"
            )

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

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run has a state to go on from, read or not."""
        return any((self.path / CHECKPOINT_FOLDER).glob("*.safetensors"))

    @property
    def _has_begun(self) -> bool:
        return (self.path / CONFIG_FILE).exists()

    def discard_unless_begun(self) -> None:
        """Where the run has not begun, leave what was there before: no folder, or the user's own as it was."""
        if not self._has_begun:
            self._claim.discard()

    def close(self) -> None:
        """Let others use the folder, and log no more to it. A process that ends need not call it."""
        self._claim.close()

    def begin(
        self,
        config: ExperimentConfig,
        clients: ClientDirectory,
        run_settings: dict[str, Any],
        kernels: KernelLog | None = None,
    ) -> ExperimentState | None:
        """Write config.json, from which on the folder holds a run; or find the state where the run goes on.

        run_settings: what does not change the result (command, processes, devices).
        kernels: how the run's processes compute; those of its earlier parts are added.
        Returns None for a run that starts at its first round. Raises ValueError where the folder's run is another
        experiment, was made with other data, or has no checkpoint that can be read; OSError for a full disk.
        """
        assert config.is_settled, "a run is one experiment for good"
        kernels = kernels or KernelLog()
        own_code = {"own_code": sources()} if sources() else {}
        environment = {**describe_environment(), "kernels": kernels.to_dict(), **own_code}
        identity = RunIdentity(config, clients.fingerprint, {"commit": environment["commit"]}, kernels)
        self._clients = clients
        self._checkpoints = Checkpoints(self.path / CHECKPOINT_FOLDER, identity, self.client_states)
        population = Population.main(len(clients.unseen_client_ids))
        self._events: EventFile | None = EventFile(
            self.path / "tensorboard", config.phases, config.metric_names, population
        )
        with self._needing_room():
            state = self._go_on(config, run_settings, environment) if self._resumes else None
            if not self._resumes:
                self._metrics.replace(b"")  # so that it is there also where there is no round
                origin = {} if self._initial_model is None else {INITIAL_MODEL: str(self._initial_model)}
                settings = {"experiment": config.to_dict(), **origin, "run": run_settings}
                self._write_json(CONFIG_FILE, {**settings, "environment": environment})
        LOGGER.info("if this ends early, it goes on with: %s", self.continue_command)
        return state

    def _go_on(
        self, config: ExperimentConfig, run_settings: dict[str, Any], environment: dict[str, Any]
    ) -> ExperimentState | None:
        state = self._checkpoints.load()
        recorded = dict(read_unfinished_run(self.path).content)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        earlier = from_plain(list[Any], recorded.get("resumed", []), "config.json: resumed")
        recorded["resumed"] = [*earlier, {"time": now, "run": run_settings, "environment": environment}]
        self._write_json(CONFIG_FILE, recorded)
        self._cut_metrics_back([] if state is None else _recorded_rounds(config, state))
        if state is None:
            say(f"{self.shown_path} has no checkpoint yet, so it starts from its first round")
        else:
            self._saved = state.progress
            say(f"{self.shown_path} goes on after {state.label}")
        return state

    def _cut_metrics_back(self, expected: Sequence[tuple[Phase, int]]) -> None:
        """Keep the lines and the events of these rounds only."""
        lines: list[str] = []
        records: list[RoundRecord] = []
        with contextlib.suppress(ValueError):  # of the first line that is damaged
            for (line, values), place in zip(read_metrics(self.path), expected, strict=False):
                record = record_of(values)
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

    def phase_started(self, phase: Phase, num_rounds: int, num_recorded: int) -> None:
        LOGGER.info("%s: %d rounds, %d of them done", phase.label, num_rounds, num_recorded)

    def round_ended(self, record: RoundRecord) -> None:
        say_divergence_in_round(record, self._clients)
        for rank, reason in record.lost_workers.items():
            LOGGER.warning("%s round %d: worker %d was lost: %s", record.phase.label, record.round_number, rank, reason)
        names = {client_id: client_name(self._clients, client_id) for client_id in record.refused}
        known = {client_id: name for client_id, name in names.items() if name is not None}
        line = to_json({**record.to_dict(), **({_NAMES: known} if known else {})})
        self._attempt(METRICS_FILE, lambda: self._metrics.append(line))
        self._write_events(lambda events: events.append(record))

    def checkpoint_due(self, state: ExperimentState) -> None:
        if state.num_rounds % self._checkpoint_every == 0 or state.phase in state.scores:
            with state.lock:
                self._attempt("a checkpoint", lambda: self.save_checkpoint(state))

    def scoring_started(self, phase: Phase, population: Population, num_clients: int) -> None:
        LOGGER.info("%s: scoring %d %s clients", phase.label, num_clients, population.value)

    def phase_ended(self, phase: Phase, scores: RunScores) -> None:
        say_divergence_in_scores(phase, scores[phase], self._clients)
        self._attempt(CLIENTS_FILE, lambda: self._write_clients(scores))

    def keep_start(self, state: ExperimentState) -> None:
        """Save a state before its first round, for a start that cannot be made again from the seed.

        Raises OSError, one line with the fix, where there is no room.
        """
        with self._needing_room(), state.lock:
            self.save_checkpoint(state)

    def save_checkpoint(self, state: ExperimentState) -> None:
        """Save the state, and before it the lines of metrics.jsonl that it stands for. The caller holds its lock.

        Does nothing where it has been saved already. Raises OSError or ValueError as `Checkpoints.save` does.
        """
        if state.progress != self._saved:
            self._metrics.flush(to_disk=True)
            self._checkpoints.save(state)
            self._saved = state.progress

    def write_result(
        self, outcome: ExperimentOutcome, model: nn.Module, facts: ModelFacts, result: Mapping[str, Any]
    ) -> None:
        """Write model, clients.csv and, last, result.json; then remove the checkpoints. What clients keep stays.

        `model` takes the final parameters.
        Raises OSError, one line with the fix, where there is no room; the checkpoints are then kept.
        """
        unflatten_into(model, outcome.parameters.clone())
        try:
            self._metrics.flush(to_disk=True)
            self.client_states.versions()  # which are on the disk then
            replace_file(self.path / MODEL_FILE, model_file(model, facts.to_metadata()))
            self._write_clients(outcome.scores)
            self._write_json(RESULT_FILE, result)
        except OSError as error:
            raise OSError(
                f"the results cannot be written to {self.path} ({error.strerror}); make room there, then continue "
                f"with: {self.continue_command}"
            ) from error
        self._checkpoints.remove()

    def _write_clients(self, scores: RunScores) -> None:
        replace_file(self.path / CLIENTS_FILE, clients_csv(scores, self._clients))

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        replace_file(self.path / name, to_json(content, indent=2))

    def _write_events(self, write: Callable[[EventFile], None]) -> None:
        """The run goes on without them where they cannot be made at all, as with a tensorboard that does not import."""
        if self._events is None:
            return
        try:
            self._attempt("tensorboard", partial(write, self._events))
        except Exception as error:
            self._events = None
            say(f"no events for TensorBoard from now on: {reason_of(error)}")

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write, or report once that there is no room for it, and once when there is again."""
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

    @contextlib.contextmanager
    def _needing_room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"{self.path} cannot be written ({error.strerror}); make room there") from error


def record_of(values: dict[str, Any]) -> RoundRecord:
    """What a line of metrics.jsonl says. Raises ValueError where it is none."""
    return RoundRecord.from_dict({name: value for name, value in values.items() if name != _NAMES})


def _recorded_rounds(config: ExperimentConfig, state: ExperimentState) -> list[tuple[Phase, int]]:
    """The rounds, in order, of which a state says that they were recorded."""
    counts = {phase: settings.num_rounds for phase, settings in config.phases.items() if phase < state.phase}
    counts[state.phase] = state.num_recorded
    return [(phase, number) for phase, count in counts.items() for number in range(1, count + 1)]
