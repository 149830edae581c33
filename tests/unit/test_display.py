"""What a person sees of a run that goes on."""

from __future__ import annotations

import io
import re

import pytest
from helpers import make_config

from perfedavg.engine.experiment import RoundRecord
from perfedavg.settings import Phase, PhaseConfig, Population
from perfedavg.terminal import display
from perfedavg.terminal.display import ProgressDisplay

CONFIG = make_config(
    fedavg=PhaseConfig(10, 1, make_config().fedavg.client_optimizer, make_config().fedavg.server_optimizer),
    fine_tune=PhaseConfig(4, 1, make_config().fedavg.client_optimizer, make_config().fedavg.server_optimizer),
)
SCORES = {"accuracy": 0.5}


def record(round_number: int) -> RoundRecord:
    evaluation = {"initial": SCORES, "personalized": SCORES}
    return RoundRecord(Phase.FEDAVG, round_number, (0,), 1, {}, 1.0, 1.0, 1.0, 0.0, {}, evaluation)


def test_the_time_left_follows_from_the_rounds_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 8 of 10 after 3 s, two rounds of which were here: 2 of this phase and 4 of the next are left, at 1.5 s."""
    clock = iter([100.0, 101.0, 103.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    shown = ProgressDisplay(CONFIG, stream)
    shown.phase_started(Phase.FEDAVG, 10, 6)
    shown.round_ended(record(7))
    shown.round_ended(record(8))
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("FedAvg round 8/10: ")
    assert last.endswith("3 s elapsed, about 9 s left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_starts_where_the_run_goes_on() -> None:
    stream = Terminal()
    shown = ProgressDisplay(CONFIG, stream)
    shown.phase_started(Phase.FEDAVG, 10, 6)
    for number in range(7, 11):
        shown.round_ended(record(number))
    shown.scoring_started(Phase.FEDAVG, Population.UNSEEN, 5)
    bars = re.findall(r"FedAvg (\d+)/(\d+)", stream.getvalue())
    assert (bars[0], bars[-1]) == (("6", "10"), ("10", "10"))
