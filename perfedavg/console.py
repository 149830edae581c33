"""How an entry point ends: a result, or one clear line and an exit status. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import logging
import os
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


EarlyEnd = Callable[["signal.Signals | BaseException"], None]
"""Is told of the signal, or of the error, by which the process is about to end."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_early_end: list[EarlyEnd] = []


class Stopped(BaseException):
    """A signal asked the process to end. Carries its number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def run_entry_point(main: Callable[[], None]) -> None:
    """Run `main` and end the process.

    `main` runs in a thread of its own, because a receive or a kernel may block for long in native code, where Python
    handles no signal; the main thread waits and so answers SIGINT, SIGTERM and SIGHUP at once. Files are written whole
    or not at all, so ending in the middle loses nothing that was written. What has to be done before that stands in
    `at_early_end`; a second signal does not wait for it.

    Exit status: 0; 2 with one line on standard error for USER_ERRORS; 1 with a traceback for anything else, which is
    a bug; 128 + n after signal n.
    """
    # torch imports the pynvml package, a requirement of fedlab, and then warns that it is deprecated.
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
    _on_signals(_raise_stopped)
    status = _wait_for(main)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # not sys.exit: daemon threads may be inside native code


def at_early_end(callback: EarlyEnd) -> Callable[[], None]:
    """Have a function called, in the main thread, when a signal or an error ends the process; returns what undoes it.

    Several are called in the reverse order of their registration, each whatever became of the others. At a signal,
    the thread in which `main` runs goes on meanwhile.
    """
    _early_end.append(callback)

    def withdraw() -> None:
        if callback in _early_end:
            _early_end.remove(callback)

    return withdraw


def say(line: str) -> None:
    """A line for the person at the terminal, also into the run's log. A terminal that is gone does not matter."""
    LOGGER.info("%s", line)
    with contextlib.suppress(OSError):
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # of a progress bar, which is drawn again
        print(f"{clear}{line}", file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A result on standard output. One that cannot be written there (a full disk, a closed pipe) does not matter."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _wait_for(main: Callable[[], None]) -> int:
    ended: list[BaseException | None] = []
    # A signal may be delivered to any thread, and then does not wake this one from waiting for a lock; a byte does.
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)

    def body() -> None:
        try:
            main()
        except BaseException as error:
            ended.append(error)
        else:
            ended.append(None)
        os.write(wake_write, b"\0")

    try:
        threading.Thread(target=body, name="main", daemon=True).start()
        while not ended:
            os.read(wake_read, 1)
        _on_signals(_end_at_once)
        (error,) = ended
    except Stopped as stopped:
        say(f"stopped by {signal.Signals(stopped.signal_number).name}")
        _end_early(signal.Signals(stopped.signal_number))
        return 128 + stopped.signal_number
    if error is not None:
        _end_early(error)
    return report(error)


def _end_early(reason: signal.Signals | BaseException) -> None:
    for callback in list(reversed(_early_end)):
        try:
            callback(reason)
        except Exception as error:  # the others must be called, and the first reason is what counts
            LOGGER.error("while ending", exc_info=error)
            say(f"while ending: {' '.join(str(error).split()) or type(error).__name__}")


def report(error: BaseException | None) -> int:
    """Say how it ended, and return the exit status."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    LOGGER.error("ended by an error", exc_info=error)
    if isinstance(error, USER_ERRORS):
        with contextlib.suppress(OSError):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
    return 1


def _on_signals(answer: Callable[[int, FrameType | None], None]) -> None:
    for number in _SIGNALS:
        signal.signal(number, answer)


def _raise_stopped(signal_number: int, frame: FrameType | None) -> None:
    _on_signals(_end_at_once)
    raise Stopped(signal_number)


def _end_at_once(signal_number: int, frame: FrameType | None) -> None:
    os._exit(128 + signal_number)
