"""What the clients of a worker keep: it comes with them, and goes back to the server with their results."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from perfedavg.engine.client_states import BATCH_BYTES, ClientState, ClientStates, copy_of, state_bytes


class TravellingStates:
    """A `contracts.RoundStates` of what came and of what has not left yet; no state is here for longer than it must."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._came: ClientStates = {}
        self._to_leave: ClientStates = {}

    def add(self, states: ClientStates) -> None:
        """What clients that come next kept from earlier rounds. Copied."""
        with self._lock:
            self._came |= {client_id: copy_of(state) for client_id, state in states.items()}

    def get(self, client_id: int) -> ClientState:
        """Each is asked for once."""
        with self._lock:
            return self._came.pop(client_id, {})

    def read_ahead(self, client_ids: Sequence[int]) -> None:
        pass

    def put(self, client_id: int, state: ClientState) -> None:
        with self._lock:
            self._to_leave[client_id] = state

    def take(self, least_bytes: int = 0) -> ClientStates:
        """What is to leave, where it comes to so many bytes; otherwise nothing."""
        with self._lock:
            if sum(map(state_bytes, self._to_leave.values())) < least_bytes:
                return {}
            leaving, self._to_leave = self._to_leave, {}
            return leaving

    def take_batch(self) -> ClientStates:
        """What is to leave, where it is too much to wait for the sum; otherwise nothing."""
        return self.take(BATCH_BYTES)
