"""A run as it goes on: its rounds, each as it ends, and what is left when it has ended, or is given up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from perfedavg import own_module
from perfedavg.machine.kernels import UnpinnedKernelsError, pin_kernels
from perfedavg.terminal.console import quiet
from python_api.finished import Run, open_run
from python_api.keywords import to_words
from python_api.processes import LaunchedRun

if TYPE_CHECKING:
    from perfedavg.engine.experiment import RoundRecord


def run(
    *, workers: int = 0, progress: bool = False, on_round: Callable[[RoundRecord], None] | None = None, **settings: Any
) -> Run:
    """Run an experiment to its end, and return what came of it.

    workers: processes that train clients on this machine; 0 trains them in this process.
    progress: whether to print how it gets on.
    on_round: is told of each round as it ends.
    settings: the flags of `single_process.py --help` by their names, such as `rounds=20`; `dataset`, `model`, `method`,
        `fine_tune_method` and `metrics` may be objects in place of names, with workers only what they can import.
        `resume=FOLDER` goes on with a run that was stopped. Without `run_dir`, a run's folder is made in `runs` of the
        current folder.
    Raises ValueError or OSError, in one line, where the experiment cannot be run. Whatever ends it early, as Ctrl-C
    does, leaves a checkpoint and no process.
    """
    with rounds(workers=workers, progress=progress, **settings) as going_on:
        for record in going_on:
            if on_round is not None:
                on_round(record)
    return going_on.result


def rounds(*, workers: int = 0, progress: bool = False, **settings: Any) -> Rounds:
    """Begin an experiment, of which the loop over what this returns takes one round after the other:

        for record in perfedavg.rounds(dataset="digits", rounds=20):
            print(record.round_number, record.train_loss)

    Arguments as `run` takes them. See `Rounds`.
    """
    return Rounds(workers, progress, settings)


class Rounds(Iterator["RoundRecord"]):
    """The rounds of a run that goes on, of both its phases, each when it has ended.

    A loop that is left early, `close`, the end of a `with` block or of the object itself stop the run, with a
    checkpoint: `resume=folder` goes on with it. A run with workers does not wait for the loop.

    folder: of the run, as `perfedavg.open` takes it.
    """

    folder: Path
    _rounds: Iterator[RoundRecord]

    def __init__(self, workers: int, progress: bool, settings: dict[str, Any]) -> None:
        """Arguments as `run` takes them. Raises ValueError for settings that cannot be."""
        self._source: LaunchedRun | RunHere | None = None
        if own_module.is_importing():
            raise ValueError("the module begins a run when it is imported; begin it under if __name__ == '__main__'")
        if settings.keys().isdisjoint({"resume", "config"}):
            settings = {"dataset": "digits", **settings}
        words = to_words(settings, with_workers=workers > 0)
        self._source = LaunchedRun(workers, progress, words) if workers else RunHere(progress, words)
        self.folder = self._source.folder
        self._rounds = self._source.rounds()

    def __next__(self) -> RoundRecord:
        try:
            return next(self._rounds)
        except BaseException:  # also where there is none any more
            self.close()
            raise

    def close(self) -> None:
        """Stop the run where it goes on; no more rounds come."""
        if self._source is not None:
            self._source.close()
            self._rounds = iter(())

    @property
    def result(self) -> Run:
        """What came of it. Raises ValueError where it has not ended."""
        return open_run(self.folder)

    def __enter__(self) -> Rounds:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


class RunHere:
    """A run in this process, whose settings of torch and terminal are its own between two rounds."""

    def __init__(self, progress: bool, words: list[str]) -> None:
        """Arguments as `LaunchedRun` takes them."""
        args = utils.get_args("single", words)
        try:
            pin_kernels(args.experiment.portable_kernels)
        except UnpinnedKernelsError as error:
            raise ValueError(f"{error}; use workers=1, or begin before anything imports torch") from None
        self._progress = progress
        with self._quiet():
            self._folder = utils.new_run_folder(args, Path.cwd() / "runs")
        self.folder = self._folder.path
        self._run = self._go_on(args, ["perfedavg.run", *words])

    def rounds(self) -> Iterator[RoundRecord]:
        from perfedavg.training.compute import reproducible_kernels

        while True:
            with self._quiet(), reproducible_kernels():
                record = next(self._run, None)
            if record is None:
                return
            yield record

    def close(self) -> None:
        with self._quiet():
            self._run.close()
            self._folder.discard_unless_begun()
            self._folder.close()

    def _go_on(self, args: Any, command: list[str]) -> Generator[RoundRecord, None, None]:
        from perfedavg.recorded_run import recorded_rounds
        from perfedavg.terminal.display import ProgressDisplay

        local = utils.prepare_local(args, self._folder, command)
        with contextlib.ExitStack() as stack:
            observers = []
            if self._progress:
                observers.append(stack.enter_context(ProgressDisplay(local.config, local.clients)))
            yield from recorded_rounds(*local, observers)

    def _quiet(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._progress else quiet()
