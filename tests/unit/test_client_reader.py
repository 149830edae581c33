"""Reading ahead must change nothing but the time: each client's examples are its own, and nothing is kept for ever."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence

import pytest
import torch
from helpers import Difference, QuadraticClients, half_squared_norm, make_config

from perfedavg.contracts import ClientData
from perfedavg.engine.client_reader import ClientReader
from perfedavg.engine.cohorts import draw_cohort, draw_next_cohort
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.tasks import CohortTask
from perfedavg.settings import OptimizerConfig, Phase, PhaseConfig

SGD = OptimizerConfig("sgd", 0.1)


class CountedClients(QuadraticClients):
    """Clients that know in which thread each was read."""

    def __init__(self) -> None:
        super().__init__([[float(number), 0.0] for number in range(12)], [3] * 12, num_unseen=1)
        self.readers: dict[int, list[str]] = {}

    def client_data(self, client_id: int) -> ClientData:
        self.readers.setdefault(client_id, []).append(threading.current_thread().name)
        if client_id == 11:
            raise ValueError("client 11 is damaged")
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


def test_what_is_kept_is_read_once_and_what_is_dropped_is_gone() -> None:
    dataset = CountedClients()
    reader = ClientReader(dataset, 1)
    reader.read_ahead([1, 2])
    kept = weakref.ref(reader.client_data(1).train_inputs)
    reader.keep_only([1, 2, 3])
    reader.read_ahead([2, 3])
    assert kept() is not None
    assert reader.client_data(2) is not None
    assert len(dataset.readers[2]) == 1, "a client of both is read once"
    reader.keep_only([])
    gc.collect()
    assert kept() is None


def test_a_client_that_cannot_be_read_fails_where_it_is_asked_for() -> None:
    reader = ClientReader(CountedClients(), 1)
    reader.read_ahead([11])
    with pytest.raises(ValueError, match="client 11 is damaged"):
        reader.client_data(11)


def test_the_next_cohort_is_the_one_that_comes() -> None:
    fine_tune = PhaseConfig(1, 1, SGD, SGD)
    config = make_config(fedavg=PhaseConfig(2, 1, SGD, SGD), fine_tune=fine_tune)
    clients = range(16)
    assert draw_next_cohort(config, clients, Phase.FEDAVG, 1) == draw_cohort(config, clients, Phase.FEDAVG, 2)
    assert draw_next_cohort(config, clients, Phase.FEDAVG, 2) == draw_cohort(config, clients, Phase.FINE_TUNE, 1)
    assert draw_next_cohort(config, clients, Phase.FINE_TUNE, 1) == ()


def executor_with_readers(dataset: CountedClients) -> LocalExecutor:
    """As beside a GPU, but on a CPU."""
    config = make_config(num_clients=None, cohort_size=4, fedavg=PhaseConfig(9, 1, SGD, SGD), fine_tune=None)
    return LocalExecutor(config, Difference([0.0, 0.0]), dataset, loss_function=half_squared_norm, num_readers=1)


def cohort_of(round_number: int, dataset: CountedClients) -> tuple[int, ...]:
    """In the order in which it is handed out: the clients have equal sizes."""
    config = make_config(num_clients=None, cohort_size=4, fedavg=PhaseConfig(9, 1, SGD, SGD), fine_tune=None)
    return draw_cohort(config, dataset.train_client_ids, Phase.FEDAVG, round_number)


def train_share(executor: LocalExecutor, round_number: int, share: Sequence[int]) -> None:
    """What a worker does that is given some of a round's clients."""
    training = executor.begin_training(CohortTask(Phase.FEDAVG, round_number, (), 100), torch.zeros(2))
    for client_id in share:
        training.expect((client_id,))
    for client_id in share:
        training.train((client_id,))
    executor._place.reader._pool.submit(lambda: None).result()  # behind all that is to be read


def test_a_worker_reads_its_share_of_the_next_round_and_no_more() -> None:
    """Were it to read the whole cohort, N workers would each read everything, and N - 1 of N for nothing."""
    dataset = CountedClients()
    executor = executor_with_readers(dataset)
    first, second = cohort_of(1, dataset), cohort_of(2, dataset)
    train_share(executor, 1, first[:1])
    assert set(dataset.readers) == {first[0], second[0]}
    before = {client_id: len(threads) for client_id, threads in dataset.readers.items()}
    train_share(executor, 2, second[:1])
    assert len(dataset.readers[second[0]]) == before[second[0]], "it was read ahead"


def test_a_round_without_a_client_leaves_nothing_behind() -> None:
    """A worker that sat a round out hears nothing of it, and must not go on with what it read for it."""
    dataset = CountedClients()
    executor = executor_with_readers(dataset)
    train_share(executor, 1, cohort_of(1, dataset)[:1])
    train_share(executor, 5, cohort_of(5, dataset)[:2])
    assert set(executor._place.reader._read) <= {*cohort_of(5, dataset)[:2], *cohort_of(6, dataset)[:2]}
    assert set(executor._place.reader._read) >= {*cohort_of(6, dataset)[:2]}


def test_one_process_reads_all_of_the_next_round() -> None:
    dataset = CountedClients()
    executor = executor_with_readers(dataset)
    executor.train(CohortTask(Phase.FEDAVG, 1, cohort_of(1, dataset), 12), torch.zeros(2))
    executor._place.reader._pool.submit(lambda: None).result()
    assert set(dataset.readers) == {*cohort_of(1, dataset), *cohort_of(2, dataset)}
