"""The sine task of the meta-learning papers as a federated data set: a client is a task, made on demand.

Finn, Abbeel, Levine 2017 (MAML, arXiv 1703.03400); here in the form of Nichol, Achiam, Schulman 2018 (Reptile,
arXiv 1803.02999): another range of phases, and points on a line.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from perfedavg.contracts import ClientData
from perfedavg.seeding import Purpose, data_stream

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, 2 * math.pi)
"""Radians."""
INPUT_RANGE = (-5.0, 5.0)
NUM_POINTS = 50
"""Of every task, evenly spaced over INPUT_RANGE, both ends included."""
NUM_GIVEN = 10
"""Points of its task that an unseen client adapts on."""

POINTS = np.linspace(*INPUT_RANGE, NUM_POINTS, dtype=np.float32)
POINTS.flags.writeable = False


@dataclass(frozen=True)
class SineTask:
    """x -> amplitude * sin(x + phase).

    given: (NUM_GIVEN,) places in POINTS, ascending and without repeats, that an unseen client adapts on.
    """

    amplitude: float
    phase: float
    given: NDArray[np.int64]

    def values(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Computed in float64, so that a value is as near to the sine as float32 allows."""
        return (self.amplitude * np.sin(x.astype(np.float64) + self.phase)).astype(np.float32)


class SineTasks:
    """Clients that are each a task. Task and given points follow from (seed, client) alone; nothing is stored.

    Clients 0 .. num_train - 1 train, on all points of their task. They are never scored: their test part is the same
    points. The next num_unseen adapt on their given points, and are scored on all points of their task.

    Inputs and labels (num_points, 1) float32. Safe to read from several threads.
    """

    name = "sine"
    num_classes = 1
    """Outputs of a model: the value at x."""
    loss_function = staticmethod(F.mse_loss)

    def __init__(self, num_train: int, num_unseen: int, seed: int) -> None:
        """Raises ValueError where there is no training client or no unseen client."""
        if num_train < 1 or num_unseen < 1:
            raise ValueError(
                f"{num_train} training and {num_unseen} unseen tasks of sine are too few; use one of each or more "
                "(--client_num_in_total, --unseen_fraction)"
            )
        self.train_client_ids = range(num_train)
        self.unseen_client_ids = range(num_train, num_train + num_unseen)
        self._seed = seed

    def num_train_examples(self, client_id: int) -> int:
        return NUM_GIVEN if client_id in self.unseen_client_ids else NUM_POINTS

    def client_data(self, client_id: int) -> ClientData:
        task = self.task(client_id)
        inputs = torch.from_numpy(POINTS[:, None].copy())
        labels = torch.from_numpy(task.values(POINTS)[:, None])
        if client_id in self.unseen_client_ids:
            given = torch.from_numpy(task.given)
            return ClientData(inputs[given], labels[given], inputs, labels)
        return ClientData(inputs, labels, inputs, labels)

    def task(self, client_id: int) -> SineTask:
        """Raises IndexError where there is no such client."""
        num_clients = self.unseen_client_ids.stop
        if not 0 <= client_id < num_clients:
            raise IndexError(f"client {client_id} is not in 0..{num_clients - 1}")
        rng = np.random.default_rng(data_stream(self._seed, Purpose.SINE, client_id))
        amplitude, phase = rng.uniform(*AMPLITUDES), rng.uniform(*PHASES)
        return SineTask(amplitude, phase, np.sort(rng.choice(NUM_POINTS, NUM_GIVEN, replace=False)))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what defines all tasks, and of some of their points, which tells if another machine's differ."""
        ids = (self.train_client_ids, self.unseen_client_ids)
        settings = (self.name, self._seed, *ids, AMPLITUDES, PHASES, INPUT_RANGE, NUM_POINTS, NUM_GIVEN)
        digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
        for client_id in (client_id for some in ids for client_id in (some[0], some[len(some) // 2], some[-1])):
            data = self.client_data(client_id)
            for part in (data.train_inputs, data.train_labels, data.test_labels):
                digest.update(part.numpy().tobytes())
        return digest.hexdigest()
