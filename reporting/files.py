"""The forms of a report: Markdown for the terminal and for repositories, one HTML page, CSV."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

import jinja2

from perfedavg.recording.files import replace_file
from reporting.contents import Block, Heading, Plot, Report

_PLOTS = "plots"
"""The folder, beside report.md, of the pictures that it shows."""


def write_report(report: Report, folder: Path) -> None:
    """Write report.md with its plots, table.csv and report.html, which needs no other file, into a folder.

    The folder is created; files of an earlier report are replaced. Raises ValueError where it cannot be written.
    """
    plots = [block for section in report.sections for block in section.blocks if isinstance(block, Plot)]
    try:
        (folder / _PLOTS).mkdir(parents=True, exist_ok=True)
        for plot in plots:
            replace_file(folder / _PLOTS / f"{plot.name}.png", plot.light)
        for name, text in (
            ("report.md", to_markdown(report, with_plots=True)),
            ("table.csv", report.csv),
            ("report.html", to_html(report)),
        ):
            replace_file(folder / name, text.encode(errors="backslashreplace"))  # a folder's name may be no UTF-8
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be written ({error.strerror}); name another folder") from error


def to_markdown(report: Report, with_plots: bool) -> str:
    """with_plots: as links to files in the folder beside it; a terminal shows none."""
    parts = [f"# {report.title}", report.summary]
    for section in report.sections:
        parts.append(f"## {section.title}")
        parts += [_markdown(block) for block in section.blocks if with_plots or not isinstance(block, Plot)]
    return "\n\n".join(parts) + "\n"


def to_html(report: Report) -> str:
    """One page that refers to nothing outside itself, for light and dark screens."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png_url"] = _png_url
    environment.tests["heading"] = lambda block: isinstance(block, Heading)
    environment.tests["plot"] = lambda block: isinstance(block, Plot)
    return environment.get_template("report.html.jinja").render(report=report)


def _png_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"### {block.text}"
    if isinstance(block, str):
        return block
    if isinstance(block, Plot):
        return f"![{block.description}]({_PLOTS}/{block.name}.png)"
    alignment = ["---" if header in block.words else "---:" for header in block.headers]
    return "\n".join(_markdown_line(cells) for cells in (block.headers, alignment, *block.rows))


def _markdown_line(cells: Iterable[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
