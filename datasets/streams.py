"""The streams of random numbers that data sets draw from. Each follows from the seed and an identity alone."""

from __future__ import annotations

import numpy as np

PARTITION_STREAM, LOCAL_CUT_STREAM, NOISE_STREAM, WRITER_STREAM, SINE_STREAM = 101, 102, 103, 104, 105
"""First part of the spawn keys. The algorithm's own are below 100: never reuse one."""


def stream(seed: int, kind: int, identity: int) -> np.random.SeedSequence:
    """The stream of one kind for one identity, such as a client's number."""
    return np.random.SeedSequence(seed, spawn_key=(kind, identity))
