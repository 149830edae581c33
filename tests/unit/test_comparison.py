"""Methods side by side: who is compared with whom, on which clients, and how sure a difference is."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import experiment, run

from perfedavg.methods import MAML, Ditto, FedProx, Reptile
from perfedavg.recording.runs import FinishedRun, PhaseResult
from perfedavg.settings import Population
from reporting.comparison import (
    choose_reference,
    comparison_table,
    explain_comparison,
    main_table,
    paired_differences,
)
from reporting.contents import build_report
from reporting.figures import ACCURACY, Measure
from reporting.files import to_markdown
from reporting.pictures.clients import draw_clients
from reporting.pictures.theme import LIGHT
from reporting.rows import group_rows

PLAIN = run(experiment(fine_tune=Reptile()), {8: (0.5, 0.6), 9: (0.7, 0.8)}, {1: (0.5, 0.5), 2: (0.9, 1.0)})
UNSEEN_ALONE = {Population.UNSEEN: PLAIN.results[Population.UNSEEN]}
DITTO = run(experiment(Ditto()), {8: (0.6, 0.6), 9: (0.7, 0.9)}, {2: (0.4, 0.8), 3: (0.0, 0.0)})


def test_fedavg_with_reptile_is_the_reference() -> None:
    """Before other fine-tuning, before none, and before other methods; of several, the one most like the others."""
    fedavg = run(experiment(), {8: (0.5, 0.5)})
    maml = run(experiment(fine_tune=MAML()), {8: (0.5, 0.5)})
    rows = group_rows([DITTO, fedavg, maml, PLAIN])
    reference = choose_reference(rows)
    assert reference is not None
    assert reference.row.runs == (PLAIN,)
    odd = run(experiment(fine_tune=Reptile(), batch_size=3), {8: (0.5, 0.5)})
    reference = choose_reference(group_rows([odd, DITTO, fedavg, PLAIN]))
    assert reference is not None
    assert reference.row.runs == (PLAIN,)
    reference = choose_reference(group_rows([DITTO, fedavg, maml]))
    assert reference is not None
    assert reference.row.runs == (maml,)
    assert choose_reference(group_rows([DITTO, fedavg])) is None


def test_the_reference_can_be_named(tmp_path: Path) -> None:
    """By a run, or by the folder of its seeds."""
    named = run(experiment(Ditto()), {8: (0.5, 0.5)}, name=str(tmp_path / "ditto" / "seed0"))
    rows = group_rows([PLAIN, named])
    for path in (tmp_path / "ditto", tmp_path / "ditto" / "seed0"):
        reference = choose_reference(rows, path)
        assert reference is not None
        assert reference.row.runs == (named,)
    assert choose_reference(rows, tmp_path / "else") is None
    with pytest.raises(ValueError, match="is none of the runs of the report; name one of them, or their folder"):
        build_report([PLAIN, named], 0.8, tmp_path / "else")


def differences(row: Sequence[FinishedRun], others: Sequence[FinishedRun], population: Population) -> list[Any]:
    (one,), (two,) = group_rows(row), group_rows(others)
    return [values.tolist() for values in paired_differences(one, two, ACCURACY, population)]


def test_a_client_is_compared_with_itself() -> None:
    """By its number, among those that both runs scored."""
    (unseen,) = differences([DITTO], [PLAIN], Population.UNSEEN)
    assert np.array(unseen) == pytest.approx(np.array([[0.1, 0.0], [0.0, 0.1]]))
    (trained,) = differences([DITTO], [PLAIN], Population.TRAINED)
    assert np.array(trained) == pytest.approx(np.array([[-0.5, -0.2]])), "client 2 alone was scored in both"
    without = run(experiment(Ditto()), {8: (0.6, 0.6)})
    assert differences([without], [PLAIN], Population.TRAINED) == []


def test_seeds_are_paired_and_so_are_data() -> None:
    """Another seed draws other clients under the same numbers; so do other data."""
    scores = {8: (0.5, 0.5)}
    own = [run(experiment(Ditto(), seed=seed), scores, fingerprint=f"of {seed}") for seed in (0, 1, 2)]
    plain = [run(experiment(fine_tune=Reptile(), seed=seed), scores, fingerprint=f"of {seed}") for seed in (1, 2, 3)]
    assert len(differences(own, plain, Population.UNSEEN)) == 2
    other_data = run(experiment(Ditto()), scores, fingerprint="other")
    assert differences([other_data], [PLAIN], Population.UNSEEN) == []
    joint = run(experiment(joint=True, cohort_size=1), {8: (0.5, 0.5), 9: (0.5, 0.5)}, fingerprint="pooled")
    assert len(differences([joint], [PLAIN], Population.UNSEEN)) == 1, "whose unseen clients are the same"
    tail = run(experiment(joint=True, cohort_size=1, local_split="tail"), {8: (0.5, 0.5)}, fingerprint="pooled")
    assert differences([tail], [PLAIN], Population.UNSEEN) == []


def test_the_table_of_both_populations() -> None:
    rows = group_rows([PLAIN, DITTO])
    reference = choose_reference(rows)
    table = comparison_table(rows, reference, ACCURACY)
    lines = [dict(zip(table.headers, line, strict=True)) for line in table.rows]
    assert [line["clients"] for line in lines] == ["unseen", "unseen", "trained", "trained"]
    assert [line["row"] for line in lines[:2]] == [
        "Ditto",
        "FedAvg + Reptile",
    ]
    unseen, _, _, reptile = lines
    assert unseen["initial"] == "65.00 %"
    assert unseen["personalized"] == "75.00 %"
    assert unseen["change"] == "+10.00 %"
    assert (unseen["bottom decile"], unseen["worst tenth"]) == ("63.00 %", "60.00 %")
    assert unseen["hurt"] == "0.0 %"
    assert unseen["initial, difference"] == "+5.00 % [-58.53, +68.53]"
    assert reptile["personalized, difference"] == "reference"
    said = explain_comparison(rows, reference)
    assert f"Differences are to {reptile['row']} (FedAvg with fine-tuning; --against RUN names another row)" in said
    assert (
        "by Student's t over seeds, or over clients alone where a row has one seed. Intervals are not corrected" in said
    )
    assert said.endswith("a difference is then over those that both scored.")
    assert "both scored" not in explain_comparison(
        group_rows([dataclasses.replace(PLAIN, results=UNSEEN_ALONE)]), reference
    )
    assert "There is no row of FedAvg with fine-tuning" in explain_comparison(group_rows([DITTO]), None)


def test_the_main_table_is_short_and_has_both_populations() -> None:
    rows = group_rows([PLAIN, DITTO])
    table = main_table(rows, choose_reference(rows), ACCURACY)
    ditto, reptile = (dict(zip(table.headers, line, strict=True)) for line in table.rows)
    assert ditto == {
        "row": "Ditto",
        "seeds": "1",
        "initial": "65.00 %",
        "personalized": "75.00 %",
        "change": "+10.00 %",
        "bottom decile": "63.00 %",
        "worst tenth": "60.00 %",
        "hurt": "0.0 %",
        "difference": "+5.00 % [-58.53, +68.53]",
        "trained: initial": "20.00 %",
        "trained: personalized": "40.00 %",
    }
    assert (reptile["difference"], reptile["trained: personalized"]) == ("reference", "75.00 %")


def test_runs_without_unseen_clients_are_reported_by_those_that_trained() -> None:
    """As where others score the clients that train; beside runs with unseen clients, each has its own population."""
    runs = [
        run(experiment(method, seed=seed), None, {1: (0.5, 0.5 + seed / 10), 2: (0.9, 1.0)}, fingerprint=str(seed))
        for method in (None, Ditto())
        for seed in range(2)
    ]
    markdown = to_markdown(build_report(runs, against=Path("run")), with_plots=True)
    assert "By accuracy, of trained clients." in markdown
    assert "| FedAvg | 2 | 70.00 ± 0.00 % | 77.50 ± 3.54 % | +7.50 ± 3.54 % |" in markdown
    assert "| 1 | personalized minus initial: FedAvg | trained | 4 |" in markdown
    assert "unseen clients" not in markdown.partition("### Results")[2]
    mixed = to_markdown(build_report([*runs, PLAIN]), with_plots=False)
    assert "| Ditto | trained | Ditto | 2 |" in mixed
    assert "| FedAvg + Reptile | unseen | fine-tuning | 1 |" in mixed


def test_the_worst_of_a_loss_are_the_highest() -> None:
    rows = group_rows([PLAIN])
    table = comparison_table(rows, None, Measure("loss", "loss"))
    lines = [dict(zip(table.headers, line, strict=True)) for line in table.rows]
    assert lines[0]["bottom decile"] == f"{np.percentile([0.6, 0.8], 90):.4f}"
    assert lines[0]["worst tenth"] == "0.8000"


def test_the_worst_tenth_tells_rows_apart_that_end_at_the_same_decile() -> None:
    """Clients with three test examples: 12 of 100 have one right or none, which is one decile and two means."""
    table = comparison_table(group_rows([of_hundred(0.0), of_hundred(1 / 3)]), None, ACCURACY)
    lines = [dict(zip(table.headers, line, strict=True)) for line in table.rows]
    assert [line["bottom decile"] for line in lines] == ["33.33 %", "33.33 %"]
    assert [line["worst tenth"] for line in lines] == ["16.67 %", "33.33 %"]


def of_hundred(worst: float) -> FinishedRun:
    """Of 100 clients five are as bad as that, seven have a third, and all others are right."""
    scores = [worst] * 5 + [1 / 3] * 7 + [1.0] * 88
    method = Ditto() if worst == 0 else FedProx()
    return run(experiment(method), {client: (0.5, score) for client, score in enumerate(scores)})


def test_the_report_shows_both_populations() -> None:
    markdown = to_markdown(build_report([PLAIN, DITTO], 0.8), with_plots=False)
    assert "### Methods side by side" in markdown
    assert "| row | clients | after | seeds | initial loss |" in markdown
    assert "| --- | --- | --- | ---: | ---: |" in markdown, "words stand to the left, figures to the right"
    assert "### Trained clients" in markdown
    lines = list(csv.DictReader(build_report([PLAIN, DITTO], 0.8).csv.splitlines()))
    assert [line["population"] for line in lines] == ["unseen"] * 3 + ["trained"] * 3


def scored_by(run: FinishedRun, metric: str) -> FinishedRun:
    def scored(result: PhaseResult) -> PhaseResult:
        initial, personalized = ({**scores, metric: 0.25} for scores in (result.initial, result.personalized))
        return dataclasses.replace(result, initial=initial, personalized=personalized)

    results = {
        population: {phase: scored(result) for phase, result in by_phase.items()}
        for population, by_phase in run.results.items()
    }
    return dataclasses.replace(run, results=results)


def test_runs_may_be_scored_by_different_metrics() -> None:
    report = build_report([scored_by(PLAIN, "macro_f1"), scored_by(DITTO, "precision")], 0.8)
    lines = list(csv.DictReader(report.csv.splitlines()))
    found = {(line["initial_macro_f1"], line["initial_precision"]) for line in lines}
    assert found == {("0.25", ""), ("", "0.25")}


def test_data_without_the_run_that_is_named_have_a_reference_of_their_own() -> None:
    named = run(experiment(Ditto(), dataset="mnist"), {8: (0.5, 0.5)}, name="named")
    beside = run(experiment(dataset="mnist"), {8: (0.5, 0.5)}, name="beside")
    markdown = to_markdown(build_report([PLAIN, DITTO, named, beside], 0.8, Path("named")), with_plots=False)
    assert "as --against says" in markdown
    assert "FedAvg with fine-tuning; --against RUN names another row" in markdown
    assert "There is no row" not in markdown


def test_rows_that_differ_in_a_phase_say_so() -> None:
    """Two rows without fine-tuning and one with it would otherwise have the same name."""
    runs = [
        run(config, {8: (0.5, 0.5)})
        for config in (experiment(), experiment(batch_size=3), experiment(fine_tune=MAML(support_fraction=0.25)))
    ]
    assert sorted(row.label for row in group_rows(runs)) == [
        "E 5, 4 clients a round",
        "E 5, 4 clients a round, batch_size 3",
        "FedAvg + MAML",
    ]
    assert sorted(row.label for row in group_rows(runs[::2])) == ["FedAvg", "FedAvg + MAML"]
    assert sorted(row.description for row in group_rows(runs[::2])) == [
        "E 5, 4 clients a round, fine-tuning by maml",
        "E 5, 4 clients a round, no fine-tuning",
    ]


def test_rows_whose_names_leave_out_what_they_differ_in_are_called_by_their_folders() -> None:
    """Whatever the settings are: distinct by construction."""
    runs = [run(experiment(), {8: (0.5, 0.5)}, name=f"folder {place}") for place in range(2)]
    other = {**runs[1].settings, "fine_tune": {**runs[1].settings["fedavg"], "num_rounds": 0}}
    runs[1] = dataclasses.replace(runs[1], settings={**other, "colour": None})
    labels = {row.label for row in group_rows(runs)}
    assert len(labels) == 2


def test_few_clients_are_shown_by_their_names_and_the_best_on_top() -> None:
    """Whose score it is; a sign that would begin a formula is not one."""
    named = dataclasses.replace(PLAIN, client_names={Population.UNSEEN: ("an$na", "b" * 50)})
    draw = draw_clients(group_rows([named]), ACCURACY, Population.UNSEEN)
    assert draw is not None
    panels = draw(LIGHT).axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [r"an\$na", f"{'b' * 21}..."]
    assert [list(line.get_xdata()) for line in panels[1].lines] == [[0.5, 0.7], [0.6, 0.8]]
    assert panels[1].get_xlim()[0] < 0.25, "half of 0.5, after phase 1"


def test_results_of_a_method_come_after_it() -> None:
    (ditto,), (fedavg,) = group_rows([DITTO]), group_rows([PLAIN])
    assert [ditto.after(phase) for phase in ditto.results] == ["Ditto"]
    assert [fedavg.after(phase) for phase in fedavg.results] == ["FedAvg", "fine-tuning"]
