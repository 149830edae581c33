"""An experiment as its user meets it: progress on the terminal, a folder of results, a table at the end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from perfedavg.contracts import ClientDirectory, Executor, Observer
from perfedavg.engine.experiment import (
    ExperimentOutcome,
    ExperimentState,
    RoundRecord,
    check_clients,
    experiment_rounds,
)
from perfedavg.recording.model_file import ModelFacts
from perfedavg.recording.results import summarize_run
from perfedavg.recording.run_folder import RunFolder
from perfedavg.settings import ExperimentConfig
from perfedavg.terminal.console import optional, say, show
from perfedavg.terminal.display import ProgressDisplay, result_table
from perfedavg.terminal.entry_point import at_early_end
from perfedavg.training.flat_model import flatten
from perfedavg.training.layout import count_buffer_entries

SAVE_TIMEOUT_SECONDS = 30.0
"""How long a signal waits for a server step or a checkpoint that is under way."""


def run_and_record(
    config: ExperimentConfig,
    executor: Executor,
    clients: ClientDirectory,
    model: nn.Module,
    folder: RunFolder,
    run_settings: dict[str, Any],
) -> None:
    """Run and record the experiment as `recorded_rounds` does, show its progress, and print the result table."""

    def show_table(result: dict[str, Any]) -> None:
        with optional("no table of the results"):
            show(f"\n{result_table(result, config, getattr(clients, 'note', ''))}")

    with ProgressDisplay(config, clients) as display:
        for _ in recorded_rounds(config, executor, clients, model, folder, run_settings, [display], show_table):
            pass
    show(f"results in {folder.shown_path}")


def recorded_rounds(
    config: ExperimentConfig,
    executor: Executor,
    clients: ClientDirectory,
    model: nn.Module,
    folder: RunFolder,
    run_settings: dict[str, Any],
    observers: Sequence[Observer] = (),
    take_result: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[RoundRecord]:
    """Run the experiment round by round, from the model's weights or from where the folder's run was stopped.

    Records it in the folder. Whatever ends it early, a signal, an error or a caller who takes no more rounds, leaves a
    checkpoint and a line that tells how to go on. Plots are left to the caller, for when no worker waits for the end.
    model: with the weights to start from, which are not needed where the folder has a checkpoint; at the end with the
        final ones.
    run_settings: as `RunFolder.begin` takes them; `world_size` among them.
    observers: besides the folder.
    take_result: is given the content of result.json, also where there is no room for the file.
    """
    check_clients(config, clients)  # before there is anything in the folder
    state = folder.begin(config, clients, run_settings, executor.kernels)
    if state is None:
        num_buffer_entries = count_buffer_entries(model)
        state = ExperimentState.fresh(config, flatten(model), num_buffer_entries, folder.client_states)
        if config.initial_model is not None:  # whose file need not be there when the run is resumed
            folder.keep_start(state)
    _check_size(state, model, folder)
    keeper = _StateKeeper(folder, state)
    withdraw = at_early_end(keeper.end_early)
    try:
        yield from experiment_rounds(config, executor, clients, state, [folder, *observers])
        outcome = ExperimentOutcome.of(state)
        facts = {
            "train_clients": len(clients.train_client_ids),
            "unseen_clients": len(clients.unseen_client_ids),
            "world_size": run_settings["world_size"],
            "data_fingerprint": clients.fingerprint,
            "kernels": executor.kernels.to_dict(),
        }
        result = summarize_run(config, outcome, facts)
        try:
            with state.lock:
                folder.write_result(outcome, model, ModelFacts.of(config, clients), result)
                keeper.has_ended = True
        finally:
            if take_result is not None:
                take_result(result)
    except BaseException as error:
        keeper.end_early(error)
        raise
    finally:
        withdraw()


def _check_size(state: ExperimentState, model: nn.Module, folder: RunFolder) -> None:
    """Raises ValueError where the state is another model's, as of a user's own class that has been changed since."""
    saved, present = state.server.parameters.numel(), flatten(model).numel()
    if saved != present:
        raise ValueError(
            f"the run in {folder.shown_path} has a model of {saved:,} parameters, and the model is now of {present:,}; "
            "restore the model's code, or start a new run"
        )


class _StateKeeper:
    """Saves the state of a run that ends early.

    has_ended: whether the run came to its good end, so that there is nothing to save.
    """

    def __init__(self, folder: RunFolder, state: ExperimentState) -> None:
        self._folder = folder
        self._state = state
        self.has_ended = False

    def end_early(self, reason: signal.Signals | BaseException) -> None:
        """Save a checkpoint and say how to go on.

        After a signal, which comes in the main thread while the run's own thread goes on, the state stays locked:
        the process is about to end, and nothing after this checkpoint may be recorded.
        """
        if not self._state.lock.acquire(timeout=SAVE_TIMEOUT_SECONDS):
            say(f"no checkpoint was saved: a step has been under way for {SAVE_TIMEOUT_SECONDS:.0f} s")
            return
        try:
            if not self.has_ended:
                self._save()
        finally:
            if isinstance(reason, BaseException):
                self._state.lock.release()

    def _save(self) -> None:
        state, command = self._state, self._folder.continue_command
        if not state.has_begun:
            say("no round has ended yet, so there is nothing to save")
            return
        if state.step_failed:
            say(f"{state.label} failed in its middle; continue from the checkpoint before it with: {command}")
            return
        try:
            self._folder.save_checkpoint(state)
        except OSError as error:
            say(
                f"the checkpoint of {state.label} cannot be written ({error.strerror}); make room in "
                f"{self._folder.shown_path}, then continue from the one before it with: {command}"
            )
        except ValueError as error:
            say(f"no checkpoint of {state.label} was saved ({error}); continue from the one before it with: {command}")
        else:
            say(f"checkpoint of {state.label} saved; continue with: {command}")
