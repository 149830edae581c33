"""Who works on which client, and what is still to be done. Knows nothing of networks."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence


class Schedule:
    """The hand-out of a round's clients to workers that come, go, and are unequal.

    A client is waiting, then in work at one worker, then done there, then delivered: only when its result has reached
    the server is it safe. What a lost worker had not delivered is waiting again. Workers are known by any number.

    client_ids: in the order of handing out; the largest first ends soonest (Graham 1969).
    """

    def __init__(self, client_ids: Sequence[int]) -> None:
        self._position = {client_id: position for position, client_id in enumerate(client_ids)}
        self._waiting = list(range(len(client_ids)))
        self._client_ids = client_ids
        self._in_work: dict[int, set[int]] = {}
        self._done: dict[int, set[int]] = {}
        self._num_undelivered = len(client_ids)

    @property
    def is_complete(self) -> bool:
        return self._num_undelivered == 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def next_waiting(self) -> int | None:
        """The client that is handed out next."""
        return self._client_ids[self._waiting[0]] if self._waiting else None

    @property
    def num_unfinished(self) -> int:
        """Clients that are waiting or in work."""
        return len(self._waiting) + sum(map(len, self._in_work.values()))

    def num_done(self, worker: int) -> int:
        """Clients that this worker is done with, but whose result it has not delivered."""
        return len(self._done.get(worker, ()))

    def in_work(self, worker: int) -> Collection[int]:
        """Clients that this worker has been given and is not done with."""
        return self._in_work.get(worker, ())

    def is_at(self, worker: int, client_id: int | None) -> bool:
        """Whether this worker has been given the client, and has not delivered its result."""
        return client_id in self.in_work(worker) or client_id in self._done.get(worker, ())

    def take(self, worker: int, most: int) -> list[int]:
        """Hand out the next clients to a worker, at most so many."""
        positions = [heapq.heappop(self._waiting) for _ in range(min(most, len(self._waiting)))]
        client_ids = [self._client_ids[position] for position in positions]
        self._in_work.setdefault(worker, set()).update(client_ids)
        return client_ids

    def finish(self, worker: int, client_id: int) -> None:
        """The worker is done with a client. Raises ValueError where it did not have that client."""
        if client_id not in self.in_work(worker):
            raise ValueError(f"client {client_id} was reported, but not handed out to it")
        self._in_work[worker].remove(client_id)
        self._done.setdefault(worker, set()).add(client_id)

    def check_done(self, worker: int, client_ids: Sequence[int]) -> None:
        """Raises ValueError where the worker is not done with one of these clients, or one is named twice."""
        strange = set(client_ids) - self._done.get(worker, set())
        if strange or len(set(client_ids)) < len(client_ids):
            raise ValueError(f"clients {sorted(strange) or client_ids} were delivered, but not handed out to it")

    def deliver(self, worker: int, client_ids: Sequence[int]) -> None:
        """The results of these clients are safe. Raises ValueError as `check_done` does."""
        self.check_done(worker, client_ids)
        self._done.get(worker, set()).difference_update(client_ids)
        self._num_undelivered -= len(client_ids)

    def lose(self, worker: int) -> set[int]:
        """The worker is gone: what it had not delivered waits again. Returns which clients that are."""
        lost = self._in_work.pop(worker, set()) | self._done.pop(worker, set())
        for client_id in lost:
            heapq.heappush(self._waiting, self._position[client_id])
        return lost
