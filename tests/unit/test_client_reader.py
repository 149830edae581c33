"""Reading ahead must change nothing but the time: each client's examples are its own, and nothing is kept for ever."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from helpers import QuadraticClients, make_config

from perfedavg.client_data import ClientData
from perfedavg.client_reader import ClientReader
from perfedavg.cohorts import draw_cohort, draw_next_cohort
from perfedavg.config import OptimizerConfig, Phase, PhaseConfig

SGD = OptimizerConfig("sgd", 0.1)


class CountedClients(QuadraticClients):
    """Clients that know in which thread each was read."""

    def __init__(self) -> None:
        super().__init__([[float(number), 0.0] for number in range(8)], [3] * 8, num_unseen=1)
        self.readers: dict[int, list[str]] = {}

    def client_data(self, client_id: int) -> ClientData:
        self.readers.setdefault(client_id, []).append(threading.current_thread().name)
        if client_id == 7:
            raise ValueError("client 7 is damaged")
        return super().client_data(client_id)


def test_what_was_read_ahead_is_not_read_again() -> None:
    dataset = CountedClients()
    reader = ClientReader(dataset, 2)
    reader.read_ahead([1, 2])
    for client_id in (1, 2, 3):
        expected = QuadraticClients.client_data(dataset, client_id)
        assert torch.equal(reader.client_data(client_id).train_inputs, expected.train_inputs)
    assert [name.startswith("reader") for name in (*dataset.readers[1], *dataset.readers[2])] == [True, True]
    assert dataset.readers[3] == [threading.current_thread().name], "what was not read ahead is read when asked for"


def test_a_cohort_stays_while_the_next_one_is_read_and_is_dropped_then() -> None:
    dataset = CountedClients()
    reader = ClientReader(dataset, 1)
    reader.read_ahead([1, 2])
    kept = weakref.ref(reader.client_data(1).train_inputs)
    reader.read_ahead([2, 3])
    assert kept() is not None
    reader.read_ahead([4])
    assert reader.client_data(2) is not None
    assert len(dataset.readers[2]) == 1, "a client of both is read once"
    reader.read_ahead([])
    gc.collect()
    assert kept() is None


def test_a_client_that_cannot_be_read_fails_where_it_is_asked_for() -> None:
    reader = ClientReader(CountedClients(), 1)
    reader.read_ahead([7])
    with pytest.raises(ValueError, match="client 7 is damaged"):
        reader.client_data(7)


def test_the_next_cohort_is_the_one_that_comes() -> None:
    fine_tune = PhaseConfig(1, 1, SGD, SGD)
    config = make_config(fedavg=PhaseConfig(2, 1, SGD, SGD), fine_tune=fine_tune)
    clients = range(16)
    assert draw_next_cohort(config, clients, Phase.FEDAVG, 1) == draw_cohort(config, clients, Phase.FEDAVG, 2)
    assert draw_next_cohort(config, clients, Phase.FEDAVG, 2) == draw_cohort(config, clients, Phase.FINE_TUNE, 1)
    assert draw_next_cohort(config, clients, Phase.FINE_TUNE, 1) == ()
