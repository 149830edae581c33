"""Seeds from identity: what is random about a piece of work follows from what it is, never from who does it or when.

Every random choice of the algorithm draws from `SeedSequence(seed, spawn_key=(purpose, phase, round, client))`, and
every one of a data set from `SeedSequence(seed, spawn_key=(purpose, client))`. So neither the number of processes, nor
the order in which clients are trained, nor a repeated piece of work can change it.
"""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np


@unique
class Purpose(IntEnum):
    """What a stream of random numbers is for. The values enter the seeds: never reuse one."""

    INITIAL_MODEL = 1
    COHORT = 2
    LOCAL_TRAINING = 3
    PERSONALIZATION = 4
    EVAL_CLIENTS = 5
    AGGREGATION = 6
    TRAINED_CLIENTS = 7
    # Of data sets.
    PARTITION = 101
    LOCAL_CUT = 102
    NOISE = 103
    WRITER = 104
    SINE = 105
    CLIENT_ORDER = 106


def seed_sequence(
    seed: int, purpose: Purpose, *, phase: int = 0, round_number: int = 0, client_id: int = 0
) -> np.random.SeedSequence:
    """The stream of one identity. All numbers 0 or more; streams of different identities are independent."""
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), int(phase), round_number, client_id))


def data_stream(seed: int, purpose: Purpose, client: int) -> np.random.SeedSequence:
    """The stream that a data set draws from for one client."""
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), client))


def torch_seeds(sequence: np.random.SeedSequence, count: int) -> list[int]:
    """`count` seeds for torch generators, each in 0 .. 2^63 - 1."""
    return [int(word >> np.uint64(1)) for word in sequence.generate_state(count, np.uint64)]
