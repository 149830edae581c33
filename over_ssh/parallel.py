"""The same done for several hosts at once, while signals are heard and connections are kept alive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from over_ssh.session import Session
from perfedavg.machine.processes import SignalWatch
from perfedavg.terminal.console import say

LOOK_SECONDS = 0.05

Item = TypeVar("Item")
Result = TypeVar("Result")


class StoppedError(Exception):
    """A signal asked this process to end. status: its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], signals: SignalWatch, sessions: Sequence[Session]
) -> list[Result]:
    """What a function returns for each item, each in a thread that has ended then.

    sessions: connections to keep alive meanwhile; the function may add some.
    Raises StoppedError where a signal came, and what a thread raised.
    """
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            results[number] = function(items[number])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(items))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if signals.received:
            say(f"stopped by {signals.received.name}")
            raise StoppedError(128 + signals.received)
        for session in list(sessions):
            session.beat()
        signals.wait(LOOK_SECONDS)
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]
