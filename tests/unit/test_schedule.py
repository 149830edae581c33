"""Handing out: a client that is counted twice or not at all makes another model, whatever happened to the workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multi_process.schedule import Schedule

FIRST, SECOND = 1, 2
WORKERS = st.integers(0, 3)


@given(st.lists(st.integers(0, 10**9), unique=True, max_size=12), st.data())
def test_whatever_happens_each_client_is_delivered_once(client_ids: list[int], data: st.DataObject) -> None:
    """Workers take, finish, deliver and are lost in any order; a last one, which is never lost, does the rest."""
    schedule = Schedule(client_ids)
    in_work: dict[int, list[int]] = {worker: [] for worker in range(4)}
    done: dict[int, list[int]] = {worker: [] for worker in range(4)}
    delivered: list[int] = []

    def take(worker: int, most: int) -> None:
        in_work[worker] += schedule.take(worker, most)

    def finish(worker: int, count: int) -> None:
        for client_id in in_work[worker][:count]:
            schedule.finish(worker, client_id)
            done[worker].append(client_id)
        del in_work[worker][:count]

    def deliver(worker: int, count: int) -> None:
        schedule.deliver(worker, done[worker][:count])
        delivered.extend(done[worker][:count])
        del done[worker][:count]

    def lose(worker: int, _: int) -> None:
        assert schedule.lose(worker) == {*in_work[worker], *done[worker]}
        in_work[worker], done[worker] = [], []

    steps = st.tuples(st.sampled_from([take, finish, deliver, lose]), WORKERS, st.integers(0, 4))
    for step, worker, count in data.draw(st.lists(steps, max_size=40)):
        step(worker, count)
        assert len(schedule.in_work(worker)) == len(in_work[worker])
        assert schedule.num_done(worker) == len(done[worker])
        held = sum(map(len, in_work.values())) + sum(map(len, done.values()))
        assert schedule.num_waiting == len(client_ids) - len(delivered) - held
        assert schedule.is_complete == (len(delivered) == len(client_ids))
    for worker in range(4):
        finish(worker, len(client_ids))
        deliver(worker, len(client_ids))
    last = 4
    in_work[last], done[last] = [], []
    take(last, len(client_ids))
    finish(last, len(client_ids))
    deliver(last, len(client_ids))
    assert sorted(delivered) == sorted(client_ids)
    assert schedule.is_complete


@given(st.lists(st.integers(), unique=True, max_size=12), st.integers(1, 3))
def test_clients_are_handed_out_in_the_order_given(client_ids: list[int], most: int) -> None:
    """The largest come first, so that none of them is begun last and waited for alone."""
    schedule = Schedule(client_ids)
    taken: list[int] = []
    while schedule.num_waiting:
        taken += schedule.take(FIRST, most)
    assert taken == client_ids
    assert schedule.take(SECOND, most) == []


def test_what_a_lost_worker_had_comes_before_what_is_smaller() -> None:
    schedule = Schedule([30, 20, 10])
    assert schedule.take(FIRST, 1) == [30]
    schedule.finish(FIRST, 30)
    assert schedule.lose(FIRST) == {30}
    assert schedule.take(SECOND, 3) == [30, 20, 10]


def test_what_a_lost_worker_had_delivered_is_not_done_again() -> None:
    schedule = Schedule([30, 20])
    schedule.take(FIRST, 2)
    schedule.finish(FIRST, 30)
    schedule.deliver(FIRST, [30])
    assert schedule.lose(FIRST) == {20}
    assert schedule.take(SECOND, 2) == [20]


def test_nothing_is_complete_before_it_is_delivered() -> None:
    schedule = Schedule([30])
    assert Schedule([]).is_complete
    schedule.take(FIRST, 1)
    schedule.finish(FIRST, 30)
    assert not schedule.is_complete
    schedule.deliver(FIRST, [30])
    assert schedule.is_complete


def test_a_worker_cannot_report_what_it_was_not_given() -> None:
    """A client that another worker trains, one that nobody does, one that was reported already."""
    schedule = Schedule([30, 20])
    schedule.take(FIRST, 1)
    for worker, client_id in ((SECOND, 30), (FIRST, 20), (FIRST, 99)):
        with pytest.raises(ValueError, match=f"client {client_id} was reported, but not handed out to it"):
            schedule.finish(worker, client_id)
    schedule.finish(FIRST, 30)
    with pytest.raises(ValueError, match="client 30 was reported"):
        schedule.finish(FIRST, 30)


def test_a_worker_cannot_deliver_what_it_has_not_done() -> None:
    """In work only, of another worker, delivered already, or twice in one delivery; and then nothing is taken."""
    schedule = Schedule([30, 20])
    schedule.take(FIRST, 2)
    schedule.finish(FIRST, 30)
    for worker, client_ids in ((FIRST, [20]), (SECOND, [30]), (FIRST, [30, 99]), (FIRST, [30, 30])):
        with pytest.raises(ValueError, match="were delivered, but not handed out to it"):
            schedule.deliver(worker, client_ids)
    assert schedule.num_done(FIRST) == 1
    schedule.deliver(FIRST, [30])
    with pytest.raises(ValueError, match=r"clients \[30\] were delivered"):
        schedule.deliver(FIRST, [30])
    assert not schedule.is_complete
