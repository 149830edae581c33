"""The table and the plots of the sine task, from its finished runs; `python -m experiments.sine_table` makes them.

Rows are the methods: MAML and FOMAML (Finn, Abbeel, Levine 2017, arXiv 1703.03400), Reptile (Nichol, Achiam, Schulman
2018, arXiv 1803.02999), and joint training, the baseline that has no reason to end where adaptation is fast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

from experiments.rows import select_rows
from launch import paths
from launch.flags import parse
from launch.paths import ROOT
from launch.settings import Checked
from perfedavg.fields import setting
from perfedavg.terminal.console import command_line, optional, say, show
from perfedavg.terminal.entry_point import run_entry_point


def _write(image: Callable[[], bytes], path: Path) -> None:
    """The table is the result: where a plot cannot be had, a line says so."""
    from perfedavg.recording.files import replace_file

    with optional(f"no plot in {path}"):
        replace_file(path, image())
        say(f"plot in {path}")


@dataclass(frozen=True, kw_only=True)
class SineTable(Checked):
    """Print the errors of the sine task's finished runs as a Markdown table, and draw them (mse.png) and how the models
    adapt (adaptation.png).
    """

    program: ClassVar[str] = "python -m experiments.sine_table"
    folder: Path = setting(
        MISSING, "with <method>/seed<k>/result.json in it, at any depth", parse=paths.folder, positional=True
    )
    output: Path | None = setting(
        None, "for the plots", parse=paths.folder, metavar="FOLDER", absent="the first folder"
    )
    models: Path = setting(
        ROOT / "runs" / "reproduce" / "sine",
        "with <method>/seed<k>/, the folders of these runs, for their models",
        parse=paths.path,
        metavar="FOLDER",
        absent="runs/reproduce/sine",
    )


def main() -> None:
    args = parse(SineTable)

    from reporting import sine_errors
    from reporting.drawing import png
    from reporting.pictures.theme import LIGHT, render

    rows = sine_errors.read_rows(args.folder, list(select_rows("sine")))
    if not rows:
        raise ValueError(
            f"{args.folder} holds no finished run of the sine task (<method>/seed<k>/result.json); make them with: "
            f"{command_line([sys.executable, ROOT / 'reproduce.py', '--table', 'sine'])}"
        )
    show(sine_errors.to_markdown(rows))
    output = args.output or args.folder
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output} cannot be made ({error.strerror}); name another folder") from error
    _write(lambda: render(sine_errors.draw_errors(rows), LIGHT), output / "mse.png")

    from experiments.sine_adaptation import load_models, plot_adaptation

    models = load_models(rows, args.models)
    if models:
        _write(lambda: png(lambda: plot_adaptation(models), 120), output / "adaptation.png")


if __name__ == "__main__":
    run_entry_point(main)
