"""What an entry point says, and how it ends: a result, or one clear line and a status. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from perfedavg.machine.descriptors import raise_limit

LOGGER = logging.getLogger("perfedavg")
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOGGER.addHandler(logging.NullHandler())  # without a handler, logging prints errors of its own accord

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
    prepare_process()
    _on_signals(_raise_stopped)
    end_process(_wait_for(main))


def prepare_process() -> None:
    """Before anything else: let no setting in the environment and no missing terminal end the process."""
    # torch imports the pynvml package, a requirement of fedlab, and then warns that it is deprecated.
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
    for name in [name for name in os.environ if name.startswith("TQDM_") and name != "TQDM_DISABLE"]:
        del os.environ[name]  # a value that tqdm cannot read is an error in whatever imports it
    _open_standard_streams()
    raise_limit()


def _open_standard_streams() -> None:
    """Let there be a standard input, output and error, whatever the process was started with.

    Before anything else is opened: a closed descriptor of them would be given to the next file, and what a library
    prints would end up in that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free, which is this one
            os.set_inheritable(descriptor, True)
    sys.stdout, sys.stderr = _Output.instead_of(sys.stdout, 1), _Output.instead_of(sys.stderr, 2)


class _Output(io.TextIOWrapper):
    """Standard output or error, for every print of this process. What cannot be written is lost, and ends nothing.

    A character that its encoding lacks is written as an escape.
    """

    @classmethod
    def instead_of(cls, stream: TextIO | None, descriptor: int) -> TextIO:
        """stream: what Python opened, None where there was nothing to open; another program's stream stays."""
        if stream is None:
            return cls(open(descriptor, "wb", closefd=False), errors="backslashreplace", line_buffering=True)
        if not isinstance(stream, io.TextIOWrapper):
            return stream
        encoding, line_buffering = stream.encoding, stream.line_buffering
        return cls(stream.detach(), encoding, "backslashreplace", line_buffering=line_buffering)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it has been closed
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().flush()


def end_process(status: int) -> NoReturn:
    """End the process at once, also where its output cannot be written or a thread is inside native code."""
    for stream in (sys.stdout, sys.stderr):
        _write(stream, "")
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


def say(line: str) -> None:
    """A line for the person at the terminal, also into the run's log. A terminal that is gone does not matter."""
    LOGGER.info("%s", line)
    clear = "\r\x1b[K" if is_live(sys.stderr) else ""  # of a progress bar, which is drawn again
    _write(sys.stderr, f"{clear}{line}\n")


def show(text: str) -> None:
    """A result on standard output. One that cannot be written there (a full disk, a closed pipe) does not matter."""
    _write(sys.stdout, f"{text}\n")


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """For what is decoration, such as a plot: where it fails, whatever the reason, the work ends as well as without.

    what: begins the line that then says so: `no plots in runs/x`.
    """
    try:
        yield
    except Exception as error:
        LOGGER.error(what, exc_info=error)
        say(f"{what}: {reason_of(error)}")


def reason_of(error: BaseException) -> str:
    """An error's message in one line, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def command_line(words: Iterable[str | Path]) -> str:
    """The words of a command as a POSIX shell reads them again, in a line; also those that are no text."""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    if word.isprintable() and "  " not in word:  # of several spaces, `reason_of` would leave one
        return shlex.quote(word)
    plain = set(range(33, 127)) - set(b"'\\%")
    escaped = "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in os.fsencode(word))
    return f"\"$(printf '{escaped}')\""


def is_live(stream: TextIO | None) -> bool:
    """Whether a line there can be drawn again: on a terminal that knows how."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # it has been closed
        return False


def _write(stream: TextIO | None, text: str) -> None:
    """Write at once, or not at all where there is no stream, it has been closed, or it leads nowhere any more."""
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            stream.write(text)
            stream.flush()


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
            say(f"while ending: {reason_of(error)}")


def report(error: BaseException | None) -> int:
    """Say how it ended, and return the exit status."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    LOGGER.error("ended by an error", exc_info=error)
    if isinstance(error, USER_ERRORS):
        _write(sys.stderr, f"error: {reason_of(error)}\n")
        return EXIT_BAD_INPUT
    if is_shortage(error):
        _write(sys.stderr, f"error: memory or threads run short ({reason_of(error)}); `ulimit -a` shows the limits\n")
        return EXIT_BAD_INPUT
    _write(sys.stderr, "".join(traceback.format_exception(error)))
    return 1


def is_shortage(error: BaseException) -> bool:
    """Whether the system refused memory or a thread, which Python and torch say in words of their own."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, ImportError)) and any(words in said for words in _SHORTAGES)
    )


def _on_signals(answer: Callable[[int, FrameType | None], None]) -> None:
    for number in _SIGNALS:
        signal.signal(number, answer)


def _raise_stopped(signal_number: int, frame: FrameType | None) -> None:
    _on_signals(_end_at_once)
    raise Stopped(signal_number)


def _end_at_once(signal_number: int, frame: FrameType | None) -> None:
    os._exit(128 + signal_number)
