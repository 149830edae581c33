"""What pytest shows of this suite: how far each folder is, and in the end each reason why tests were skipped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

STEPS = 10
"""Lines that each folder gets."""


class Progress:
    """In place of a dot for each test, a line whenever a folder has got a tenth further, and one for what failed."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._began = time.monotonic()
        self._total: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        """With pytest-xdist every worker collects all tests; they are the same."""
        self._expect(ids)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No letters. The categories are pytest's own, from which it counts."""
        if hasattr(report, "wasxfail"):
            return None
        if report.failed:
            return "failed" if report.when == "call" else "error", "", "FAILED"
        if report.skipped:
            return "skipped", "", "SKIPPED"
        return ("passed", "", "PASSED") if report.when == "call" else ("", "", "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._write(f"FAILED {report.nodeid}")
        if report.skipped and isinstance(report.longrepr, tuple):
            self._skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        if report.when == "teardown":
            self._count(_folder(report.nodeid))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for reason, number in sorted(self._skipped.items()):
            terminalreporter.write_line(f"skipped {number}: {reason}")

    def _expect(self, ids: Iterable[str]) -> None:
        self._total = Counter(map(_folder, ids))

    def _count(self, folder: str) -> None:
        self._done[folder] += 1
        done, total = self._done[folder], self._total[folder]
        if done * STEPS // total > (done - 1) * STEPS // total:
            self._write(f"{time.monotonic() - self._began:4.0f} s  {folder}: {done} of {total}")

    def _write(self, line: str) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.write_line(line)


def _folder(nodeid: str) -> str:
    return nodeid.partition("::")[0].rpartition("/")[0]
