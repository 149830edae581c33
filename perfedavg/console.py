"""How an entry point ends: a result, or one clear line and an exit status. Imports nothing heavy."""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from types import FrameType

LOGGER = logging.getLogger("perfedavg")
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOGGER.addHandler(logging.NullHandler())  # without a handler, logging prints errors of its own accord

EXIT_BAD_INPUT = 2
"""Bad input, a missing peer, a full disk: what the user can mend. Also argparse's status."""

USER_ERRORS = (ValueError, OSError)
"""Errors whose message is meant for the user (ConnectionError and TimeoutError are OSErrors)."""


class Stopped(BaseException):
    """A signal asked the process to end. Carries its number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def run_entry_point(main: Callable[[], None]) -> None:
    """Run `main` and end the process.

    `main` runs in a thread of its own, because a receive or a kernel may block for long in native code, where Python
    handles no signal; the main thread waits and so answers SIGINT, SIGTERM and SIGHUP at once. Files are written whole
    or not at all, so ending in the middle loses nothing that was written.

    Exit status: 0; 2 with one line on standard error for USER_ERRORS; 1 with a traceback for anything else, which is
    a bug; 128 + n after signal n.
    """
    # torch imports the pynvml package, a requirement of fedlab, and then warns that it is deprecated.
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _raise_stopped)
    status = _wait_for(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not sys.exit: daemon threads may be inside native code


def say(line: str) -> None:
    """A line for the person at the terminal, also into the run's log."""
    LOGGER.info("%s", line)
    print(line, file=sys.stderr, flush=True)


def _wait_for(main: Callable[[], None]) -> int:
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def body() -> None:
        try:
            main()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    try:
        threading.Thread(target=body, name="main", daemon=True).start()
        error = ended.get()
    except Stopped as stopped:
        error = stopped
    return report(error)


def report(error: BaseException | None) -> int:
    """Say how it ended, and return the exit status."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, Stopped):
        say(f"stopped by {signal.Signals(error.signal_number).name}")
        return 128 + error.signal_number
    LOGGER.error("ended by an error", exc_info=error)
    if isinstance(error, USER_ERRORS):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    traceback.print_exception(error)
    return 1


def _raise_stopped(signal_number: int, frame: FrameType | None) -> None:
    raise Stopped(signal_number)
