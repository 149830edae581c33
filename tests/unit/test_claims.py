"""What is claimed is judged by intervals alone: differences worked out by hand, and verdicts that follow from them."""

from __future__ import annotations

import numpy as np
import pytest
from made_runs import SGD, experiment, run

from perfedavg.methods import FOMAML, Ditto, Reptile
from perfedavg.recording.runs import FinishedRun
from perfedavg.settings import PhaseConfig, Population
from reporting.claims import Evidence, claims_table, explain_claims, gather_evidence, verdict
from reporting.comparison import choose_reference
from reporting.contents import build_report
from reporting.figures import ACCURACY, Measure
from reporting.files import to_markdown
from reporting.intervals import t_quantile
from reporting.rows import group_rows

LOSS = Measure("loss", "loss")
LONG = PhaseConfig(20, 5, SGD, SGD)
"""As many rounds as both phases of `experiment` have."""


def evidence_of(*runs: FinishedRun, dataset: str = "digits") -> dict[tuple[int, str, str], float]:
    """The mean differences, by claim, what is compared and whose clients."""
    rows = group_rows(runs)
    found = gather_evidence(dataset, rows, choose_reference(rows), ACCURACY)
    return {(one.claim, one.compared, one.population.value): one.mean_and_interval[0] for one in found}


def test_fedavg_is_judged_by_what_adapting_adds_and_by_the_baselines() -> None:
    """0.5 -> 0.6 and 0.7 -> 0.9 add 0.15; personalized, that is 0.75, to FedSGD's 0.70 and 0.45 alone."""
    fedavg = run(experiment(), {8: (0.5, 0.6), 9: (0.7, 0.9)}, {1: (0.5, 0.4)})
    fedsgd = run(experiment(fedavg=PhaseConfig(10, 5, SGD, SGD, num_local_steps=1)), {8: (0.1, 0.6), 9: (0.1, 0.8)})
    alone = run(experiment(fedavg=PhaseConfig(0, 5, SGD, SGD)), {8: (0.1, 0.4), 9: (0.1, 0.5)})
    assert evidence_of(fedavg, fedsgd, alone) == {
        (1, "personalized minus initial: FedAvg", "unseen"): pytest.approx(0.15),
        (1, "personalized minus initial: FedAvg", "trained"): pytest.approx(-0.1),
        (1, "personalized: FedAvg minus FedSGD", "unseen"): pytest.approx(0.05),
        (1, "personalized: FedAvg minus Local only", "unseen"): pytest.approx(0.3),
    }


def test_fine_tuning_is_judged_on_the_same_clients_and_against_as_many_rounds_without() -> None:
    """The run's scores are half as high before fine-tuning; FedAvg for 20 rounds is at 0.5 and 0.8."""
    tuned = run(experiment(fine_tune=FOMAML()), {8: (0.6, 0.8), 9: (0.6, 1.0)})
    long = run(experiment(fedavg=LONG), {9: (0.5, 0.8)})
    found = evidence_of(tuned, long)
    assert {key[1:]: value for key, value in found.items() if key[0] == 2} == {
        ("initial: FedAvg + FOMAML minus before fine-tuning", "unseen"): pytest.approx(0.3),
        ("personalized: FedAvg + FOMAML minus before fine-tuning", "unseen"): pytest.approx(0.45),
        ("initial: FedAvg + FOMAML minus FedAvg for 20 rounds", "unseen"): pytest.approx(0.1),
        ("personalized: FedAvg + FOMAML minus FedAvg for 20 rounds", "unseen"): pytest.approx(0.2),
    }
    assert not any(key[0] == 2 for key in evidence_of(run(experiment(), {8: (0.5, 0.5)})))


def test_joint_training_is_judged_against_fedavg_before_fine_tuning() -> None:
    """0.9 -> 0.9 for joint training, 0.4 -> 0.45 for FedAvg, whose fine-tuned scores are twice as high."""
    joint = run(experiment(joint=True, cohort_size=1), {8: (0.9, 0.9)}, fingerprint="pooled")
    fedavg = run(experiment(fine_tune=Reptile()), {8: (0.8, 0.9)})
    name = "Joint training minus FedAvg + Reptile, before fine-tuning"
    found = evidence_of(joint, fedavg)
    assert found[3, f"personalized: {name}", "unseen"] == pytest.approx(0.45)
    assert found[3, f"personalized minus initial: {name}", "unseen"] == pytest.approx(-0.05)


@pytest.mark.parametrize(("dataset", "is_disputed"), [("plays", True), ("femnist", True), ("digits", False)])
def test_that_adapting_hurts_was_said_of_some_data_alone(dataset: str, is_disputed: bool) -> None:
    found = evidence_of(run(experiment(), {8: (0.5, 0.4)}, {1: (0.5, 0.7)}), dataset=dataset)
    gains = {key[2]: value for key, value in found.items() if key[0] == 4}
    expected = {"unseen": pytest.approx(-0.1), "trained": pytest.approx(0.2)}
    assert gains == (expected if is_disputed else {})


def test_other_methods_are_no_evidence() -> None:
    assert evidence_of(run(experiment(Ditto()), {8: (0.5, 0.6)})) == {}


@pytest.mark.parametrize(
    ("low", "high", "expects_more", "said"),
    [
        (0.1, 0.3, True, "borne out"),
        (0.1, 0.3, False, "contradicted"),
        (-0.3, -0.1, True, "contradicted"),
        (-0.3, -0.1, False, "borne out"),
        (-0.1, 0.3, True, "undecided"),
        (-0.3, 0.1, False, "undecided"),
        (0.0, 0.0, True, "undecided"),
        (np.nan, np.nan, True, "undecided"),
    ],
)
def test_a_verdict_follows_from_the_interval(low: float, high: float, expects_more: bool, said: str) -> None:
    """Two seeds whose clients are all alike: their interval is 12.7 times as wide as they are apart."""
    middle, apart = (low + high) / 2, (high - low) / 2 / t_quantile(1)
    evidence = Evidence(
        2, "", Population.UNSEEN, expects_more, [np.full(5, middle - apart), np.full(5, middle + apart)]
    )
    assert evidence.mean_and_interval[1:] == pytest.approx((low, high), nan_ok=True)
    assert verdict(evidence, ACCURACY) == said


def test_of_a_loss_less_is_better() -> None:
    evidence = Evidence(2, "", Population.UNSEEN, True, [np.array([-0.2, -0.1] * 5)] * 2)
    assert verdict(evidence, LOSS) == "borne out"
    (line,) = claims_table([evidence], LOSS).rows
    assert "below 0" in line


def test_the_table_says_how_many_clients_and_seeds() -> None:
    differences = [np.array([0.2, 0.4]), np.array([-0.1, -0.2, -0.3]), np.array([0.6])]
    table = claims_table([Evidence(1, "what", Population.TRAINED, True, differences)], ACCURACY)
    line = dict(zip(table.headers, table.rows[0], strict=True))
    assert (line["claim"], line["compared"], line["clients"], line["by the claim"]) == (
        "1",
        "what",
        "trained",
        "above 0",
    )
    assert (line["number"], line["seeds that agree"], line["verdict"]) == ("6", "2 of 3", "undecided")
    assert line["difference in accuracy"].startswith("+23.33 % ["), "the mean of 0.3, -0.2 and 0.6"


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_what_one_seed_does_not_cover_is_said(num_seeds: int) -> None:
    said = explain_claims([Evidence(1, "", Population.UNSEEN, True, [np.ones(2)] * num_seeds)])
    assert ("With one seed an interval covers the draw of clients alone" in said) == (num_seeds == 1)
    assert "not corrected for multiple comparisons" in said


@pytest.mark.parametrize("population", Population)
def test_that_rows_may_have_scored_other_trained_clients_is_said(population: Population) -> None:
    said = explain_claims([Evidence(2, "", population, True, [np.ones(2)])])
    assert ("those that both scored. Number says how many" in said) == (population is Population.TRAINED)


def test_the_report_judges_the_claims_that_it_can() -> None:
    runs = [run(experiment(seed=seed), {8: (0.5, 0.6), 9: (0.5, 0.7 + seed / 10)}) for seed in range(3)]
    markdown = to_markdown(build_report(runs), with_plots=False)
    claims = markdown.split("### Claims")[1].split("\n### ")[0]
    assert "1. FedAvg with several local epochs" in claims
    assert "2. Fine-tuning" not in claims
    assert "| 1 | personalized minus initial: FedAvg | unseen | 6 | above 0 | +20.00 % [" in claims
    assert claims.count("borne out |") == 1
    without = to_markdown(build_report([run(experiment(Ditto()), {8: (0.5, 0.6)})]), with_plots=False)
    assert "### Claims" not in without
