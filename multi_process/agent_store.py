"""Where the server of a run that torchrun started listens: its port, told over torchrun's own store.

torchrun listens on MASTER_PORT of the first machine for as long as its processes run: there it keeps a store for them,
and says so with TORCHELASTIC_USE_AGENT_STORE. So the server takes a port that is free, and the workers ask for it.
Nothing else is read from that store, which obeys whoever reaches it; server and worker then prove who they are as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore

_KEY = "personalized-fedavg/port"


class AgentStore:
    """The store that torchrun keeps for the processes that it has started together.

    attempt: counts their restarts; each attempt has a server of its own.
    Raises ConnectionError where nothing answers within so many seconds.
    """

    def __init__(self, address: tuple[str, int], attempt: str, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        timeout = timedelta(seconds=timeout_seconds)
        try:
            store = TCPStore(*address, is_master=False, timeout=timeout, wait_for_workers=False)
        except RuntimeError as error:  # torch's own, in many words
            raise ConnectionError(
                f"torchrun's store at MASTER_ADDR:MASTER_PORT, {address[0]}:{address[1]}, cannot be reached; check the "
                "firewall, or give all ranks --ip and --port"
            ) from error
        self._store = PrefixStore(f"attempt {attempt}", store)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str], timeout_seconds: float) -> AgentStore:
        address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        return cls(address, environment.get("TORCHELASTIC_RESTART_COUNT", "0"), timeout_seconds)

    def tell_port(self, port: int) -> None:
        """Server: it will listen on this port."""
        self._store.set(_KEY, str(port))

    def ask_port(self) -> int:
        """Worker: the server's port. Raises ConnectionError where it is not told in time, or is none."""
        try:
            told = self._store.get(_KEY).decode()
        except RuntimeError as error:
            raise ConnectionError(
                f"rank 0 has not told its port within {self._timeout_seconds:g} s (--join_timeout_seconds)"
            ) from error
        if not (told.isdecimal() and 0 < int(told) < 2**16):
            raise ConnectionError("torchrun's store holds no port of a server of this project")
        return int(told)
