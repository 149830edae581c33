"""A client that diverges costs the round its update, not the run; a round without any update changes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import Difference, QuadraticClients, basic, half_squared_norm, make_config
from torch import Tensor

from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentOutcome, ExperimentState, RoundRecord, run_experiment
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask
from perfedavg.recording.run_folder import RunFolder
from perfedavg.settings import ExperimentConfig, OptimizerConfig, PhaseConfig
from perfedavg.training.flat_model import flatten

START = [2.0, -1.0]
CENTRES = [[1.0, 0.0], [3.0, 5.0], [-2.0, 0.5], [4.0, -3.0], [0.25, 1.5]]
SIZES = [25, 7, 12, 40, 18]
ADAM = OptimizerConfig("adam", 0.1)


def config(server: OptimizerConfig, num_rounds: int = 3) -> ExperimentConfig:
    """All four training clients train in each round, one step each at rate 0.5."""
    phase = PhaseConfig(num_rounds, 1, OptimizerConfig("sgd", 0.5), server)
    return make_config(num_clients=5, cohort_size=4, batch_size=50, fedavg=phase, fine_tune=None, eval_every=1)


class Records:
    """An observer that keeps the records of the rounds."""

    def __init__(self) -> None:
        self.rounds: list[RoundRecord] = []

    def round_ended(self, record: RoundRecord) -> None:
        self.rounds.append(record)

    def __getattr__(self, name: str) -> object:
        return lambda *told: None


class DivergesIn:
    """An executor for which, in one round, clients have a centre that is not a number."""

    def __init__(self, settings: ExperimentConfig, client_ids: set[int], round_number: int) -> None:
        self._good = executor(settings, CENTRES)
        diverging = [[math.nan, 1.0] if client in client_ids else centre for client, centre in enumerate(CENTRES)]
        self._bad = executor(settings, diverging)
        self._round_number = round_number

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        chosen = self._bad if task.round_number == self._round_number else self._good
        return chosen.train(task, parameters)

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        return self._good.score(task, parameters)


def executor(settings: ExperimentConfig, centres: list[list[float]]) -> LocalExecutor:
    clients = QuadraticClients(centres, SIZES, num_unseen=1)
    return LocalExecutor(settings, Difference(START), clients, loss_function=half_squared_norm)


def run(settings: ExperimentConfig, diverging: set[int], round_number: int) -> tuple[ExperimentOutcome, Records]:
    records = Records()
    clients = QuadraticClients(CENTRES, SIZES, num_unseen=1)
    state = ExperimentState.fresh(settings, flatten(Difference(START)))
    outcome = run_experiment(settings, DivergesIn(settings, diverging, round_number), clients, state, [records])
    return outcome, records


def test_the_mean_is_over_the_updates_that_were_not_refused() -> None:
    """One step at rate 0.5 halves the distance, so the mean update is 0.5 * (mean centre - w), by examples."""
    outcome, records = run(config(OptimizerConfig("sgd", 1.0), 1), {1, 3}, 1)
    w, centres = torch.tensor(START, dtype=torch.float64), torch.tensor(CENTRES, dtype=torch.float64)
    mean = (SIZES[0] * centres[0] + SIZES[2] * centres[2]) / (SIZES[0] + SIZES[2])
    torch.testing.assert_close(outcome.parameters, w + 0.5 * (mean - w), rtol=1e-12, atol=1e-12)
    (record,) = records.rounds
    assert set(record.refused) == {1, 3}
    assert all("training diverged" in reason for reason in record.refused.values())
    losses = [0.5 * (w - centres[client]).square().sum().item() for client in (0, 2)]
    assert record.train_loss == pytest.approx(sum(losses) / 2, rel=1e-12)


@pytest.mark.parametrize("server", [OptimizerConfig("momentum", 1.0), ADAM], ids=lambda server: server.name)
def test_a_round_without_an_update_leaves_model_and_optimizer_as_they_were(server: OptimizerConfig) -> None:
    """As if it had not been: momentum does not push on, Adam does not count a step.

    The clients' single step does not depend on the round, so three rounds of which the second is void are two rounds.
    """
    outcome, records = run(config(server, 3), {0, 1, 2, 3}, 2)
    expected, _ = run(config(server, 2), set(), 1)
    assert torch.equal(outcome.parameters, expected.parameters)
    void = records.rounds[1]
    assert (set(void.refused), void.train_loss, void.update_norm) == ({0, 1, 2, 3}, None, 0.0)
    assert [record.refused for record in records.rounds[::2]] == [{}, {}]


def test_a_refusal_is_said_once_a_round_and_counted_in_the_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(OptimizerConfig("sgd", 1.0))
    clients = QuadraticClients(CENTRES, SIZES, num_unseen=1)
    folder = RunFolder(tmp_path / "run")
    folder.begin(settings, clients, {})
    for diverging in ({1, 3}, {0, 1, 2, 3}):
        state = ExperimentState.fresh(settings, flatten(Difference(START)))
        run_experiment(settings, DivergesIn(settings, diverging, 2), clients, state, [folder])
    folder.close()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "FedAvg round 2: refused 2 of 4 updates (clients 1, 3); see metrics.jsonl",
        "FedAvg round 2: refused 4 of 4 updates (clients 0, 1, 2, 3); see metrics.jsonl. The model is left as it was; "
        "if this goes on, start again with a lower --local_lr",
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [len(line["refused"]) for line in lines] == [0, 2, 0, 0, 4, 0]
    assert set(lines[1]["refused"]) == {"1", "3"}
    assert lines[4]["train_loss"] is None
    assert {line["lost_workers"] == {} and 0.0 <= line["idle_share"] <= 1.0 for line in lines} == {True}


class LosesCount(DivergesIn):
    """An executor whose losses, and nothing else, are not numbers from a round on."""

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        update = self._good.train(task, parameters)
        if task.round_number == self._round_number:
            update.reports = [dataclasses.replace(report, loss=math.inf) for report in update.reports]
        return update

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        diverged = basic(math.nan, math.nan)
        return [dataclasses.replace(score, personalized=diverged) for score in self._good.score(task, parameters)]


def test_losses_that_are_no_numbers_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the results they are null, which nobody reads while the run goes on."""
    settings = config(OptimizerConfig("sgd", 1.0))
    clients = QuadraticClients(CENTRES, SIZES, num_unseen=1)
    folder = RunFolder(tmp_path / "run")
    folder.begin(settings, clients, {})
    state = ExperimentState.fresh(settings, flatten(Difference(START)))
    run_experiment(settings, LosesCount(settings, set(), 2), clients, state, [folder])
    folder.close()
    assert capsys.readouterr().err.splitlines() == [
        "FedAvg round 2: the clients' mean loss is inf; if this goes on, start again with a lower --local_lr",
        "after FedAvg: the loss of 1 of 1 unseen clients is infinite or not a number (clients 4), and so is the mean; "
        "they adapt at --local_lr, which a lower one may mend",
        "after FedAvg: the loss of 1 of 1 trained clients is infinite or not a number (clients 0), and so is the mean; "
        "they adapt at --local_lr, which a lower one may mend",
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train_loss"] is None for line in lines] == [False, True, False]
