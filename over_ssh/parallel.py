"""The same done for several hosts at once, while signals are heard and connections are kept alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from over_ssh.session import Session
from perfedavg.machine.processes import SignalWatch
from perfedavg.terminal.console import say

LOOK_SECONDS = 0.05
REMINDER_SECONDS = 10.0
"""Between two lines about what is waited for."""
MAX_NAMED = 5

Item = TypeVar("Item")
Result = TypeVar("Result")


class StoppedError(Exception):
    """A signal asked this process to end. status: its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def in_parallel(
    function: Callable[[Item], Result], items: Mapping[str, Item], signals: SignalWatch, sessions: Sequence[Session]
) -> list[Result]:
    """What a function returns for each item, each in a thread that has ended then. Says now and then what it waits for.

    items: by their names.  sessions: connections to keep alive meanwhile; the function may add some.
    Raises StoppedError where a signal came, and what a thread raised.
    """
    results: dict[str, Result] = {}
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            results[name] = function(items[name])
        except BaseException as error:
            errors.append(error)

    threads = {name: threading.Thread(target=work, args=(name,), daemon=True) for name in items}
    for thread in threads.values():
        thread.start()
    next_reminder = time.monotonic() + REMINDER_SECONDS
    while waited_for := [name for name, thread in threads.items() if thread.is_alive()]:
        if signals.received:
            say(f"stopped by {signals.received.name}")
            raise StoppedError(128 + signals.received)
        if time.monotonic() >= next_reminder:
            next_reminder += REMINDER_SECONDS
            more = f" and {len(waited_for) - MAX_NAMED} more" if len(waited_for) > MAX_NAMED else ""
            say(f"waiting for {', '.join(waited_for[:MAX_NAMED])}{more}")
        for session in list(sessions):
            session.beat()
        signals.wait(LOOK_SECONDS)
    if errors:
        raise errors[0]
    return [results[name] for name in items]
