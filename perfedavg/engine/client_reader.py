"""Clients' examples, read before they are asked for while a GPU trains others."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from perfedavg.contracts import ClientData, FederatedDataset


class ClientReader:
    """Reads clients of a data set ahead, in threads of its own. May be used from several threads.

    num_threads: clients that are read ahead at the same time; 0 reads each when it is asked for.
    """

    def __init__(self, dataset: FederatedDataset, num_threads: int) -> None:
        self.dataset = dataset
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reader") if num_threads else None
        self._lock = threading.Lock()
        self._read: dict[int, Future[ClientData]] = {}

    @property
    def reads_ahead(self) -> bool:
        return self._pool is not None

    def keep_only(self, client_ids: Iterable[int]) -> None:
        """Drop what was read, or is still to be read, of all other clients."""
        kept = set(client_ids)
        with self._lock:
            for client_id in self._read.keys() - kept:
                self._read.pop(client_id).cancel()

    def read_ahead(self, client_ids: Iterable[int]) -> None:
        """Begin to read these clients, and keep them until `keep_only` drops them."""
        if self._pool is None:
            return
        with self._lock:
            for client_id in client_ids:
                if client_id not in self._read:
                    self._read[client_id] = self._pool.submit(self.dataset.client_data, client_id)

    def client_data(self, client_id: int) -> ClientData:
        """A client's examples, from what was read ahead, or else read now."""
        with self._lock:
            read = self._read.get(client_id)
        return self.dataset.client_data(client_id) if read is None else read.result()
