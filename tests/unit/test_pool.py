"""Members that are faulty: the server finds what it can know to be wrong, drops who said it, and nobody else pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import basic
from members import COHORT, NUM_PARAMETERS, SIZES, UNSEEN, Faulty, Member, Pool, Values, assert_whole

from multi_process.messages import AssignGroups, Message, RequestPartialSum, StartTraining
from multi_process.pace import LEAST_SECONDS, PATIENCE
from multi_process.server import MAX_GIVEN_UP

Start = Callable[..., Pool]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a pool with members."""

    def build(*members: Member, **settings: Any) -> Pool:
        pool = Pool(members, **settings)
        pool.start(monkeypatch)
        return pool

    return build


def changing(changed_kind: str, change: Callable[[Values], Values]) -> Faulty:
    """A member with other fields in its messages of a kind."""

    def tamper(kind: str, values: Values) -> tuple[str, Values]:
        return kind, {**values, **change(values)} if kind == changed_kind else values

    return Faulty(tamper)


def each_report(**changes: Any) -> Callable[[Values], Values]:
    return lambda values: {"reports": [{**report, **changes} for report in values["reports"]]}


def each_score(**changes: Any) -> Callable[[Values], Values]:
    return lambda values: {"scores": [{**score, **changes} for score in values["scores"]]}


def assert_sent_away(pool: Pool, honest: Member, faulty: Member, *parts: str) -> None:
    """The faulty one, for good and with one line; the honest one not at all."""
    assert faulty.told is not None
    assert faulty.told[0] == "dismissed"
    assert all(part in faulty.told[1] for part in parts), faulty.told
    assert honest.told is None
    (line,) = [line for line in pool.said if "lost worker" in line or "could not join" in line]
    assert f"worker {faulty.rank}" in line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda values: {"total": torch.full((NUM_PARAMETERS,), 2**62)}, "beyond what weight"),
        (lambda values: {"total": torch.full((NUM_PARAMETERS,), -(2**63))}, "beyond what weight"),
        (lambda values: {"total": values["total"].to(torch.int32)}, "is not a message of protocol"),
        (lambda values: {"total": values["total"].to(torch.float32)}, "total is a tensor of torch.float32"),
        (lambda values: {"total": values["total"][:-1]}, "2 parameters"),
        (lambda values: {"total": values["total"].reshape(-1, 1)}, "shape (3, 1)"),
        (lambda values: {"total": 3}, "total is 3"),
        (lambda values: {"weight": 0, "reports": []}, "reports is of length 0"),
        (lambda values: {"weight": values["weight"] + 1}, "its sum has weight"),
        (lambda values: {"weight": 0}, "its sum has weight 0"),
        (lambda values: {"weight": -5}, "weight is -5"),
        (lambda values: {"weight": True}, "weight is true, must be a whole number"),
        (lambda values: {"capacity": values["capacity"] + 1}, "has capacity"),
        (lambda values: {"reports": values["reports"][:-1]}, "not the one that it was asked for"),
        (lambda values: {"reports": values["reports"] * 2}, "its sum is not"),
        (lambda values: {"reports": {}}, "reports is an object, must be an array"),
        (each_report(num_examples=1000), "1000 training examples; it has"),
        (each_report(num_examples=-1), "-1 training examples; it has"),
        (each_report(client_id=99), "were not delivered as their group"),
        (each_report(client_id="0"), 'client_id is "0", must be a whole number'),
        (each_report(seconds=-1e300), "seconds is -1e+300"),
        (each_report(seconds=math.nan), "seconds is nan"),
        (each_report(loss="low"), 'loss is "low", must be a number'),
        (each_report(refused="because"), "for no reason of this protocol"),
        (each_report(refused=["because"]), "refused is an array, must be a text"),
        (each_report(extra=1), "reports[0].extra is unknown"),
        (lambda values: {"states": {0: {"kept": torch.zeros(2)}}}, "clients [0] have no reason to keep anything"),
        (lambda values: {"states": {"all": {}}}, "must have whole numbers"),
    ],
)
def test_an_impossible_sum_changes_nothing(start: Start, change: Callable[[Values], Values], reason: str) -> None:
    """It would change the model without a word, or send away the honest worker whose part no longer fits."""
    honest, faulty = Member(), changing("PartialSum", change)
    pool = start(honest, faulty)
    assert_whole(pool.train())
    assert_sent_away(pool, honest, faulty, reason)


def test_an_honest_worker_does_not_pay_for_what_another_one_sent_before_it(start: Start) -> None:
    """Whose part would no longer fit into the round's weight."""
    honest, faulty = Member(1), changing("PartialSum", lambda values: {"weight": values["weight"] + 1})
    faulty.seconds = 0.25
    pool = start(honest, faulty)
    assert_whole(pool.train())
    assert_sent_away(pool, honest, faulty, "its sum has weight")


def test_an_update_that_diverged_is_left_out_as_ever(start: Start) -> None:
    """An honest worker refuses it, says why, and counts none of its weight."""

    class Refusing(Member):
        def send_sum(self) -> None:
            reason = "client {}: its update is refused, because its largest entry is nan (the limit is 1024)"
            reports = [
                {**self.report_values(client_id), "loss": math.nan, "refused": reason.format(client_id)}
                for client_id in self._trained
            ]
            total = torch.zeros(NUM_PARAMETERS, dtype=torch.int64)
            assert isinstance(self._start, StartTraining)
            self.say("PartialSum", weight=0, capacity=self._start.capacity, reports=reports, total=total)

    member = Refusing()
    update = start(member).train()
    assert member.told is None
    assert update.sum.weight == 0
    assert all(f"client {report.client_id}: " in str(report.refused) for report in update.reports)
    assert all(math.isnan(report.loss) for report in update.reports)


@pytest.mark.parametrize(
    ("change", "num_curve_epochs", "reason"),
    [
        (each_score(initial=basic(1.0, 7.0)), 0, "has an accuracy of 7.0"),
        (each_score(personalized=basic(1.0, -0.1)), 0, "has an accuracy of -0.1"),
        (each_score(personalized=basic(1.0, math.inf)), 0, "has an accuracy of inf"),
        (each_score(initial=basic(1.0, math.nan)), 0, "has an accuracy of nan"),
        (each_score(initial=None), 0, "initial is null, must be an object"),
        (each_score(initial={"loss": None}), 0, "is null, must be a number"),
        (each_score(initial={"loss": 1.0}), 0, "was scored by loss, not by loss, accuracy"),
        (each_score(num_train_examples=77), 0, "77 training examples; it has"),
        (each_score(num_test_examples=0), 0, "num_test_examples is 0"),
        (each_score(client_id=0), 0, "were not delivered as their group"),
        (each_score(by_epoch=[basic(1.0, 0.5)]), 0, "after 1 numbers of epochs, not 0"),
        (each_score(by_epoch=[]), 2, "after 0 numbers of epochs, not 3"),
        (each_score(by_epoch=[basic(1.0, 0.5), basic(1.0, 0.5), basic(1.0, 8.0)]), 2, "has an accuracy of 8.0"),
        (each_score(by_epoch=[[1.0], [1.0], [1.0]]), 2, "by_epoch[0] is an array, must be an object"),
        (lambda values: {"scores": values["scores"] * 2}, 0, "client"),
        (lambda values: {"scores": []}, 0, "scores is of length 0"),
    ],
)
def test_impossible_scores_are_in_no_result(
    start: Start, change: Callable[[Values], Values], num_curve_epochs: int, reason: str
) -> None:
    honest, faulty = Member(), changing("GroupScored", change)
    pool = start(honest, faulty)
    scores = pool.score(num_curve_epochs)
    assert sorted((score.client_id, score.num_train_examples) for score in scores) == [
        (client_id, SIZES[client_id]) for client_id in UNSEEN
    ]
    assert {score.personalized["accuracy"] for score in scores} == {0.75}
    assert {len(score.by_epoch) for score in scores} == {num_curve_epochs + 1 if num_curve_epochs else 0}
    assert_sent_away(pool, honest, faulty, reason)


def test_losses_that_are_not_finite_are_results(start: Start) -> None:
    """Training that diverges ends with them, at an honest worker too."""
    member = changing("GroupScored", each_score(personalized=basic(math.inf, 0.5), initial=basic(math.nan, 0.5)))
    assert all(math.isinf(score.personalized["loss"]) for score in start(member).score())
    assert member.told is None


SCORE: Values = {
    "client_id": 0,
    "num_train_examples": 5,
    "num_test_examples": 1,
    "initial": basic(1.0, 0.5),
    "personalized": basic(1.0, 0.5),
    "by_epoch": [],
}


@pytest.mark.parametrize(
    ("instead_of", "kind", "values"),
    [
        ("GroupTrained", "GroupScored", {"scores": [SCORE]}),
        ("GroupTrained", "GroupTrained", {"first": 7}),
        ("GroupTrained", "GroupTrained", {"first": -1}),
        ("GroupTrained", "GroupTrained", {"first": None}),
        ("GroupTrained", "GroupTrained", {}),
        ("GroupTrained", "Ready", {"fingerprint": "quadratic", "device": "cpu", "warnings": []}),
        ("GroupTrained", "Finish", {}),
        ("GroupTrained", "RequestPartialSum", {}),
        ("GroupTrained", "Failed", {"reason": "it is another's", "client_id": 7}),
        ("GroupTrained", "Failed", {"reason": 3, "client_id": None}),
        ("PartialSum", "GroupTrained", {"first": COHORT[0]}),
        ("GroupTrained", "Configure", {"ticket": "", "experiment": {}, "num_slots": 1}),
    ],
)
def test_what_was_not_expected_costs_its_sender_its_place(
    start: Start, instead_of: str, kind: str, values: Values
) -> None:
    honest = Member()
    faulty = Faulty(lambda said, own: (kind, values) if said == instead_of else (said, own))
    pool = start(honest, faulty)
    assert_whole(pool.train())
    assert_sent_away(pool, honest, faulty)


def test_a_client_is_not_trained_where_clients_are_scored(start: Start) -> None:
    """The schedule would count it as done, and wait for a sum that nobody has."""
    honest = Member()
    faulty = Faulty(
        lambda kind, values: (
            ("GroupTrained", {"first": values["scores"][0]["client_id"]}) if kind == "GroupScored" else (kind, values)
        )
    )
    pool = start(honest, faulty)
    assert len(pool.score()) == len(UNSEEN)
    assert_sent_away(pool, honest, faulty, "GroupTrained message was not expected")


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": -1},
        {"threads": 10**9},
        {"threads": 1.5},
        {"num_cores": "four"},
        {"num_cores": 0},
        {"num_cores": 10**30},
        {"device_kind": "abacus"},
        {"device_kind": ["cpu"]},
        {"device_memory_bytes": -1},
        {"device_memory_bytes": None},
        {"kernels": None},
        {"kernels": {"torch": 2}},
        {"kernels": {str(number): "" for number in range(1000)}},
        {"machine": 5},
        {"machine": "x" * 10**6},
        {"ticket": "another's"},
        {"ticket": None},
    ],
)
def test_a_worker_that_joins_with_nonsense_does_not(start: Start, changes: Values) -> None:
    """Before the start, while the server waits for the honest one, and in the middle of a run."""
    faulty, honest, late = changing("Join", lambda _: changes), Member(1), changing("Join", lambda _: changes)
    pool = start(faulty, honest, num_first=1)
    assert faulty.told is not None
    assert faulty.told[0] == "dismissed"
    pool.admit(late)
    assert_whole(pool.train())
    assert late.told is not None
    assert len(list(pool.lines("worker 2 could not join"))) == 2
    assert honest.told is None


def test_no_worker_is_missed_where_others_came_in_its_place(start: Start) -> None:
    """The line would name workers that nobody waits for, and how to start them."""
    pool = start(*(Member(rank) for rank in (5, 6, 7, 8)), num_first=3)
    assert pool.pool._missing() == "the workers to read their data"


def test_who_has_not_joined_can_say_nothing(start: Start) -> None:
    honest = Member()
    mute = Faulty(lambda kind, values: ("GroupTrained", {"first": 0}) if kind == "Join" else None)
    pool = start(honest, mute, num_first=1)
    assert_whole(pool.train())
    assert_sent_away(pool, honest, mute, "GroupTrained message was not expected")


def test_one_member_cannot_end_the_run_by_failing_at_the_same_client_again(start: Start) -> None:
    """A client at which two workers fail ends the run, because all others would too."""
    honest = Member(1)

    def fail(kind: str, values: Values) -> tuple[str, Values]:
        return ("Failed", {"reason": "no", "client_id": values["first"]}) if kind == "GroupTrained" else (kind, values)

    first, again, other = Faulty(fail, rank=2), Faulty(fail, rank=2), Faulty(fail, rank=3)
    pool = start(honest, first)
    assert_whole(pool.train())
    pool.admit(again)
    assert_whole(pool.train())
    assert first.told == again.told == ("dropped", "no")
    pool.admit(other)
    with pytest.raises(ValueError, match="worker 3: no"):
        pool.train()


def test_texts_of_a_member_are_cleaned_before_anybody_sees_them(start: Start) -> None:
    """In the terminal, the log and the metrics they could forge lines, or be megabytes long."""
    honest = Member()
    evil = "\x1b[2Jgone\nserver: all is well" + "x" * 10**6

    def tamper(kind: str, values: Values) -> tuple[str, Values]:
        if kind == "Ready":
            return kind, {**values, "device": evil}
        return ("Failed", {"reason": evil, "client_id": None}) if kind == "GroupTrained" else (kind, values)

    pool = start(honest, Faulty(tamper))
    update = pool.train()
    assert_whole(update)
    shown = [*pool.said, *update.lost_workers.values()]
    assert sum("gone server: all is well" in text for text in shown) == 3
    assert all(text.isprintable() and len(text) < 700 for text in shown)


class Swallowing(Member):
    """Lives, and never finishes what it is given."""

    def answer(self, message: Message) -> None:
        if not isinstance(message, (AssignGroups, RequestPartialSum)):
            super().answer(message)


class SwallowingSums(Member):
    """Says that it is done, and never sends the sum."""

    def answer(self, message: Message) -> None:
        if not isinstance(message, RequestPartialSum):
            super().answer(message)


@pytest.mark.parametrize("kind", [Swallowing, SwallowingSums])
def test_a_worker_that_never_finishes_holds_nothing_up_for_ever(start: Start, kind: type[Member]) -> None:
    """A kernel that hangs looks the same: it lives, it answers, and nothing comes."""
    honest, hanging = Member(1, seconds=2.0), kind(2)
    pool = start(honest, hanging)
    update = pool.train()
    assert_whole(update)
    assert hanging.told is not None
    assert hanging.told[0] == "dropped", "it may come back when it is well"
    assert "it has finished nothing for 60" in update.lost_workers[2]
    assert pool.clock.now < LEAST_SECONDS + 100


def test_the_limit_follows_from_the_slowest_client_seen(start: Start) -> None:
    honest, hanging = Member(1, seconds=100.0), Swallowing(2)
    pool = start(honest, hanging)
    assert_whole(pool.train())
    assert hanging.told is not None
    longest_in_hand = 2 * honest.seconds
    assert PATIENCE * honest.seconds <= pool.clock.now < PATIENCE * longest_in_hand * max(SIZES) / min(SIZES) + 1000


def test_a_slow_worker_is_not_given_up(start: Start) -> None:
    """Nine times slower than the other, far beyond the least limit."""
    fast, slow = Member(1, seconds=100.0), Member(2, seconds=900.0)
    pool = start(fast, slow)
    for round_number in (1, 2):
        assert_whole(pool.train(round_number))
    assert slow.told is None


def test_what_a_worker_that_was_given_up_delivers_later_is_not_counted_again(start: Start) -> None:
    fast, slow = Member(1, seconds=1.0), Member(2, seconds=LEAST_SECONDS + 50.0)
    pool = start(fast, slow)
    assert_whole(pool.train())
    assert slow.told is not None
    fast.seconds = 50.0  # long enough that what the slow one said arrives in this round
    assert_whole(pool.train(2))
    assert len(list(pool.lines("lost worker 2"))) == 1
    assert fast.told is None


def test_the_only_worker_is_waited_for_and_that_is_said(start: Start) -> None:
    """Nobody else could do its work, so sending it away would cost the run and gain nothing."""
    only = Member(1, seconds=1.0)
    pool = start(only)
    assert_whole(pool.train())
    only.seconds = 10 * LEAST_SECONDS
    assert_whole(pool.train(2))
    assert only.told is None
    assert len(list(pool.lines("worker 1: it has finished nothing for 60", "no other worker could do better"))) == 1


def test_nothing_is_slow_before_anything_was_finished(start: Start) -> None:
    """The first clients of a run have nothing to be compared with."""
    members = [Member(rank, seconds=100 * LEAST_SECONDS) for rank in (1, 2)]
    pool = start(*members)
    assert_whole(pool.train())
    assert {member.told for member in members} == {None}


def test_work_that_is_slow_everywhere_ends(start: Start) -> None:
    """Each worker in turn may be given up once, and then somebody must be waited for."""
    members = [Member(rank, seconds=1.0) for rank in (1, 2)]
    pool = start(*members)
    assert_whole(pool.train())
    for member in members:
        member.seconds = 3 * LEAST_SECONDS
    assert_whole(pool.train(2))
    assert [member.told is None for member in members].count(False) == 1


def test_a_worker_that_was_slow_once_takes_over_from_one_that_hangs(start: Start) -> None:
    """What a rank was given up for in an earlier round says nothing of whether it could do better now."""

    class HangingInRound3(Member):
        def work_on(self, group: list[int], end: float) -> None:
            assert isinstance(self._start, StartTraining)
            if self._start.round_number < 3:
                super().work_on(group, end)

    first = HangingInRound3(1)
    pool = start(first, Swallowing(2))
    assert_whole(pool.train(1))
    pool.admit(Member(2))
    assert_whole(pool.train(2))
    assert_whole(pool.train(3))
    assert first.told is not None
    assert "far longer than others took" in first.told[1]


def test_who_is_given_up_again_and_again_is_sent_away(start: Start) -> None:
    honest = Member(1)
    pool = start(honest)
    hanging = [Swallowing(2) for _ in range(MAX_GIVEN_UP + 1)]
    for round_number, member in enumerate(hanging, start=1):
        pool.admit(member)
        assert_whole(pool.train(round_number))
    assert [member.told and member.told[0] for member in hanging] == ["dropped"] * MAX_GIVEN_UP + ["dismissed"]


def test_a_server_that_was_stopped_blames_nobody(start: Start) -> None:
    """After SIGCONT, or when a laptop wakes up, what the workers said meanwhile has not been read yet."""

    class Stopping(Member):
        def work_on(self, group: list[int], end: float) -> None:
            super().work_on(group, end)
            if not self.has_stopped:
                self.has_stopped = True
                self._run.clock.now += 100 * LEAST_SECONDS

        has_stopped = False

    members = [Member(1), Stopping(2)]
    pool = start(*members)
    assert_whole(pool.train())
    assert {member.told for member in members} == {None}


@pytest.mark.parametrize("quiet_seconds", [0.0, 2.5, 290.0, 1000.0])
def test_the_wait_for_a_worker_counts_from_the_loss_of_the_last_one(start: Start, quiet_seconds: float) -> None:
    """A worker dies late in a quiet stretch: a long client, of which nothing is heard meanwhile."""
    only = Member(1, seconds=10_000.0)
    pool = start(only, wait_seconds=300.0)
    died_at = pool.clock.now + quiet_seconds
    only.leave(died_at)
    with pytest.raises(ConnectionError, match=r"none came within 300 s \(--worker_wait_seconds\)"):
        pool.train()
    assert pool.clock.now - died_at == pytest.approx(300.0)


def test_who_could_not_join_does_not_prolong_the_wait(start: Start) -> None:
    only = Member(1, seconds=10_000.0)
    pool = start(only, wait_seconds=300.0)
    only.leave(at=0.0)
    stranger = changing("Join", lambda _: {"ticket": "another's"})
    pool.admit(stranger)
    with pytest.raises(ConnectionError, match="none came within 300 s"):
        pool.train()
    assert pool.clock.now == pytest.approx(300.0)


def test_what_becomes_of_a_lost_workers_clients_is_said_as_it_is(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has been given them where nobody is left; and those that were sent away at the end are not lost.

    Nor are those that Ctrl-C ends together with the server.
    """
    alone = Member()
    pool = start(alone, wait_seconds=5.0)
    alone.leave(0.5)
    with pytest.raises(ConnectionError, match="no worker is left"):
        pool.train()
    (line,) = pool.lines("lost worker 1")
    assert "client(s) wait for another worker; 0 left" in line
    assert "given to others" not in line
    stopped = Member()
    pool = start(stopped, wait_seconds=5.0)
    pool.is_over = True
    stopped.leave(0.5, "it was stopped by SIGINT")
    with pytest.raises(ConnectionError, match="no worker is left"):
        pool.train()
    assert not list(pool.lines("lost worker"))
    monkeypatch.setattr("multi_process.server.is_ending", lambda: True)
    first, second = Member(), Member()
    pool = start(first, second, wait_seconds=5.0)
    first.leave(0.5)
    second.leave(0.6)
    with pytest.raises(ConnectionError, match="no worker is left"):
        pool.train()
    assert not list(pool.lines("lost worker"))


def test_workers_that_a_launcher_starts_are_not_asked_of_the_user(start: Start) -> None:
    """Who has neither their keys nor their token."""
    with pytest.raises(ValueError, match=r"^worker 2 did not join within 600 s \(--join_timeout_seconds\)$"):
        start(Member(), num_first=2)
