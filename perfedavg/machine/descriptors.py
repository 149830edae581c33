"""How many files and connections this process may have open. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import resource


def raise_limit() -> None:
    """Let this process open as many descriptors as it may without asking anybody: up to the hard limit.

    The soft limit is lower on most systems (1,024), for the sake of programs that use `select`, which this is not.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # an unlimited hard limit where the system has one of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def num_spare() -> int:
    """How many more may be opened for others; below 0 where they take from the quarter that is this process's own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        num_open = len(os.listdir("/proc/self/fd")) - 1  # without the one that lists them
    except OSError:  # there is not even one left for that
        num_open = soft
    return 2**31 if soft == resource.RLIM_INFINITY else soft * 3 // 4 - num_open
