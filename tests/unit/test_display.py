"""What a person sees of a run that goes on."""

from __future__ import annotations

import dataclasses
import io
import re
import time

import pytest
from helpers import QuadraticClients, basic, make_config

from perfedavg.engine.experiment import RoundRecord
from perfedavg.methods.ditto import Ditto
from perfedavg.methods.maml import MAML
from perfedavg.settings import Phase, Population
from perfedavg.terminal import display
from perfedavg.terminal.display import ProgressDisplay
from perfedavg.terminal.time_to_go import TimeToGo, describe_dear_methods

FEDAVG = dataclasses.replace(make_config().fedavg, num_rounds=10, num_local_epochs=2)
MAML_PHASE = dataclasses.replace(make_config().fine_tune, num_rounds=4, num_local_epochs=3, method=MAML())
CONFIG = make_config(
    fedavg=FEDAVG, fine_tune=MAML_PHASE, eval_every=5, num_personalization_epochs=5, num_trained_scored=0
)
CLIENTS = QuadraticClients([[0.0]] * 9, [6] * 9, num_unseen=4)
"""An epoch is one step."""
EVALUATION = {"initial": basic(1.0, 0.5), "personalized": basic(1.0, 0.5)}


def record(round_number: int, seconds: float = 1.0, is_point: bool = True) -> RoundRecord:
    evaluation = EVALUATION if is_point else None
    return RoundRecord(Phase.FEDAVG, round_number, (0,), 1, {}, 1.0, 1.0, seconds, 0.0, {}, evaluation)


@pytest.fixture(autouse=True)
def _price_of_maml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MAML, "TIMES_A_STEP", 5.0)


def test_time_to_go_counts_local_steps_and_what_they_cost_in_each_phase() -> None:
    """A round of FedAvg, 4 clients by 2 steps, takes 2 s: 0.25 s a step. One of MAML costs 4 by 5 (3 + 1) such steps.

    Points of the curve after rounds 5 of 10, 2 clients by 5 steps; 4 clients by 5 steps are scored after each phase.
    """
    left = TimeToGo(CONFIG, CLIENTS)
    assert left.of_run(Phase.FEDAVG, 0) is None
    left.add_round(Phase.FEDAVG, 2.0)
    assert left.of_round(Phase.FINE_TUNE) == 20.0
    assert left.of_run(Phase.FEDAVG, 3) == 7 * 2.0 + 2.5 + 5.0 + 4 * 20.0 + 5.0
    assert left.of_run(Phase.FEDAVG, 6) == 4 * 2.0 + 5.0 + 4 * 20.0 + 5.0
    assert left.of_run(Phase.FEDAVG, 10, [Population.UNSEEN]) == 4 * 20.0 + 5.0
    both = TimeToGo(dataclasses.replace(CONFIG, num_trained_scored=2), CLIENTS)
    both.add_round(Phase.FEDAVG, 2.0)
    assert both.of_run(Phase.FEDAVG, 10, [Population.UNSEEN]) == 2.5 + 4 * 20.0 + 5.0 + 2.5


def test_time_to_go_follows_what_was_timed() -> None:
    """A phase by its own rounds and a scoring by a scoring, once there has been one."""
    left = TimeToGo(CONFIG, CLIENTS)
    left.add_round(Phase.FEDAVG, 2.0)
    left.add_point(1.0)  # 0.1 s a step
    assert left.of_run(Phase.FEDAVG, 10) == pytest.approx(2.0 + 4 * 20.0 + 2.0)
    left.add_round(Phase.FINE_TUNE, 30.0)
    assert left.of_run(Phase.FINE_TUNE, 1) == pytest.approx(3 * 30.0 + 2.0)
    left.expect_scoring(Population.TRAINED, 8)
    assert left.of_run(Phase.FINE_TUNE, 4, [Population.UNSEEN]) == pytest.approx(4.0)
    left.add_scoring(Population.TRAINED, 8.0)
    assert left.of_run(Phase.FINE_TUNE, 4) == pytest.approx(12.0)


def test_a_run_without_rounds_has_a_time_to_go_once_it_has_scored() -> None:
    untrained = make_config(fedavg=dataclasses.replace(FEDAVG, num_rounds=0), fine_tune=None)
    left = TimeToGo(untrained, CLIENTS)
    assert left.of_run(Phase.FEDAVG, 0) is None
    left.add_scoring(Population.UNSEEN, 3.0)
    assert left.of_run(Phase.FEDAVG, 0, [Population.UNSEEN]) == 0.0


def test_a_dear_method_says_so_before_it_begins() -> None:
    (line,) = describe_dear_methods(CONFIG, CLIENTS)
    assert line.startswith("fine-tuning with maml: a round takes about 10 times as long as one of FedAvg in phase 1")
    assert "--fine_tune_local_epochs 3 can be lowered" in line
    assert not describe_dear_methods(make_config(), CLIENTS)


def test_lines_tell_the_time_that_is_left_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed behind round 6. A round of 2 s, then one with a point of the curve, which takes 1 s of its 3 s."""
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = ProgressDisplay(CONFIG, CLIENTS, stream)
    shown.phase_started(Phase.FEDAVG, 10, 6)
    now[0] += 2
    shown.round_ended(record(7, 2.0, is_point=False))
    assert stream.getvalue() == ""
    now[0] += 3
    shown.round_ended(record(8, 2.0))
    expected = 2 * 2 + 2 + 4 * 20 + 2
    said = f"initial 50.0 %, personalized 50.0 %, 5 s elapsed, about {expected // 60} min {expected % 60} s to go\n"
    assert stream.getvalue() == f"FedAvg round 8/10: {said}"
    shown.scoring_started(Phase.FEDAVG, Population.UNSEEN, 4)
    now[0] += 60  # longer than was expected, which is no reason to expect less of what comes behind
    shown._tick()
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("FedAvg round 10/10: scoring unseen clients, initial 50.0 %, ")
    assert last.endswith("1 min 5 s elapsed, about 1 min 22 s to go")


def test_where_lines_are_printed_there_is_one_every_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round or a scoring may take minutes, in which nothing happens."""
    monkeypatch.setattr(display, "SILENCE_SECONDS", 0.01)
    stream = io.StringIO()
    with ProgressDisplay(CONFIG, CLIENTS, stream) as shown:
        shown.phase_started(Phase.FEDAVG, 10, 0)
        while stream.getvalue().count("\n") < 3:
            time.sleep(0.01)
    assert set(re.sub(r"\d+ s", "N s", stream.getvalue()).splitlines()) == {"FedAvg round 0/10: N s elapsed"}
    assert not shown._clock.is_alive()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_starts_where_the_run_goes_on() -> None:
    stream = Terminal()
    shown = ProgressDisplay(CONFIG, CLIENTS, stream)
    shown.phase_started(Phase.FEDAVG, 10, 6)
    for number in range(7, 11):
        shown.round_ended(record(number))
    shown.scoring_started(Phase.FEDAVG, Population.UNSEEN, 5)
    bars = re.findall(r"FedAvg (\d+)/(\d+)", stream.getvalue())
    assert (bars[0], bars[-1]) == (("6", "10"), ("10", "10"))
    assert "to go, scoring unseen clients" in stream.getvalue()


def test_phase_1_is_called_by_its_method() -> None:
    assert make_config().phase_label(Phase.FEDAVG) == "FedAvg"
    ditto = make_config(fedavg=dataclasses.replace(FEDAVG, method=Ditto()), fine_tune=None)
    assert ditto.phase_label(Phase.FEDAVG) == "ditto"
    (line,) = describe_dear_methods(ditto, CLIENTS)
    assert line.startswith("ditto: a round takes about 2 times as long as one of FedAvg")
