"""What a person reads: lines on the terminal and in the run's log, and commands to type. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

LOGGER = logging.getLogger("perfedavg")
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOGGER.addHandler(logging.NullHandler())  # without a handler, logging prints errors of its own accord


_num_quiet = 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let what is said meanwhile, in any thread, go into the run's log alone."""
    global _num_quiet
    _num_quiet += 1
    try:
        yield
    finally:
        _num_quiet -= 1


def say(line: str) -> None:
    """A line for the person at the terminal, also into the run's log. A terminal that is gone does not matter."""
    LOGGER.info("%s", line)
    if _num_quiet:
        return
    clear = "\r\x1b[K" if is_live(sys.stderr) else ""  # of a progress bar, which is drawn again
    write_at_once(sys.stderr, f"{clear}{line}\n")


def show(text: str) -> None:
    """A result on standard output. One that cannot be written there (a full disk, a closed pipe) does not matter."""
    write_at_once(sys.stdout, f"{text}\n")


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


def duration(seconds: float) -> str:
    """`3 h 5 min`, `2 min 10 s`, `45 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


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


def write_at_once(stream: TextIO | None, text: str) -> None:
    """Nothing where there is no stream, it has been closed, or it leads nowhere any more."""
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            stream.write(text)
            stream.flush()


def open_standard_streams() -> None:
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
        encoding, line_buffering, write_through = stream.encoding, stream.line_buffering, stream.write_through
        return cls(
            stream.detach(), encoding, "backslashreplace", line_buffering=line_buffering, write_through=write_through
        )

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it has been closed
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().flush()
