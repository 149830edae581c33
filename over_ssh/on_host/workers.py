"""The process on a host that starts its workers, as forks of itself, and starts those again that die.

It is what program.py becomes. Standard input brings one line, its task, and then signs of life; when they
stop, the workers are ended. Standard output takes what the workers print and what becomes of them, a line of JSON each.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perfedavg.machine.forking import load
from perfedavg.machine.private_folder import private_folder
from perfedavg.machine.processes import LocalProcesses, SignalWatch
from perfedavg.terminal.entry_point import EXIT_BAD_INPUT, end_process, prepare_process

LOOK_SECONDS = 0.5
"""Between two looks at what the workers have printed."""
FLUSH_SECONDS = 5.0
"""For the last lines to be taken."""


def load_everything() -> None:
    """Import what workers do. No GPU is touched, because a fork could not use it then."""
    for module in ("datasets", "models", "multi_process.worker"):
        importlib.import_module(module)


def main() -> None:
    prepare_process()
    script = Path(sys.argv[1], "client_worker.py")
    task = _read_line()
    signals = SignalWatch(0, task["silence_seconds"])
    outlet = Outlet(1)
    load(load_everything)

    def look() -> int:
        outlet.flush()
        if outlet.is_empty:  # or the other machine takes nothing at the moment, and the files hold it as well
            processes.take_output()
            outlet.flush()
        return 0

    def print_output(name: str, content: bytes) -> None:
        outlet.put({"worker": name, "output": content.decode(errors="surrogateescape")})

    processes = LocalProcesses(
        EXIT_BAD_INPUT,
        lambda line: outlet.put({"said": line}),
        print_output,
        lambda name: outlet.put({"given_up": name}),
    )
    with folder_of(task["keys"]) as keys, processes:
        for name, argv in task["workers"].items():
            processes.start(name, script, [*argv, *keys], shows_output=False)
        status = processes.wait(signals, look, LOOK_SECONDS)
    if not signals.received:
        outlet.put({"ended": status})
    deadline = time.monotonic() + FLUSH_SECONDS
    while not outlet.is_empty and time.monotonic() < deadline:
        outlet.flush(deadline - time.monotonic())
    end_process(status)


@contextlib.contextmanager
def folder_of(keys: Mapping[str, str]) -> Iterator[list[str]]:
    """The flag of a worker that names a folder with these keys, for this user alone, which is gone at the end.

    keys: by the names of their files; empty for no folder and no flag.
    """
    if not keys:
        yield []
        return
    with private_folder("perfedavg-keys-") as folder:
        for name, text in keys.items():
            (folder / name).write_text(text, encoding="utf-8")
        yield ["--keys", str(folder)]


class Outlet:
    """Lines of JSON for a descriptor that may take none for a while: this process must go on meanwhile."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        os.set_blocking(descriptor, False)

    @property
    def is_empty(self) -> bool:
        return not self._rest

    def put(self, fields: dict[str, Any]) -> None:
        self._rest += json.dumps(fields).encode() + b"\n"

    def flush(self, seconds: float = 0.0) -> None:
        """Write what can be written, waiting so long for the first byte. Where nobody reads any more, all is lost."""
        select.select([], [self._descriptor], [], seconds)
        try:
            while self._rest:
                self._rest = self._rest[os.write(self._descriptor, self._rest) :]
        except BlockingIOError:
            pass
        except OSError:
            self._rest = b""


def _read_line() -> Any:
    """The first line of standard input that is not empty. Ends the process where there is none."""
    line = b""
    while not line.strip() or not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            end_process(EXIT_BAD_INPUT)
        line += byte
    return json.loads(line)
