"""What workers on hosts print, in files of the run's folder."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from perfedavg.recording.runs import CONFIG_FILE

FOLDER = "workers"
MAX_SHOWN_LINES = 40
_TRACEBACK = "Traceback (most recent call last)"


class WorkerLogs:
    """A file a worker: `workers/<host>-<rank>.log`. Written from the moment when the run has begun; kept until then.

    Its methods may be called by several threads.
    """

    def __init__(self, run: Path) -> None:
        """run: folder of the run, which has not begun, or is not resumed, yet; what it holds may be another's."""
        self._folder = run / FOLDER
        self._config = run / CONFIG_FILE
        self._config_before = _version_of(self._config)
        self._lock = threading.Lock()
        self._kept: dict[str, bytes] = {}
        self._last: dict[str, bytes] = {}

    @property
    def has_begun(self) -> bool:
        """Whether the server has the workers that it waits for: it then writes config.json, anew at a resumption."""
        return _version_of(self._config) not in (None, self._config_before)

    def add(self, name: str, text: str) -> None:
        """name: of the file, without its ending.  text: what was printed, as JSON brought it."""
        content = text.encode(errors="surrogateescape")
        with self._lock:
            self._kept[name] = self._kept.get(name, b"") + content
            self._last[name] = (self._last.get(name, b"") + content)[-4096:]
            self._write()

    def flush(self) -> None:
        with self._lock:
            self._write()

    def last_line(self, name: str) -> str:
        """The last line that was printed, or nothing."""
        lines = self._last.get(name, b"").decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def unwritten_traceback(self) -> str | None:
        """The last lines of a worker that ended by a bug before the run began, below its name; None where none did."""
        with self._lock:
            kept = dict(self._kept)
        for name, content in kept.items():
            lines = content.decode(errors="replace").strip().splitlines()
            if any(line.startswith(_TRACEBACK) for line in lines):
                return "\n".join([f"{name} has printed", *lines[-MAX_SHOWN_LINES:]])
        return None

    def _write(self) -> None:
        if not self.has_begun:
            return
        for name, content in list(self._kept.items()):
            with contextlib.suppress(OSError):  # a full disk costs these lines, not the run
                self._folder.mkdir(exist_ok=True)
                with open(self._folder / f"{name}.log", "ab") as file:
                    file.write(content)
            del self._kept[name]


def _version_of(path: Path) -> tuple[int, int] | None:
    """Another one when the file has been replaced. None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
