"""What clients keep between rounds: which of it goes where, and a store of it in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from perfedavg.settings import ExperimentConfig, Phase

ClientState = dict[str, Tensor]
"""What one client keeps, by name. A client that keeps nothing has none of them."""
ClientStates = dict[int, ClientState]
"""By client id; clients that keep nothing are left out."""

BUFFERS = "model buffers"
"""What the engine keeps for a client, beside what its method lets it keep, where buffers are local."""
KEPT_TYPES = (torch.int64, torch.float32, torch.float64)
MAX_KEPT_MODELS = 4
"""Models of float64 of which a client may keep as much, and a little more."""
BATCH_BYTES = 32 * 2**20
"""States that travel together: as many as it takes to come to this, and then the group that comes with the last one."""


def state_bytes(state: ClientState) -> int:
    return sum(value.nbytes for value in state.values())


def max_state_bytes(num_parameters: int) -> int:
    """The most that a client of a model may keep."""
    return 2**20 + 8 * MAX_KEPT_MODELS * num_parameters


def max_batch_bytes(config: ExperimentConfig, num_parameters: int) -> int:
    """The most that states which travel together take; 0 where no method lets clients keep any."""
    keeps = any(map(config.keeps_state, config.phases))
    return BATCH_BYTES + (config.client_batching or 1) * max_state_bytes(num_parameters) if keeps else 0


def in_batches(states: Iterable[tuple[int, ClientState]]) -> Iterator[ClientStates]:
    """The states that are not empty, a few at a time; each is asked for when its batch needs it."""
    batch: ClientStates = {}
    for client_id, state in states:
        if state:
            batch[client_id] = state
            if sum(map(state_bytes, batch.values())) >= BATCH_BYTES:
                yield batch
                batch = {}
    if batch:
        yield batch


def copy_of(state: ClientState) -> ClientState:
    return {name: value.clone() for name, value in state.items()}


def with_own_buffers(start: Tensor, state: ClientState) -> Tensor:
    """The global model, (num_parameters,), with the buffers that a client kept, which are taken out of its state."""
    kept = state.pop(BUFFERS, None)
    if kept is None:
        return start
    start = start.clone()
    start[-len(kept) :] = kept
    return start


def keep_buffers(start: Tensor, own_start: Tensor, update: Tensor, state: ClientState, num_entries: int) -> None:
    """Let a client keep the buffers that it came to, and send how far they are from the global model's.

    start: the global model, (num_parameters,).  own_start: what `with_own_buffers` made of it.
    update: (num_parameters,) how far the client got from there; changed.  num_entries: of the buffers.
    """
    state[BUFFERS] = own_start[-num_entries:] + update[-num_entries:]
    update[-num_entries:] = state[BUFFERS] - start[-num_entries:]


def check_kept(config: ExperimentConfig, phase: Phase, client_id: int, state: ClientState, num_parameters: int) -> None:
    """Raises ValueError where a method keeps what it does not say, or what cannot be stored or is too much."""
    method = config.phases[phase].method
    if not (method.keeps_state or (config.keeps_state(phase) and state.keys() == {BUFFERS})):
        raise ValueError(f"the method {method.name} does not say that its clients keep anything: keeps_state")
    for name, value in state.items():
        if value.dtype not in KEPT_TYPES:
            raise ValueError(f"{method.name} keeps {name} as {value.dtype}; keep int64, float32 or float64")
    num_bytes, most = state_bytes(state), max_state_bytes(num_parameters)
    if num_bytes > most:
        raise ValueError(f"client {client_id} keeps {num_bytes} bytes in {method.name}; the most is {most}")


class StatesInMemory:
    """A `contracts.ClientStateStore` for a run without a folder."""

    def __init__(self, current: ClientStates | None = None) -> None:
        self.current: ClientStates = current or {}
        self._coming: ClientStates = {}

    def get(self, client_id: int) -> ClientState:
        return copy_of(self.current.get(client_id, {}))

    def read_ahead(self, client_ids: Sequence[int]) -> None:
        pass

    def begin_round(self, phase: Phase, round_number: int) -> None:
        self._coming = {}

    def put(self, client_id: int, state: ClientState) -> None:
        self._coming[client_id] = state

    def commit(self, client_ids: Iterable[int]) -> None:
        self.current |= {client_id: self._coming[client_id] for client_id in client_ids}
        self._coming = {}

    def reset(self) -> None:
        self.current, self._coming = {}, {}

    def versions(self) -> dict[int, int]:
        assert not self.current, "a checkpoint refers to files"
        return {}
