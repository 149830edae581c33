"""Entry point: a method's settings, or those of a table's rows, searched on validation clients."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.rows import CHOSEN, fixed_settings, select_rows, table_names
from launch import paths
from launch.commands import differing_words, flag_words
from launch.flags import parse
from launch.parser import build_parser
from launch.paths import ROOT
from launch.settings import Checked, SingleProcess
from perfedavg.fields import flags_by_name, setting
from perfedavg.machine.kernels import pin_kernels_or_restart
from perfedavg.own_files import shown_dataset
from perfedavg.settings import Compute
from perfedavg.terminal.console import command_line, say, show
from perfedavg.terminal.entry_point import at_early_end, run_entry_point
from tuning.space import SET_BY_SEARCH

if TYPE_CHECKING:
    from tuning.search import Plan

_MACHINE = ("data_root", *flags_by_name(Compute))
"""Flags of single_process.py that do not change a result."""


@dataclass(frozen=True, kw_only=True)
class Tune(Checked):
    """Search a method's settings, or those of a table's rows, on validation clients: training clients that are held
    out, so that no unseen client is ever looked at. The experiment's flags are those of single_process.py, such as
    --dataset D --method M.

    The first trial is the experiment as it is. A search that was stopped goes on when it is started again, and several
    processes may share one.
    """

    heading = "what is searched"
    search: tuple[str, ...] = setting(
        (),
        "NAME=LOW..HIGH, with :log behind it by its logarithm, or NAME=A,B,C; 2x is twice the value that it has; may "
        "be given several times",
        metavar="NAME=RANGE",
        many=True,
        absent="each setting with a range of interest: the clients' rate, and what the method has",
    )
    objective: str | None = setting(
        None,
        "what counts, of validation clients after the last phase: personalized or initial, and a metric; _p10 behind "
        "it for the tenth percentile of clients",
        metavar="KIND_METRIC",
        absent="personalized_accuracy, in a regression personalized_loss",
    )
    table: str | None = setting(
        None,
        "a table, whose rows are searched one after the other in place of an experiment's flags",
        choices=table_names(),
        title="rows of a table",
    )
    rows: tuple[str, ...] = setting(("all",), "which of them", metavar="NAME", many=True, title="rows of a table")
    chosen: Path = setting(
        CHOSEN,
        "where what is chosen for rows is kept, a file a table",
        parse=paths.folder,
        metavar="FOLDER",
        absent="experiments/chosen",
        title="rows of a table",
    )
    trials: int = setting(20, "trials of each search, the experiment as it is among them", at_least=1, title="budget")
    trial_rounds: int | None = setting(
        None,
        "rounds of a trial, which shorten its phases in proportion",
        at_least=1,
        absent="the experiment's",
        title="budget",
    )
    points: int = setting(5, "points of a trial's curve, at which it may be given up", at_least=1, title="budget")
    seed: int = setting(
        100,
        "of the clients, of the training and of what is tried; another one than that of results",
        at_least=0,
        at_most=2**63 - 1,
        title="budget",
    )
    studies: Path = setting(
        ROOT / "runs" / "tune",
        "where searches are kept, a folder each",
        parse=paths.folder,
        metavar="FOLDER",
        absent="runs/tune",
        title="where it is kept",
    )


def main(argv: Sequence[str] | None = None) -> None:
    others: list[str] = []
    args = parse(Tune, argv, others)
    experiments = read_experiments(args, others)
    portable = parse(SingleProcess, next(iter(experiments.values()))).experiment.portable_kernels
    pin_kernels_or_restart(portable, ROOT / "tune.py", sys.argv[1:] if argv is None else argv)

    from perfedavg.training.compute import use_reproducible_kernels
    from tuning.search import run_command, search
    from tuning.trial import Trials

    use_reproducible_kernels()
    withdraw = at_early_end(_say_how_to_go_on)
    try:
        if args.table is not None:
            search_rows(args, experiments, others)
            return
        ((name, words),) = experiments.items()
        choice = search(plan_of(args, name, words), Trials())
        if choice is not None:
            show(f"\nrun it with: {run_command(words, choice.settings)}")
    finally:
        withdraw()


def search_rows(args: Tune, experiments: Mapping[str, Sequence[str]], others: Sequence[str]) -> None:
    """Search the rows one after the other, and write what is chosen for each.

    experiments: the rows' command lines, by their names.  others: what of them the command line gave.
    Raises ValueError where a row cannot be searched, when the others have been.
    """
    from tuning.chosen import write_chosen
    from tuning.search import search
    from tuning.trial import Trials

    assert args.table is not None, "rows are those of a table"
    trials, left_out = Trials(), []
    for name, words in experiments.items():
        try:
            choice = search(plan_of(args, name, words), trials)
        except ValueError as error:
            say(f"{args.table} {name}: {error}")
            left_out.append(name)
            continue
        if choice is not None:
            space = tuple(f"{setting}={text}" for setting, text in choice.summary["space"].items())
            study = {**choice.summary, "command": search_command(replace(args, rows=(name,), search=space), others)}
            path = write_chosen(args.chosen, args.table, name, choice.settings, study)
            show(f"it is in {paths.shown(path)}\n")
    if left_out:
        raise ValueError(f"nothing was chosen for {', '.join(left_out)}, for the reasons above")


def plan_of(args: Tune, name: str, words: Sequence[str]) -> Plan:
    """The search for an experiment, or for a row of the table, of this name. words: its command line."""
    from tuning.search import Plan

    return Plan(
        f"{args.table} {name}" if args.table else name,
        words,
        fixed_settings(args.table, name) if args.table else (),
        args.search,
        args.objective,
        args.trials,
        args.trial_rounds,
        args.points,
        args.seed,
        args.studies / (args.table or ".") / name,
    )


def _say_how_to_go_on(reason: signal.Signals | BaseException) -> None:
    if isinstance(reason, signal.Signals):
        say("the trials that have ended are kept; the same command goes on")


def read_experiments(args: Tune, others: Sequence[str]) -> dict[str, list[str]]:
    """The command lines of the experiments, by the names of their searches.

    others: of the command line, what is none of the search's own flags.
    Raises ValueError where one is no experiment, or gives what the search sets itself.
    """
    given = _given(others)
    for name in SET_BY_SEARCH:
        if name in given:
            raise ValueError(f"--{name} {given[name]} is nothing to give here: a search sets it itself; leave it out")
    if args.table is None:
        if args.rows != ("all",):
            raise ValueError(f"--rows {' '.join(args.rows)} needs --table, whose rows they are")
        config = parse(SingleProcess, others).experiment
        phases = [phase.method.name for phase in config.phases.values()]
        name = "-".join([shown_dataset(config.dataset), *phases]).replace(":", ".").replace("/", ".")
        return {name: list(others)}
    if "dataset" in given:
        raise ValueError(f"--dataset {given['dataset']} does not go with --table, whose rows name theirs; leave it out")
    rows = select_rows(args.table, args.rows, with_chosen=False)
    return {name: [*flag_words(flags), *others] for name, flags in rows.items()}


def search_command(args: Tune, others: Sequence[str]) -> str:
    """What repeats a search on any machine, as the summary of its study has it: with its space, because what methods
    declare may change.
    """
    own = differing_words(args, leave_out=("studies", "chosen"))
    experiment = flag_words({name: text for name, text in _given(others).items() if name not in _MACHINE})
    return command_line(["python", "tune.py", *own, *experiment])


def _given(words: Sequence[str]) -> dict[str, str]:
    """The flags that words of single_process.py give, as texts. Raises ValueError where a word is none."""
    parse_own = build_parser(SingleProcess)
    namespace, unknown_words = parse_own.parse_known_args(words)
    if unknown_words:
        parse_own.refuse(unknown_words[0], flags_by_name(SingleProcess))
    return vars(namespace)


if __name__ == "__main__":
    run_entry_point(main)
