"""What a run says of updates and scores that are no numbers, with the flag that mends it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from perfedavg.contracts import ClientDirectory, client_label
from perfedavg.engine.experiment import RoundRecord
from perfedavg.engine.scores import PhaseScores
from perfedavg.settings import Phase, flag
from perfedavg.terminal.console import say

NUM_NAMED = 10
"""Clients that a line names, where there may be thousands."""


def say_divergence_in_round(record: RoundRecord, clients: ClientDirectory) -> None:
    """Which updates were refused, and whether the mean loss is finite."""
    where, refused, cohort = f"{record.phase.label} round {record.round_number}", record.refused, record.client_ids
    remedy = f"if this goes on, start again with a lower {_rate_flag(record.phase)}"
    if refused:
        every = f". The model is left as it was; {remedy}" if len(refused) == len(cohort) else ""
        say(
            f"{where}: refused {len(refused)} of {len(cohort)} updates (clients {_labels(refused, clients)}); see "
            f"metrics.jsonl{every}"
        )
    if record.train_loss is not None and not math.isfinite(record.train_loss):
        say(f"{where}: the clients' mean loss is {record.train_loss}; {remedy}")


def say_divergence_in_scores(phase: Phase, by_population: PhaseScores, clients: ClientDirectory) -> None:
    """Which clients have losses that are not finite, and so makes the mean."""
    for population, scores in by_population.items():
        diverged = [
            score.client_id
            for score in scores
            if not (math.isfinite(score.initial["loss"]) and math.isfinite(score.personalized["loss"]))
        ]
        if diverged:
            named = _labels(diverged[:NUM_NAMED], clients) + (", ..." if len(diverged) > NUM_NAMED else "")
            say(
                f"after {phase.label}: the loss of {len(diverged)} of {len(scores)} {population.value} clients is "
                f"infinite or not a number (clients {named}), and so is the mean; they adapt at "
                f"{_rate_flag(Phase.FEDAVG)}, which a lower one may mend"
            )


def _rate_flag(phase: Phase) -> str:
    return flag(f"{phase.field}.client_optimizer.learning_rate")


def _labels(client_ids: Iterable[int], clients: ClientDirectory) -> str:
    return ", ".join(client_label(clients, client_id) for client_id in client_ids)
