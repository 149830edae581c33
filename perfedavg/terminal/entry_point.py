"""How a process of this project begins and ends: with a result, or with one clear line and a status.

Imports nothing heavy.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from perfedavg.machine.descriptors import raise_limit
from perfedavg.machine.forking import outlive_parent
from perfedavg.machine.processes import answer_signals
from perfedavg.terminal.console import LOGGER, open_standard_streams, reason_of, say, write_at_once

EXIT_BAD_INPUT = 2
"""Bad input, a missing peer, a full disk: what the user can mend. Also argparse's status."""

USER_ERRORS = (ValueError, OSError)
"""Errors whose message is meant for the user (ConnectionError and TimeoutError are OSErrors)."""

_SHORTAGES = (
    "can't start new thread",
    "allocate memory",
    "out of memory",
    "failed to map segment",
    "resource temporarily unavailable",
)

EarlyEnd = Callable[["signal.Signals | BaseException"], None]
"""Is told of the signal, or of the error, by which the process is about to end."""

_early_end: list[EarlyEnd] = []
_ending = threading.Event()


class Stopped(BaseException):
    """A signal asked the process to end."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal = signal.Signals(signal_number)


def run_entry_point(main: Callable[[], None]) -> None:
    """Run `main` and end the process.

    `main` runs in a thread of its own, because a receive or a kernel may block for long in native code, where Python
    handles no signal; the main thread waits and so answers SIGINT, SIGTERM and SIGHUP at once. Files are written whole
    or not at all, so ending in the middle loses nothing that was written. What has to be done before that stands in
    `at_early_end`; a second signal does not wait for it.

    Exit status: 0; 2 with one line on standard error for USER_ERRORS; 1 with a traceback for anything else, which is
    a bug; 128 + n after signal n.
    """
    prepare_process()
    answer_signals(_raise_stopped)
    end_process(_wait_for(main))


def prepare_process() -> None:
    """Before anything else: let no setting in the environment and no missing terminal end the process."""
    ignore_known_warnings()
    for name in [name for name in os.environ if name.startswith("TQDM_") and name != "TQDM_DISABLE"]:
        del os.environ[name]  # a value that tqdm cannot read is an error in whatever imports it
    open_standard_streams()
    raise_limit()


def ignore_known_warnings() -> None:
    """torch imports the pynvml package, a requirement of fedlab, and then warns that it is deprecated."""
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)


def end_process(status: int) -> NoReturn:
    """End the process at once, also where its output cannot be written or a thread is inside native code."""
    for stream in (sys.stdout, sys.stderr):
        write_at_once(stream, "")
    os._exit(status)


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


def is_ending() -> bool:
    """Whether a signal is ending the process, while the thread in which `main` runs still goes on."""
    return _ending.is_set()


def report(error: BaseException | None) -> int:
    """Say how it ended, and return the exit status."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    LOGGER.error("ended by an error", exc_info=error)
    if isinstance(error, USER_ERRORS):
        line = reason_of(error)
    elif is_shortage(error):
        line = f"memory or threads run short ({reason_of(error)}); `ulimit -a` shows the limits"
    else:
        write_at_once(sys.stderr, "".join(traceback.format_exception(error)))
        return 1
    write_at_once(sys.stderr, f"error: {line}\n")
    return EXIT_BAD_INPUT


def is_shortage(error: BaseException) -> bool:
    """Whether the system refused memory or a thread, which Python and torch say in words of their own."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, ImportError)) and any(words in said for words in _SHORTAGES)
    )


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
        answer_signals(_end_at_once)
    except Stopped as stopped:
        _ending.set()
        say(f"stopped by {stopped.signal.name}")
        _end_early(stopped.signal)
        return 128 + stopped.signal
    (error,) = ended
    if error is not None:
        _end_early(error)
    return report(error)


def _end_early(reason: signal.Signals | BaseException) -> None:
    for callback in list(reversed(_early_end)):
        try:
            callback(reason)
        except Exception as error:  # the others must be called, and the first reason is what counts
            LOGGER.error("while ending", exc_info=error)
            say(f"while ending: {reason_of(error)}")


def _raise_stopped(signal_number: int, frame: FrameType | None) -> None:
    outlive_parent()
    answer_signals(_end_at_once)
    raise Stopped(signal_number)


def _end_at_once(signal_number: int, frame: FrameType | None) -> None:
    os._exit(128 + signal_number)
