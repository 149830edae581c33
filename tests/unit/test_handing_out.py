"""A round's clients are handed out so that every worker has its share, also where one of them could take all."""

from __future__ import annotations

import pytest
from members import COHORT, Member, Pool, Values, assert_whole

from multi_process.messages import AssignGroups, StartTraining


class Wide(Member):
    """A worker with more training slots than a round has clients. counts: the clients that it was given."""

    def __init__(self, rank: int, num_slots: int) -> None:
        super().__init__(rank)
        self.num_slots = num_slots
        self.given: list[int] = []

    def join_values(self) -> Values:
        return {**super().join_values(), "threads": self.num_slots, "num_cores": self.num_slots}

    def work_on(self, group: list[int], end: float) -> None:
        self.given += group
        super().work_on(group, end)


@pytest.mark.parametrize("slots", [(8, 8), (16, 4, 4), (1, 1), (6, 1)])
def test_no_worker_takes_what_another_could_do_now(slots: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the first to join given as many clients as it has slots, the others would idle, round after round."""
    members = [Wide(rank, num_slots) for rank, num_slots in enumerate(slots, 1)]
    pool = Pool(members)
    pool.start(monkeypatch)
    assert_whole(pool.train())
    shares = [len(member.given) for member in members]
    assert sum(shares) == len(COHORT)
    for share, num_slots in zip(shares, slots, strict=True):
        assert 1 <= share <= -(-len(COHORT) * num_slots // sum(slots)) + 1


def test_a_slow_worker_holds_up_no_round_longer_than_its_own_client_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has a second client in reserve begins with it when the others have nothing left to do."""
    members = [Member(1, seconds=10.0), Member(2)]
    pool = Pool(members)
    pool.start(monkeypatch)
    for round_number in (1, 2, 3):
        began = pool.clock.now
        assert_whole(pool.train(round_number))
        assert pool.clock.now - began == pytest.approx(10.0)


def test_a_worker_has_a_client_to_go_on_with_while_there_are_plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would idle between any two of them, for as long as a message takes there and back.

    Of a worker that has finished nothing yet, nobody knows whether it comes to it.
    """
    member = Member()
    pool = Pool([member])
    pool.start(monkeypatch)
    for round_number in (1, 2):
        assert_whole(pool.train(round_number))
    begun = [number for number, message in enumerate(member.heard) if isinstance(message, StartTraining)]
    at_first = [member.heard[number + 1] for number in begun]
    assert [len(message.groups) for message in at_first if isinstance(message, AssignGroups)] == [1, 2]
