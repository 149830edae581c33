"""A round's clients are handed out so that every worker has its share, also where one of them could take all."""

from __future__ import annotations

import pytest
from members import COHORT, Member, Pool, Values, assert_whole


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
