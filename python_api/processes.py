"""A run in processes of its own, as quick_start.py starts them, followed by what it writes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import utils
from launch.paths import ROOT
from launch.settings import QuickStart
from perfedavg.machine.processes import ENDS_WITH_INPUT, TERMINATE_SECONDS
from perfedavg.plain_values import parse_json
from perfedavg.recording.folders import make_default_folder, remove_empty
from perfedavg.recording.runs import METRICS_FILE
from python_api.keywords import import_path

if TYPE_CHECKING:
    from perfedavg.engine.experiment import RoundRecord

POLL_SECONDS = 0.05
_ERROR = "error: "


class LaunchedRun:
    """A server and its workers on this machine, which end when they are closed, and when this process does.

    folder: of the run.
    """

    def __init__(self, workers: int, progress: bool, words: list[str]) -> None:
        """words: a command line of quick_start.py, without --workers.  progress: whether to show what it says.

        Raises ValueError for one that cannot be.
        """
        words = [*words, f"--workers={workers}"]
        args = utils.get_args("quick_start", words)
        utils.check_num_workers(args, workers)
        self._made: list[Path] = []
        if args.resume is None and args.run_dir is None:
            self._made = [make_default_folder(Path.cwd() / "runs", args.experiment.dataset)]
            words.append(f"--run_dir={self._made[0]}")
        self.folder: Path = args.resume or args.run_dir or self._made[0]
        self._progress = progress
        self._metrics = _GrowingLines(self.folder / METRICS_FILE)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115, closed in close
        self._num_shown = 0
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / QuickStart.script), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._output,
            env={**os.environ, "PYTHONPATH": import_path(), ENDS_WITH_INPUT: "1"},
            start_new_session=True,  # Ctrl-C is for this process, which then ends the others
        )

    def rounds(self) -> Iterator[RoundRecord]:
        """Raises ValueError in the line in which the run says why it failed, RuntimeError for a bug or a signal."""
        from perfedavg.recording.run_folder import record_of

        has_ended = False
        while not has_ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(POLL_SECONDS)
            has_ended = self._process.poll() is not None  # before the last look at what it wrote
            for line in self._metrics.take():
                yield record_of(parse_json(line))
            if self._progress:
                sys.stderr.write(self._read_output(self._num_shown))
        self._raise_failure()

    def close(self) -> None:
        """Stop the run where it goes on; it saves a checkpoint."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(2 * TERMINATE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._output.close()
        remove_empty(self._made)  # where nothing came of it

    def _raise_failure(self) -> None:
        status = self._process.returncode
        if status == 0:
            return
        lines = self._read_output(0).splitlines()
        errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        if errors:
            raise ValueError(errors[-1])
        last = " / ".join(lines[-20:])
        raise RuntimeError(f"the run in {self.folder} ended with status {status}: {last}")

    def _read_output(self, first: int) -> str:
        """What the run has said from a byte on."""
        content = os.pread(self._output.fileno(), 2**30, first)
        self._num_shown = first + len(content)
        return content.decode(errors="replace")


class _GrowingLines:
    """The lines that a run adds to its metrics.jsonl from now on.

    A run that goes on writes the file anew, with the rounds before its checkpoint as they were. Those after it differ
    from what was there, for each says how long it took.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: list[bytes] = []
        self._old_file: int | None = None
        self._num_read: int | None = None  # bytes; None before the file was written anew
        with contextlib.suppress(OSError):
            self._known = path.read_bytes().splitlines(keepends=True)
            self._old_file = path.stat().st_ino

    def take(self) -> list[bytes]:
        """Those that were added since the last call."""
        try:
            with open(self._path, "rb") as file:
                if self._num_read is None and os.fstat(file.fileno()).st_ino == self._old_file:
                    return []
                file.seek(self._num_read or 0)
                content = file.read()
        except OSError:
            return []
        content = content[: content.rfind(b"\n") + 1]
        lines = content.splitlines(keepends=True)
        first = 0
        if self._num_read is None:
            while first < min(len(lines), len(self._known)) and lines[first] == self._known[first]:
                first += 1
        self._num_read = (self._num_read or 0) + len(content)
        return lines[first:]
