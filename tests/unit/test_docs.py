"""The pages that people read: links lead somewhere, commands have flags that exist, the README stays short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT

from launch.flags import parse
from launch.settings import ENTRY_POINTS
from perfedavg.fields import flags_by_name

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "results" / "README.md"]
SCRIPTS = {
    "quick_start.sh": "quick_start",
    "quick_start.py": "quick_start",
    "single_process.py": "single",
    "server.py": "server",
    "client_worker.py": "worker",
    "cluster.py": "cluster",
    "server_or_worker.py": "server_or_worker",
    "datasets.describe": "describe",
}
"""What commands start, by the name of its flags' class."""


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links {target}"
        if anchor:
            assert anchor in anchors_of(linked), f"{page.name} links {target}"


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def blocks(page: Path, *languages: str) -> list[str]:
    """The content of a page's blocks of code in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The entry points that a page's blocks of commands start, and the words behind each."""
    for block in blocks(page, "sh", "bash", "dockerfile"):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(rf"({'|'.join(map(re.escape, SCRIPTS))})( .*|$)", line)
            if found is not None and re.search("python|sh |torchrun ", line):
                yield SCRIPTS[found[1]], found[2].split("#")[0].split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_flags_that_exist_under_their_present_names(page: Path) -> None:
    for role, words in commands(page):
        given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        own = re.findall(r"^ {4}(\w+): .* = setting\(", page.read_text(), re.MULTILINE)  # of a method on the page
        known = {*flags_by_name(ENTRY_POINTS[role]), "config", "help", *own}
        assert given <= known, f"{page.name}: {shlex.join(words)} of {role}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_of_experiments_that_can_be(page: Path) -> None:
    """A default that changes, such as how many clients train, can make one that is refused."""
    for role, words in commands(page):
        stands_for_another = re.search(r"(^| )([A-Z]+|\.\.\.|my_\w+:\S+|--help|--resume)( |$)", " ".join(words))
        if not stands_for_another:
            parse(ENTRY_POINTS[role], words)


def test_the_tests_above_read_commands() -> None:
    assert len(list(commands(ROOT / "README.md"))) >= 7
    assert len(list(commands(ROOT / "docs" / "several-machines.md"))) >= 7


def test_no_page_names_a_flag_by_an_older_name() -> None:
    flags = [flag for kind in ENTRY_POINTS.values() for flag in flags_by_name(kind).values()]
    older = {alias for flag in flags for alias in flag.aliases}
    assert "inner_loops" in older
    for page in PAGES:
        if page.name in ("flags.md", "CHANGELOG.md"):
            continue
        text = re.sub(r"personalize\.py.*|`--epochs`, `--batch_size`", "", page.read_text())
        named = set(re.findall(r"--(\w+)", text)) & older
        assert not named, f"{page.name} names {named}"


def test_the_readmes_own_model_is_one() -> None:
    """It is built for the inputs and outputs of every data set of images."""
    (source,) = [block for block in blocks(ROOT / "README.md", "python") if "--model my_net:small" in block]
    names: dict[str, Any] = {}
    exec(source, names)
    assert names["small"]((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_flags_in_the_readmes_table_exist() -> None:
    table = set(re.findall(r"^\| `--(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    named = {name for kind in ENTRY_POINTS.values() for name in flags_by_name(kind)}
    assert table <= named
    assert len(table) >= 8
