"""Clients' examples, read before they are asked for, while a GPU trains others."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from perfedavg.contracts import ClientData, FederatedDataset


class ClientReader:
    """Reads clients of a data set ahead, in threads of its own. May be used from several threads.

    num_threads: clients that are read ahead at the same time, 1 or more.
    """

    def __init__(self, dataset: FederatedDataset, num_threads: int) -> None:
        self._dataset = dataset
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")
        self._lock = threading.Lock()
        self._read: dict[int, Future[ClientData]] = {}

    def keep_only(self, client_ids: Iterable[int]) -> None:
        """Drop what was read, or is still to be read, of all other clients."""
        kept = set(client_ids)
        with self._lock:
            for client_id in self._read.keys() - kept:
                self._read.pop(client_id).cancel()

    def read_ahead(self, client_ids: Iterable[int]) -> None:
        """Begin to read these clients, and keep them until `keep_only` drops them."""
        with self._lock:
            for client_id in client_ids:
                if client_id not in self._read:
                    self._read[client_id] = self._pool.submit(self._dataset.client_data, client_id)

    def client_data(self, client_id: int) -> ClientData:
        """A client's examples, from what was read ahead, or else read now."""
        with self._lock:
            read = self._read.get(client_id)
        return self._dataset.client_data(client_id) if read is None else read.result()
