"""What workers on hosts print, in files of the run's folder."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from perfedavg.recording.runs import CONFIG_FILE

FOLDER = "workers"


class WorkerLogs:
    """A file a worker: `workers/<host>-<rank>.log`. Written from the moment when the run has begun; kept until then.

    Its methods may be called by several threads.
    """

    def __init__(self, run: Path, resumes: bool) -> None:
        """run: folder of the run.  resumes: whether it holds the run already; otherwise, what it holds is another's."""
        self._folder = run / FOLDER
        self._config = run / CONFIG_FILE
        self._is_anothers = not resumes and self._config.exists()
        self._lock = threading.Lock()
        self._kept: dict[str, bytes] = {}
        self._last: dict[str, bytes] = {}

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

    def _write(self) -> None:
        if self._is_anothers or not self._config.exists():
            return
        for name, content in list(self._kept.items()):
            with contextlib.suppress(OSError):  # a full disk costs these lines, not the run
                self._folder.mkdir(exist_ok=True)
                with open(self._folder / f"{name}.log", "ab") as file:
                    file.write(content)
            del self._kept[name]
