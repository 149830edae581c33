"""The soak: what it does follows from its seed, so that a fault that it finds can be looked for again."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice
from pathlib import Path

import pytest
from helpers import launch_fork, network_flags

from benchmarks.soak import (
    MAX_PAUSE_SECONDS,
    SERVER,
    STRANGER,
    STRANGER_ACTIONS,
    WORKER_ACTIONS,
    WORKERS,
    Event,
    events,
    is_same,
    run_disturbed,
    run_undisturbed,
)


def test_what_happens_follows_from_the_seed() -> None:
    """Everything happens to everybody, in another order with another seed."""
    happening = list(islice(events(3), 400))
    assert happening == list(islice(events(3), 400))
    assert happening != list(islice(events(4), 400))
    expected = {(name, action) for name in (*WORKERS, SERVER) for action in WORKER_ACTIONS}
    expected |= {(STRANGER, action) for action in STRANGER_ACTIONS}
    assert {(event.target, event.action) for event in happening} == expected
    assert all(0 < event.pause_seconds <= MAX_PAUSE_SECONDS for event in happening)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("transport", ["auto", "tcp", "keys"])
def test_a_run_that_is_disturbed_all_the_while_ends_as_one_that_was_left_alone(
    transport: str, keys: Path, tmp_path: Path
) -> None:
    """A worker is killed before any can join, so that something happens on the fastest machine. And on the slowest, on
    which a run that is disturbed without end would never come to its own, it is left alone after a while.
    """
    network = network_flags(transport, keys)
    happening = chain([Event(0.0, WORKERS[0], "SIGKILL")], islice(events(0), 20))
    undisturbed = run_undisturbed(tmp_path / "undisturbed", launch_fork, network=network)
    done: Counter[str] = Counter()
    result = run_disturbed(tmp_path / "disturbed", happening, done, launch_fork, network)
    assert is_same(result, undisturbed)
    assert done.total() > 0
