"""Clients' examples, read before they are asked for, while a GPU trains others."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from perfedavg.client_data import ClientData, FederatedDataset


class ClientReader:
    """Reads clients of a data set ahead, in threads of its own. May be used from several threads.

    num_threads: clients that are read ahead at the same time, 1 or more.
    """

    def __init__(self, dataset: FederatedDataset, num_threads: int) -> None:
        self._dataset = dataset
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")
        self._lock = threading.Lock()
        self._present: dict[int, Future[ClientData]] = {}
        self._next: dict[int, Future[ClientData]] = {}

    def read_ahead(self, client_ids: Sequence[int]) -> None:
        """Begin to read the next cohort. What the last call began is the present cohort's; all before is dropped."""
        with self._lock:
            dropped, self._present = self._present, self._next
            for future in dropped.values():
                if future not in self._present.values():
                    future.cancel()
            self._next = {
                client_id: self._present.get(client_id) or self._pool.submit(self._dataset.client_data, client_id)
                for client_id in client_ids
            }

    def client_data(self, client_id: int) -> ClientData:
        """A client's examples, from what was read ahead, or else read now."""
        with self._lock:
            read = self._present.get(client_id) or self._next.get(client_id)
        return self._dataset.client_data(client_id) if read is None else read.result()
