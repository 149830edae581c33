"""A report says what the runs say: figures worked out by hand, from folders in the format that runs write."""

from __future__ import annotations

import base64
import csv
import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, digits_dataset, make_config
from torch import nn

import report
from launch.flags import parse
from perfedavg.engine.executor import LocalExecutor
from perfedavg.methods.ditto import Ditto
from perfedavg.methods.fedavg import FedAvg
from perfedavg.methods.fedprox import FedProx
from perfedavg.methods.fomaml import FOMAML
from perfedavg.methods.maml import MAML
from perfedavg.methods.per_fedavg import PerFedAvg
from perfedavg.methods.personal_layers.lg_fedavg import LGFedAvg
from perfedavg.methods.pfedme import PFedMe
from perfedavg.methods.reptile import Reptile
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.run_folder import RunFolder
from perfedavg.recording.runs import FinishedRun, find_runs
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from reporting.contents import Plot, Report, build_report, read_runs
from reporting.figures import ACCURACY, first_at
from reporting.files import to_html, to_markdown, write_report
from reporting.pictures.lines import mean_curve
from reporting.rows import group_rows

SGD = OptimizerConfig("sgd", 0.02)
MOMENTUM = OptimizerConfig("momentum", 1.0)
PNG = b"\x89PNG\r\n\x1a\n"

Pair = tuple[float | None, float | None]
"""A loss and an accuracy."""
FourScores = tuple[float, float, float, float]
"""Of a client: initial loss and accuracy, personalized loss and accuracy."""


def experiment(num_epochs: int = 5, fine_tunes: bool = True, **changes: Any) -> ExperimentConfig:
    """100 rounds of FedAvg(E) on MNIST with 20 clients a round, then 40 of Reptile, with the given fields changed."""
    fields = {
        "dataset": "mnist",
        "architecture": "mnist_cnn",
        "num_clients": 100,
        "cohort_size": 20,
        "batch_size": 20,
        "fedavg": PhaseConfig(100, num_epochs, SGD, MOMENTUM),
        "fine_tune": PhaseConfig(40, 10, SGD, OptimizerConfig("adam", 0.001), method=Reptile()) if fine_tunes else None,
        "num_personalization_epochs": 5,
        "eval_every": 50,
        "eval_clients": 100,
    }
    return make_config(**{**fields, **changes})


def write_run(
    path: Path,
    config: ExperimentConfig,
    means: Mapping[str, tuple[Pair, Pair]],
    hurt: float = 0.0,
    curve: Sequence[tuple[str, int, float | None, float | None]] = (),
    clients: Mapping[str, Sequence[FourScores]] | None = None,
    by_epoch: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Path:
    """A finished run's folder.

    means: by phase, initial and personalized loss and accuracy, as the summary states them.
    curve: phase, round, initial and personalized accuracy of each point.
    clients: by phase, the scores of each client; two clients with scores of 0.5 unless given.
    """
    path.mkdir(parents=True)
    clients = clients or {phase: [(0.5, 0.5, 0.5, 0.5)] * 2 for phase in means}
    num_unseen = len(next(iter(clients.values())))
    result: dict[str, Any] = {"dataset": config.dataset, "seed": config.seed, "rounds": config.fedavg.num_rounds}
    result |= {"train_clients": 80, "unseen_clients": 20, "world_size": 1, "seconds": 12.5}
    result["model_sha256"] = f"{config.seed:064d}"
    for phase, (initial, personalized) in means.items():
        summary = {"clients": num_unseen, "initial": spread(*initial), "personalized": spread(*personalized)}
        summary["fraction_hurt"] = hurt
        if by_epoch:
            summary["by_epoch"] = by_epoch[phase]
        result[f"after_{phase}"] = summary
    records = [
        {
            "phase": phase,
            "round_number": number,
            "client_ids": [1],
            "training_seconds": 0.5 * (number + (config.fedavg.num_rounds if phase == "fine_tune" else 0)),
            "evaluation": {
                "clients": num_unseen,
                "initial": spread(1.0, initial),
                "personalized": spread(1.0, personalized),
                "fraction_hurt": hurt,
            },
        }
        for phase, number, initial, personalized in curve
    ]
    records.insert(0, {"phase": next(iter(means)), "round_number": 1, "client_ids": [1], "evaluation": None})
    settings = {
        "experiment": config.to_dict(),
        "run": {},
        "environment": {"torch": "2.13.0", "commit": "abc"},
    }
    (path / "config.json").write_text(json.dumps(settings))
    (path / "result.json").write_text(json.dumps(result))
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    write_clients(path / "clients.csv", clients)
    return path


def spread(loss: float | None, accuracy: float | None) -> dict[str, float | None]:
    others = dict.fromkeys(("accuracy_std", "accuracy_p10", "accuracy_p50", "accuracy_p90"), accuracy)
    return {"loss": loss, "accuracy": accuracy, **others}


def write_clients(path: Path, clients: Mapping[str, Sequence[FourScores]]) -> None:
    measured = ("initial_loss", "initial_accuracy", "personalized_loss", "personalized_accuracy")
    lines = [["client_id", "num_train_examples", "num_test_examples"]]
    lines[0] += [f"after_{phase}_{name}" for phase in clients for name in measured]
    for client_id, scores in enumerate(zip(*clients.values(), strict=True)):
        lines.append([str(client_id), "10", "3", *(str(value) for after in scores for value in after)])
    path.write_text("".join(f"{','.join(line)}\n" for line in lines))


def report_of(*paths: Path, target: float | None = None) -> Report:
    runs, reasons = read_runs(paths)
    assert reasons == []
    return build_report(runs, target)


def markdown_of(*paths: Path, target: float | None = None) -> str:
    return to_markdown(report_of(*paths, target=target), with_plots=False)


def table_under(markdown: str, heading: str) -> list[dict[str, str]]:
    """The first table after a heading, a dict a line."""
    lines = markdown.split(f"### {heading}\n", 1)[1].split("\n### ", 1)[0].splitlines()
    lines = list(itertools.dropwhile(lambda line: not line.startswith("|"), lines))
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    headers, _, *rows = table
    return [dict(zip(headers, row, strict=True)) for row in rows]


def labels_of(*configs: ExperimentConfig) -> list[str]:
    """What the rows of runs with these configurations are called, in the order of the report."""
    runs = [
        FinishedRun(Path("run"), json.loads(json.dumps(config.to_dict())), {}, {}, {}, None, None, None, ())
        for config in configs
    ]
    return [row.label for row in group_rows(runs)]


@pytest.fixture
def three_seeds(tmp_path: Path) -> Path:
    """A row with seeds 0, 1, 2. Initial accuracy after FedAvg 0.80, 0.82, 0.87: mean 0.83, deviation 0.0360555.

    The mean is (0.80 + 0.82 + 0.87) / 3; the squares of the differences add up to 0.0026, and over 2 that is 0.0013.
    """
    for seed, (accuracy, in_round_50) in enumerate(((0.80, 0.7), (0.82, 0.8), (0.87, 0.8))):
        write_run(
            tmp_path / "rows" / "E5-C20" / f"seed{seed}",
            experiment(seed=seed),
            {"fedavg": ((1.0 + seed, accuracy), (0.5, 0.9)), "fine_tune": ((0.25, 0.95), (0.125, 0.99))},
            hurt=sum((0.0, 0.1, 0.2)[: seed + 1]),
            curve=[
                ("fedavg", 50, in_round_50, 0.9),
                ("fedavg", 100, 0.85, 0.95),
                ("fine_tune", 40, 0.9, 0.96),
            ],
        )
    return tmp_path / "rows"


def test_results_are_means_and_sample_deviations_over_seeds(three_seeds: Path) -> None:
    """With n in place of n - 1, or a mean of something else, these figures come out different."""
    after_fedavg, after_fine_tuning = table_under(markdown_of(three_seeds), "After each phase")
    assert after_fedavg == {
        "row": "FedAvg + Reptile",
        "after": "FedAvg",
        "seeds": "3",
        "initial loss": "2.0000 ± 1.0000",
        "initial accuracy": "83.00 ± 3.61 %",
        "personalized loss": "0.5000 ± 0.0000",
        "personalized accuracy": "90.00 ± 0.00 %",
        "clients hurt": "13.3 ± 15.3 %",
    }
    assert (after_fine_tuning["after"], after_fine_tuning["initial accuracy"]) == ("fine-tuning", "95.00 ± 0.00 %")


def test_changes_are_taken_within_a_seed(three_seeds: Path) -> None:
    """Initial accuracies grow by 0.15, 0.13 and 0.08 to 0.95; the losses' deviation is that before fine-tuning."""
    (line,) = table_under(markdown_of(three_seeds), "What fine-tuning changes")
    assert (line["row"], line["seeds"]) == ("FedAvg + Reptile", "3")
    assert line["initial accuracy"] == "+12.00 ± 3.61 %"
    assert line["initial loss"].startswith("-")
    assert line["initial loss"].endswith(" ± 1.0000")


def test_a_row_without_fine_tuning_has_no_changes(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", experiment(fine_tunes=False), {"fedavg": ((1.0, 0.6), (0.5, 0.9))})
    assert "What fine-tuning changes" not in markdown_of(path)


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    write_run(tmp_path / "run", experiment(fine_tunes=False), {"fedavg": ((0.7163, 0.8685), (0.0253, 0.9910))}, 0.05)
    (line,) = table_under(markdown_of(tmp_path / "run"), "After each phase")
    assert list(line.values())[1:] == ["FedAvg", "1", "0.7163", "86.85 %", "0.0253", "99.10 %", "5.0 %"]


LEVEL = "Rounds and seconds to an accuracy of 80.0 %"


def test_rounds_and_seconds_to_a_level(three_seeds: Path) -> None:
    """Seeds 1 and 2 have an initial accuracy of 0.8 in round 50, seed 0 in round 100: 66.7 in the mean, 28.9 apart.

    A round takes half a second, so that it is half as many seconds.
    """
    (line,) = table_under(markdown_of(three_seeds, target=0.8), LEVEL)
    assert line == {
        "row": "FedAvg + Reptile",
        "seeds": "3",
        "initial 80.0 %: rounds": "67 ± 29",
        "initial 80.0 %: seconds": "33 ± 14",
        "personalized 80.0 %: rounds": "50 ± 0",
        "personalized 80.0 %: seconds": "25 ± 0",
    }


def test_levels_follow_from_the_best_row(tmp_path: Path) -> None:
    """0.9 and 0.95 of 0.8, which is reached in rounds 50 and 100; a row that was not trained has no curve.

    Joint training has 0.99, where no federated row comes to.
    """
    for seed in range(2):
        curve = [("fedavg", 50, 0.2, 0.73), ("fedavg", 100, 0.3, 0.76)]
        config = experiment(seed=seed, fine_tunes=False)
        write_run(tmp_path / "a" / f"seed{seed}", config, {"fedavg": ((1.0, 0.3), (0.5, 0.8))}, curve=curve)
    local_only = experiment(5, fedavg=PhaseConfig(0, 5, SGD, MOMENTUM), fine_tunes=False)
    write_run(tmp_path / "b", local_only, {"fedavg": ((1.0, 0.1), (0.5, 0.7))})
    joint = experiment(1, joint=True, cohort_size=1, fine_tunes=False)
    write_run(tmp_path / "c", joint, {"fedavg": ((0.1, 0.95), (0.1, 0.99))})
    markdown = markdown_of(tmp_path)
    heading = "Rounds and seconds to an accuracy of 72.0 % and 76.0 %"
    fedavg, *_, untrained = sorted(table_under(markdown, heading), key=lambda line: line["row"])
    assert "These are 90 % and 95 % of the best row's personalized accuracy, joint training aside" in markdown
    assert (fedavg["personalized 72.0 %: rounds"], fedavg["personalized 76.0 %: rounds"]) == ("50 ± 0", "100 ± 0")
    assert (fedavg["initial 72.0 %: rounds"], fedavg["initial 72.0 %: seconds"]) == ("not reached", "-")
    assert untrained["initial 76.0 %: rounds"] == "no curve"


def test_best_and_last_round(three_seeds: Path) -> None:
    """Initial accuracies end at 0.9, which is their best; were the last point worse, both would be seen."""
    path = three_seeds / "E5-C20" / "seed0" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"accuracy": 0.96', '"accuracy": 0.93'))
    (line,) = table_under(markdown_of(three_seeds), "Best and last round")
    assert (line["initial: best"], line["initial: its round"]) == ("90.00 ± 0.00 %", "140 ± 0")
    assert (line["personalized: best"], line["personalized: its round"]) == ("95.67 ± 0.58 %", "127 ± 23")
    assert line["personalized: last"] == "95.00 ± 1.73 %"


def test_the_plotted_curve_is_the_mean_over_seeds(three_seeds: Path) -> None:
    """In round 50 the initial accuracies are 0.7, 0.8, 0.8: 0.7667 in the mean, 0.0577 apart."""
    (row,) = group_rows(read_runs([three_seeds])[0])
    rounds, means, deviations = mean_curve(row, "initial", ACCURACY)
    assert rounds.tolist() == [50, 100, 140]
    assert means[0] == pytest.approx(0.766667, abs=1e-6)
    assert deviations is not None
    assert deviations[0] == pytest.approx(0.057735, abs=1e-6)


def test_the_resolution_of_the_curve_is_said(three_seeds: Path) -> None:
    assert "a point every 50 rounds" in markdown_of(three_seeds)


def test_rounds_go_on_through_fine_tuning(three_seeds: Path) -> None:
    """An initial accuracy of 0.9 comes in round 40 of phase 2, which is round 140 of the run."""
    (line,) = table_under(markdown_of(three_seeds, target=0.9), "Rounds and seconds to an accuracy of 90.0 %")
    assert line["initial 90.0 %: rounds"] == "140 ± 0"


@pytest.mark.parametrize(
    ("accuracies", "said"), [((0.7, 0.75), "not reached"), ((0.7, 0.8), "reached by 1 of 2 seeds")]
)
def test_no_mean_over_seeds_that_did_not_all_get_there(
    tmp_path: Path, accuracies: tuple[float, float], said: str
) -> None:
    """A mean over the lucky seeds alone would make a row look faster than it is."""
    for seed, accuracy in enumerate(accuracies):
        write_run(
            tmp_path / f"{seed}",
            experiment(seed=seed, fine_tunes=False),
            {"fedavg": ((1.0, accuracy), (0.5, 0.9))},
            curve=[("fedavg", 100, accuracy, 0.9)],
        )
    (line,) = table_under(markdown_of(tmp_path, target=0.8), LEVEL)
    assert (line["initial 80.0 %: rounds"], line["initial 80.0 %: seconds"]) == (said, "-")
    assert line["personalized 80.0 %: rounds"] == "100 ± 0"


def test_a_target_is_reached_at_the_first_round_that_has_it(tmp_path: Path) -> None:
    """Also where the accuracy falls again, and where it is met exactly."""
    curve = [("fedavg", 10, 0.5, 0.8), ("fedavg", 20, 0.8, 0.7), ("fedavg", 30, 0.6, 0.9)]
    run = FinishedRun.read(
        write_run(tmp_path / "run", experiment(fine_tunes=False), {"fedavg": ((1.0, 0.6), (0.5, 0.9))}, curve=curve)
    )
    assert run.curve is not None
    points = [first_at(run.curve, kind, 0.8) for kind in ("initial", "personalized")]
    assert [point and point.round_number for point in points] == [20, 10]


def test_a_row_is_called_by_what_tells_it_from_most() -> None:
    reptile = experiment().fine_tune
    assert reptile is not None
    fomaml = dataclasses.replace(reptile, method=FOMAML(), num_local_steps=5)
    adam = dataclasses.replace(experiment().fedavg, server_optimizer=OptimizerConfig("adam", 0.01))
    assert labels_of(
        experiment(2),
        experiment(5),
        experiment(5, cohort_size=5),
        experiment(5, local_split="tail"),
        experiment(5, fine_tunes=False),
        experiment(5, fine_tune=fomaml),
        experiment(5, fedavg=adam),
        experiment(5, partition="iid"),
    ) == [
        "E 5, 5 clients a round",
        "E 2, 20 clients a round",
        "E 5, 20 clients a round",
        "E 5, 20 clients a round, fedavg server_optimizer adam 0.01",
        "E 5, 20 clients a round, local_split tail",
        "E 5, 20 clients a round, partition iid",
        "FedAvg",
        "FedAvg + FOMAML",
    ]


def test_methods_go_by_the_names_that_people_use() -> None:
    """A method that no other row has needs no clients a round and no E; what nobody calls a method has words."""
    fedavg = experiment().fedavg
    methods = [Ditto(), PFedMe(), PerFedAvg(), LGFedAvg(), FedAvg()]
    configs = [
        experiment(fedavg=dataclasses.replace(fedavg, method=method, num_local_epochs=epochs), fine_tunes=False)
        for epochs, method in enumerate(methods, 1)
    ]
    labels = labels_of(*configs, experiment())
    assert labels == ["FedAvg", "Ditto", "pFedMe", "Per-FedAvg", "LG-FedAvg", "FedAvg + Reptile"]
    own = json.loads(json.dumps(experiment().to_dict()))
    own["fedavg"]["method"] = {"name": "my_methods.mine:Mine"}
    run = FinishedRun(Path("run"), own, {}, {}, {}, None, None, None, ())
    assert [row.label for row in group_rows([run])] == ["Mine + Reptile"]


def test_rows_stand_in_the_order_of_their_table(tmp_path: Path) -> None:
    """Folders that the table does not have come behind."""
    scores = {"fedavg": ((1.0, 0.6), (0.5, 0.9))}
    for name, method in (("ditto", Ditto()), ("fedavg", FedAvg()), ("prox", FedProx()), ("pfedme", PFedMe())):
        phase = PhaseConfig(100, 5, SGD, MOMENTUM, method=method)
        write_run(tmp_path / name / "seed0", experiment(fedavg=phase, fine_tunes=False), scores)
    runs, _ = read_runs([tmp_path])
    labels = [row.label for row in group_rows(runs, ["pfedme", "another", "fedavg", "ditto"])]
    assert labels == ["pFedMe", "FedAvg", "Ditto", "FedProx"]


def test_a_method_is_told_with_the_settings_that_tell_it_from_others() -> None:
    """Of any method, and with any settings: a report names none."""
    fedavg = experiment().fedavg
    methods = [FedAvg(), FedAvg(), FedProx(mu=0.5), FedProx(mu=2.0)]
    configs = [
        experiment(5, fedavg=dataclasses.replace(fedavg, method=method), partition=f"shards:{number}")
        for number, method in enumerate(methods, 1)
    ]
    assert [label.partition(", method ")[2] for label in labels_of(*configs)] == [
        "",
        "",
        "fedprox mu 0.5",
        "fedprox mu 2.0",
    ]


def test_baselines_have_names_of_their_own() -> None:
    """E says nothing of a model that was not trained, of steps, or of data in one place."""
    plain = OptimizerConfig("sgd", 1.0)
    assert labels_of(
        experiment(5),
        experiment(5, cohort_size=5),
        experiment(5, fedavg=PhaseConfig(0, 5, SGD, MOMENTUM), fine_tunes=False, num_personalization_epochs=50),
        experiment(5, fedavg=PhaseConfig(0, 5, SGD, MOMENTUM)),
        experiment(5, fedavg=PhaseConfig(100, 5, SGD, plain, num_local_steps=1)),
        experiment(5, fedavg=PhaseConfig(100, 5, SGD, MOMENTUM), joint=True, cohort_size=1),
    ) == [
        "E 5, 5 clients a round",
        "E 5, 20 clients a round",
        "FedSGD + Reptile",
        "Joint training + Reptile",
        "Local only",
        "Reptile",
    ]


def test_a_row_with_a_long_name_is_called_by_its_folder(tmp_path: Path) -> None:
    """As reproduce.sh leaves them; what the row is stands under the table, and what must not be missed in its name."""
    scores = {"fedavg": ((1.0, 0.6), (0.5, 0.9))}
    rows = {
        "E5-C20": experiment(5, fine_tunes=False),
        "E2-C20": experiment(2, fine_tunes=False),
        "local-only": experiment(5, fedavg=PhaseConfig(0, 5, SGD, MOMENTUM), fine_tunes=False),
        "iid": experiment(5, fine_tunes=False, partition="iid"),
        "tail": experiment(5, fine_tunes=False, local_split="tail"),
        "last fifth": experiment(2, fine_tunes=False, local_split="tail"),
    }
    for name, config in rows.items():
        write_run(tmp_path / name / "seed0", config, scores)
    markdown = markdown_of(tmp_path)
    labels = [
        "E 2, 20 clients a round",
        "E 5, 20 clients a round",
        "last fifth, local_split tail",
        "iid",
        "tail",
        "Local only",
    ]
    assert [line["row"] for line in table_under(markdown, "Results")] == labels
    assert "| last fifth, local_split tail | E 2, 20 clients a round, local_split tail |" in markdown
    assert "| iid | E 5, 20 clients a round, partition iid |" in markdown
    assert "| Local only | untrained |" in markdown


def test_a_folder_that_two_rows_share_names_neither(tmp_path: Path) -> None:
    """Or two rows would be called the same."""
    scores = {"fedavg": ((1.0, 0.6), (0.5, 0.9))}
    configs = [experiment(fine_tunes=False, seed=seed, partition=f"shards:{2 + seed}") for seed in range(2)]
    for seed, config in enumerate(configs):
        write_run(tmp_path / "mixed" / f"seed{seed}", config, scores)
    assert [line["row"] for line in table_under(markdown_of(tmp_path), "Results")] == [
        "E 5, 20 clients a round, partition shards:2",
        "E 5, 20 clients a round, partition shards:3",
    ]


def test_what_two_rows_differ_in_is_said_of_both() -> None:
    """Neither value is the usual one, and a label without it would hide the difference."""
    assert labels_of(experiment(5), experiment(5, partition="iid")) == [
        "E 5, 20 clients a round, partition iid",
        "E 5, 20 clients a round, partition shards:2",
    ]


def test_what_changes_the_meaning_is_said_even_if_all_have_it(tmp_path: Path) -> None:
    """Scores on validation clients, or after the published cut, must never pass for results."""
    config = experiment(validation=True, local_split="tail", fine_tunes=False)
    assert labels_of(config) == ["FedAvg, local_split tail, validation"]
    markdown = markdown_of(write_run(tmp_path / "run", config, {"fedavg": ((1.0, 0.6), (0.5, 0.9))}))
    assert "are no result" in markdown
    assert "Figures published" not in markdown


def test_settings_that_change_no_result_do_not_part_seeds() -> None:
    """One seed on a GPU, with groups of clients and an adaptation curve, belongs to the row of the others."""
    configs = [experiment(seed=0), experiment(seed=1, client_batching=10, num_curve_epochs=20)]
    assert labels_of(*configs) == ["FedAvg + Reptile"]


def test_seeds_with_a_phase_1_of_their_own_are_one_row() -> None:
    """Which initial model a run had is chance as its seed is; whether it had one is a setting."""
    fields = {"fedavg": PhaseConfig(0, 5, SGD, MOMENTUM)}
    configs = [experiment(seed=seed, initial_model=str(seed) * 64, **fields) for seed in (1, 2)]
    assert labels_of(*configs) == ["Reptile"]
    assert labels_of(*configs, experiment(seed=3, **fields)) == [
        "no FedAvg, 20 clients a round, initial_model",
        "no FedAvg, 20 clients a round, no initial_model",
    ]


def test_a_seed_with_two_initial_models_is_in_two_rows(tmp_path: Path) -> None:
    """Neither is the other again, nor another seed."""
    config = experiment(fedavg=PhaseConfig(0, 5, SGD, MOMENTUM))
    for digit in "ab":
        other = dataclasses.replace(config, initial_model=digit * 64)
        write_run(tmp_path / digit, other, {"fine_tune": ((1.0, 0.6), (0.5, 0.9))})
    runs, reasons = read_runs([tmp_path])
    assert reasons == []
    labels = [row.label for row in group_rows(runs)]
    assert [label[-12:] for label in labels] == ["a" * 12, "b" * 12]


def test_the_same_experiment_and_seed_counts_once(tmp_path: Path) -> None:
    """A copy counted as another seed would make the deviation too small."""
    for name in ("a", "b"):
        write_run(tmp_path / name, experiment(fine_tunes=False), {"fedavg": ((1.0, 0.6), (0.5, 0.9))})
    runs, reasons = read_runs([tmp_path])
    assert [run.path.name for run in runs] == ["a"]
    assert reasons == [f"{tmp_path / 'b'} is the same experiment with the same seed as {tmp_path / 'a'}"]


def test_a_run_named_twice_is_read_once(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", experiment(fine_tunes=False), {"fedavg": ((1.0, 0.6), (0.5, 0.9))})
    runs, reasons = read_runs([path, tmp_path])
    assert (len(runs), reasons) == (1, [])


def test_csv_has_a_line_a_row_seed_and_phase_in_full_precision(three_seeds: Path) -> None:
    lines = list(csv.DictReader(report_of(three_seeds, target=0.8).csv.splitlines()))
    assert [(line["seed"], line["phase"]) for line in lines] == [
        (seed, phase) for seed in "012" for phase in ("fedavg", "fine_tune")
    ]
    assert all(name and value is not None for line in lines for name, value in line.items())
    third = lines[4]
    assert third["fraction_hurt"] == "0.30000000000000004", "0.1 + 0.2, not rounded"
    assert float(third["initial_accuracy"]) == 0.87
    assert (third["dataset"], third["row"], third["cohort_size"]) == ("mnist", "FedAvg + Reptile", "20")
    assert (third["num_local_epochs"], third["num_local_steps"]) == ("5", "")
    assert (third["level_1"], third["rounds_to_level_1_initial"], third["seconds_to_level_1_initial"]) == (
        "0.8",
        "50",
        "25.0",
    )
    assert (third["best_personalized_accuracy"], third["best_personalized_round"]) == ("0.95", "100")
    assert (lines[5]["best_personalized_accuracy"], lines[5]["best_personalized_round"]) == ("0.96", "140")
    assert (third["phase_rounds"], lines[5]["phase_rounds"], third["run_seconds"]) == ("100", "40", "12.5")
    assert third["run"].endswith("E5-C20/seed2")


CLIENTS = [(0.5, 0.1 * number, 0.25, 0.9) for number in range(11)]
"""Initial accuracies 0, 0.1, .. 1.0, whose percentiles are 0.1, 0.5 and 0.9; 0.9 after: 1 of 11 clients is hurt."""


def test_distribution_over_unseen_clients(tmp_path: Path) -> None:
    path = write_run(
        tmp_path / "run",
        experiment(fine_tunes=False),
        {"fedavg": ((0.5, 0.5), (0.25, 0.9))},
        clients={"fedavg": CLIENTS},
    )
    (line,) = table_under(markdown_of(path), "Unseen clients")
    assert list(line.values()) == [
        "FedAvg",
        "FedAvg",
        "11",
        *("10.00 %", "50.00 %", "90.00 %"),
        *("90.00 %", "90.00 %", "90.00 %"),
        "9.1 %",
    ]


def test_distribution_takes_the_clients_of_all_seeds(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.0, 1.0)):
        write_run(
            tmp_path / f"{seed}",
            experiment(seed=seed, fine_tunes=False),
            {"fedavg": ((0.5, accuracy), (0.5, 0.5))},
            clients={"fedavg": [(0.5, accuracy, 0.5, 0.5)] * 3},
        )
    (line,) = table_under(markdown_of(tmp_path), "Unseen clients")
    assert (line["clients"], line["initial accuracy p50"], line["clients hurt"]) == ("6", "50.00 %", "50.0 %")


def epochs_of(values: Sequence[float], measure: str = "accuracy") -> list[dict[str, Any]]:
    """Means after 0, 1, .. epochs, with a deviation of 0.5; what is not measured is null."""
    names = ("loss", "loss_std", "accuracy", "accuracy_std")
    return [
        {"epochs": epochs, **dict.fromkeys(names), measure: value, f"{measure}_std": 0.5}
        for epochs, value in enumerate(values)
    ]


def test_accuracy_against_personalization_epochs(tmp_path: Path) -> None:
    """Seed 0 goes from 0.50 up by 0.02 an epoch, seed 1 from 0.54: 0.52 and 0.72 in the mean, 0.0283 apart."""
    for seed, start in enumerate((0.50, 0.54)):
        write_run(
            tmp_path / f"{seed}",
            experiment(seed=seed, fine_tunes=False),
            {"fedavg": ((0.5, 0.5), (0.5, 0.5))},
            by_epoch={"fedavg": epochs_of([start + 0.02 * epochs for epochs in range(11)])},
        )
    (line,) = table_under(markdown_of(tmp_path), "Accuracy against personalization")
    assert list(line) == ["row", "seeds", "after", "0 epochs", "1 epoch", *(f"{n} epochs" for n in (2, 3, 5, 10))]
    assert (line["seeds"], line["0 epochs"], line["10 epochs"]) == ("2", "52.00 ± 2.83 %", "72.00 ± 2.83 %")


def sine_run(path: Path, seed: int = 0, batch_size: int = 10) -> Path:
    """A regression: 16 tasks, accuracies null. MSE 4.0, 3.9, .. after 0, 1, .. steps."""
    config = make_config(
        dataset="sine",
        seed=seed,
        batch_size=batch_size,
        partition=None,
        fedavg=PhaseConfig(0, 5, SGD, MOMENTUM),
        fine_tune=PhaseConfig(40, 5, SGD, OptimizerConfig("sgd", 0.1), method=MAML()),
        num_curve_epochs=32,
    )
    return write_run(
        path,
        config,
        {"fine_tune": ((4.0, None), (1.0, None))},
        hurt=0.25,
        curve=[("fine_tune", 40, None, None)],
        clients={"fine_tune": [(4.0, math.nan, 1.0, math.nan)] * 12 + [(4.0, math.nan, 5.0, math.nan)] * 4},
        by_epoch={"fine_tune": epochs_of([4.0 - 0.1 * epochs for epochs in range(33)], "loss")},
    )


def test_a_regression_is_reported_by_its_losses(tmp_path: Path) -> None:
    """A null accuracy must not become 0 %, and there is no round at which it was reached."""
    markdown = markdown_of(sine_run(tmp_path / "run"))
    (line,) = table_under(markdown, "After each phase")
    assert line == {
        "row": "MAML",
        "after": "fine-tuning",
        "seeds": "1",
        "initial MSE": "4.0000",
        "personalized MSE": "1.0000",
        "clients hurt": "25.0 %",
    }
    assert "Rounds to" not in markdown
    (line,) = table_under(markdown, "Unseen clients")
    assert (line["initial MSE p50"], line["personalized MSE p90"], line["clients hurt"]) == (
        "4.0000",
        "5.0000",
        "25.0 %",
    )


def test_steps_of_a_regression_have_confidence_intervals_over_tasks(tmp_path: Path) -> None:
    """1.96 * 0.5 / sqrt(16) = 0.2450. Ten examples in batches of ten: an epoch is a step."""
    (line,) = table_under(markdown_of(sine_run(tmp_path / "run")), "MSE against personalization")
    assert {name: text for name, text in line.items() if name.startswith("MSE")} == {
        "MSE after 0 steps": "4.0000 ± 0.2450",
        "MSE after 1 step": "3.9000 ± 0.2450",
        "MSE after 5 steps": "3.5000 ± 0.2450",
        "MSE after 10 steps": "3.0000 ± 0.2450",
        "MSE after 32 steps": "0.8000 ± 0.2450",
    }


def test_an_epoch_of_several_steps_counts_as_several(tmp_path: Path) -> None:
    """Ten examples in batches of two are five steps: after 5 and 10 steps stand the figures of epochs 1 and 2."""
    (line,) = table_under(markdown_of(sine_run(tmp_path / "run", batch_size=2)), "MSE against personalization")
    assert (line["MSE after 5 steps"], line["MSE after 10 steps"]) == ("3.9000 ± 0.2450", "3.8000 ± 0.2450")
    assert "MSE after 1 step" not in line


def test_the_csv_leaves_empty_what_is_no_number(tmp_path: Path) -> None:
    (line,) = csv.DictReader(report_of(sine_run(tmp_path / "run")).csv.splitlines())
    assert (line["initial_loss"], line["initial_accuracy"], line["rounds_to_level_1_initial"]) == ("4.0", "", "")


@pytest.mark.parametrize(
    ("dataset", "has_table", "has_papers"),
    [
        ("mnist", True, False),
        ("emnist", True, True),
        ("femnist", False, True),
        ("synthetic_writers", False, False),
        ("digits", False, False),
    ],
)
def test_published_figures_stand_only_beside_what_they_are_of(
    tmp_path: Path, dataset: str, has_table: bool, has_papers: bool
) -> None:
    """The paper's clients are writers of EMNIST-62: beside MNIST its figures would mislead."""
    means: dict[str, tuple[Pair, Pair]] = {"fedavg": ((1.0, 0.8), (0.5, 0.9)), "fine_tune": ((0.25, 0.95), (0.1, 0.99))}
    markdown = markdown_of(write_run(tmp_path / "run", experiment(dataset=dataset), means))
    assert ("Figures published for this experiment" in markdown) == has_table
    assert ("The paper's figures" in markdown) == has_papers
    assert ("Table 1 of Jiang" in markdown) == has_papers
    if has_table:
        (line,) = table_under(markdown, "Figures published for this experiment, after fine-tuning")
        assert line["initial loss, accuracy: published"] == "1.3430, 78.35 %"
        assert line["initial loss, accuracy: ours"] == "0.2500, 95.00 %"
        assert line["personalized loss, accuracy: published"] == "0.1055, 98.79 %"
        assert (line["clients"], line["rounds + fine-tuning"]) == ("100", "100 + 40")
        assert "Its losses are sums over batches, ours are means over examples." in markdown
    if has_papers:
        (line,) = table_under(markdown, "The paper's figures for EMNIST-62 by writer")
        assert (line["initial accuracy: paper"], line["initial accuracy: ours"]) == ("0.8471 (0.0084)", "0.8000")
        assert (line["rounds to 0.8, initial: paper"], line["rounds to 0.8, personalized: paper"]) == ("65.6", "31.25")
        assert "The table names E and no fine-tuning" in markdown
        assert ("Ours on emnist have no writers" in markdown) == (dataset == "emnist")


def line_under(markdown: str, heading: str) -> dict[str, str]:
    (line,) = table_under(markdown, heading)
    return line


def test_femnist_has_the_table_of_the_codes_authors(tmp_path: Path) -> None:
    means: dict[str, tuple[Pair, Pair]] = {"fedavg": ((1.0, 0.8), (0.5, 0.9)), "fine_tune": ((0.25, 0.82), (0.1, 0.91))}
    markdown = markdown_of(write_run(tmp_path / "run", experiment(dataset="femnist", partition=None), means))
    line = line_under(
        markdown, "Figures published for FEMNIST with the code that this experiment follows, after fine-tuning"
    )
    assert (line["initial, %: published"], line["initial, %: ours"]) == ("81.48 %", "82.00 %")
    assert (line["personalized, %: published"], line["personalized, %: ours"]) == ("90.77 %", "91.00 %")
    assert "split by user into four fifths that train" in markdown


TWO_LABELS = "PFLlib's figures for Fashion-MNIST with two labels a client"
DIRICHLET = "PFLlib's figures for Fashion-MNIST with Dirichlet(0.1)"


@pytest.mark.parametrize(
    ("partition", "heading", "initial", "personalized"),
    [
        ("shards:2", TWO_LABELS, "80.41 %", "99.44 %"),
        ("labels:2", TWO_LABELS, "80.41 %", "99.44 %"),
        ("groups:2", TWO_LABELS, "80.41 %", "99.44 %"),
        ("dirichlet:0.1", DIRICHLET, "85.85 %", "97.47 %"),
        ("iid", None, "", ""),
    ],
)
def test_methods_have_their_published_figures_beside_them(
    tmp_path: Path, partition: str, heading: str | None, initial: str, personalized: str
) -> None:
    """Figures of a global model stand before adaptation, those of personal models after it; each cut has its own."""
    means: dict[str, tuple[Pair, Pair]] = {"fedavg": ((1.0, 0.7), (0.5, 0.9))}
    for method in (FedAvg(), Ditto(), Reptile()):
        phase = PhaseConfig(100, 1, SGD, MOMENTUM, method=method)
        config = experiment(dataset="fashion_mnist", partition=partition, fedavg=phase, fine_tunes=False)
        write_run(tmp_path / method.name / "seed0", config, means)
    markdown = markdown_of(tmp_path)
    assert [each for each in (TWO_LABELS, DIRICHLET) if each in markdown] == ([heading] if heading else [])
    if heading is None:
        assert "PFLlib" not in markdown
        return
    fedavg, ditto = sorted(table_under(markdown, heading), key=lambda line: line["initial, %: PFLlib"], reverse=True)
    assert (fedavg["initial, %: PFLlib"], fedavg["initial, %: ours"]) == (initial, "70.00 %")
    assert (fedavg["personalized, %: PFLlib"], fedavg["personalized, %: ours"]) == ("-", "90.00 %")
    assert (ditto["initial, %: PFLlib"], ditto["personalized, %: PFLlib"]) == ("-", personalized)
    assert "2,000 rounds" in markdown


def test_a_method_stands_once_beside_its_published_figures(tmp_path: Path) -> None:
    """Phase 1 of a run that is fine-tuned is FedAvg with fewer rounds: only where there is no other is it shown."""
    means: dict[str, tuple[Pair, Pair]] = {"fedavg": ((1.0, 0.7), (0.5, 0.9)), "fine_tune": ((1.0, 0.8), (0.5, 0.95))}
    tuned = experiment(dataset="fashion_mnist").fine_tune
    assert tuned is not None
    for name, method in (("reptile", Reptile()), ("fomaml", FOMAML())):
        fine_tune = dataclasses.replace(tuned, method=method)
        write_run(tmp_path / name, experiment(dataset="fashion_mnist", fine_tune=fine_tune), means)
    assert line_under(markdown_of(tmp_path), TWO_LABELS)["rounds"] == "100"
    alone = experiment(dataset="fashion_mnist", fedavg=PhaseConfig(140, 5, SGD, MOMENTUM), fine_tunes=False)
    curve = [("fedavg", 50, 0.75, 0.8), ("fedavg", 140, 0.7, 0.9)]
    write_run(tmp_path / "alone", alone, {"fedavg": means["fedavg"]}, curve=curve)
    fedsgd = dataclasses.replace(alone, fedavg=PhaseConfig(140, 5, SGD, MOMENTUM, num_local_steps=1))
    write_run(tmp_path / "fedsgd", fedsgd, {"fedavg": means["fedavg"]})
    line = line_under(markdown_of(tmp_path), TWO_LABELS)
    assert (line["row"], line["rounds"]) == ("FedAvg", "140"), "FedSGD is not what was published"
    assert (line["initial, %: ours"], line["initial, %: ours, best round"]) == ("70.00 %", "75.00 %")
    assert "Our best round is a point of the curve" in markdown_of(tmp_path)


def test_published_clients_that_trained_stand_beside_ours_that_did(tmp_path: Path) -> None:
    config = experiment(dataset="fashion_mnist", fine_tunes=False)
    path = write_run(tmp_path / "run", config, {"fedavg": ((1.0, 0.7), (0.5, 0.9))})
    result = json.loads((path / "result.json").read_text())
    trained = {"clients": 2, "initial": spread(1.0, 0.75), "personalized": spread(0.5, 0.95), "fraction_hurt": 0.0}
    result["trained_after_fedavg"] = trained
    (path / "result.json").write_text(json.dumps(result))
    header, *unseen = (path / "clients.csv").read_text().splitlines()
    lines = [f"{header},population", *(f"{line},{whose}" for whose in ("unseen", "trained") for line in unseen)]
    (path / "clients.csv").write_text("".join(f"{line}\n" for line in lines))
    line = line_under(markdown_of(path), TWO_LABELS)
    assert (line["initial, %: ours"], line["initial, %: ours, clients that trained"]) == ("70.00 %", "75.00 %")
    assert line["personalized, %: ours, clients that trained"] == "95.00 %"


def test_training_on_ones_own_examples_alone_is_found_by_its_having_no_rounds(tmp_path: Path) -> None:
    """The rows of FedEM's table; from another run's model it would not be training alone."""
    heading = "FedEM's figures for clients of their own"
    means: dict[str, tuple[Pair, Pair]] = {"fedavg": ((1.0, 0.02), (0.5, 0.3))}
    for name, dataset, initial_model in (("plays", "plays", None), ("other", "femnist", "0" * 64)):
        phase = PhaseConfig(0, 1, SGD, MOMENTUM)
        config = experiment(
            dataset=dataset, partition=None, fedavg=phase, fine_tunes=False, initial_model=initial_model
        )
        write_run(tmp_path / name, config, means)
    line = line_under(markdown_of(tmp_path / "plays"), heading)
    assert (line["initial, %: FedEM's authors"], line["personalized, %: FedEM's authors"]) == ("-", "32.0 %")
    assert line["personalized, %: ours"] == "30.00 %"
    assert heading not in markdown_of(tmp_path / "other")
    write_run(tmp_path / "trained", experiment(dataset="femnist", partition=None, fine_tunes=False), means)
    trained = line_under(markdown_of(tmp_path / "trained"), heading)
    assert (trained["initial, %: FedEM's authors"], trained["personalized, %: FedEM's authors"]) == ("78.6 %", "75.3 %")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_epochs": 3},
        {"fedavg": PhaseConfig(100, 5, SGD, MOMENTUM, num_local_steps=7)},
        {"fedavg": PhaseConfig(100, 5, SGD, MOMENTUM, method=FedProx())},
        {"fine_tune": PhaseConfig(40, 10, SGD, OptimizerConfig("adam", 0.001), method=FOMAML())},
    ],
)
def test_a_row_that_is_none_of_the_eight_has_no_published_figures(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Three epochs, steps in place of epochs, FedProx or FOMAML were never published."""
    means: dict[str, tuple[Pair, Pair]] = {"fedavg": ((1.0, 0.8), (0.5, 0.9)), "fine_tune": ((0.25, 0.95), (0.1, 0.99))}
    path = write_run(tmp_path / "run", experiment(dataset="emnist", **changes), means)
    assert "ublished" not in markdown_of(path)


def test_the_published_cut_stands_beside_the_published_figures_alone(tmp_path: Path) -> None:
    """It was made to be compared with them, and is nothing like the paper's protocol."""
    means: dict[str, tuple[Pair, Pair]] = {"fedavg": ((1.0, 0.8), (0.5, 0.9)), "fine_tune": ((0.25, 0.95), (0.1, 0.99))}
    markdown = markdown_of(write_run(tmp_path / "run", experiment(dataset="emnist", local_split="tail"), means))
    assert "Figures published for this experiment" in markdown
    assert "The paper's figures" not in markdown


def test_synthetic_data_say_so(tmp_path: Path) -> None:
    path = write_run(
        tmp_path / "run",
        experiment(dataset="synthetic_writers", partition=None, fine_tunes=False),
        {"fedavg": ((1.0, 0.8), (0.5, 0.9))},
    )
    markdown = markdown_of(path)
    assert (
        "## synthetic_writers\n\nSynthetic, rendered from fonts: no result on it is a result on FEMNIST.\n" in markdown
    )


def test_a_section_a_dataset(three_seeds: Path, tmp_path: Path) -> None:
    """Rows of two data sets in one table would invite a comparison that means nothing."""
    sine_run(tmp_path / "sine")
    markdown = markdown_of(three_seeds, tmp_path / "sine")
    mnist, sine = markdown.split("\n## ")[1:]
    assert mnist.startswith("mnist\n")
    assert sine.startswith("sine\n")
    assert "MSE" not in mnist
    assert "E 5, 20 clients" not in sine


class References(HTMLParser):
    """Collects what a page refers to, its text, and the pictures' descriptions."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.descriptions: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.urls += [value for name in ("src", "srcset", "href", "action", "data") if (value := values.get(name))]
        if tag == "img":
            self.descriptions.append(values.get("alt"))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_no_other_file(three_seeds: Path, tmp_path: Path) -> None:
    """Sent by mail, or opened years later without a network, it must show the same."""
    built = report_of(three_seeds, sine_run(tmp_path / "sine"))
    html = to_html(built)
    page = References()
    page.feed(html)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in html
    assert "url(" not in html
    pictures = [url for url in page.urls if url.startswith("data:image/png;base64,")]
    assert all(url in pictures or url == "data:," or url.startswith("#") for url in page.urls)
    assert all(base64.b64decode(url.partition(",")[2], validate=True).startswith(PNG) for url in pictures)
    plots = [block for section in built.sections for block in section.blocks if isinstance(block, Plot)]
    assert len(plots) == len(page.descriptions) == 5, "curves and clients of both, and of sine personalization"
    assert len(pictures) == 2 * len(plots), "each for light and for dark screens"
    assert all(page.descriptions)
    assert html.count("prefers-color-scheme: dark") == 1 + len(plots)


def test_the_page_shows_the_tables_of_the_markdown(three_seeds: Path) -> None:
    built = report_of(three_seeds)
    page = References()
    page.feed(to_html(built))
    for line in table_under(to_markdown(built, with_plots=False), "Results"):
        assert set(filter(None, line.values())) <= set(page.texts)


def test_text_from_a_run_is_no_markup(tmp_path: Path) -> None:
    """A data set's name comes from a flag; in the page it must stay text."""
    path = write_run(
        tmp_path / "a|b",
        experiment(dataset="<b>own</b>:make", fine_tunes=False),
        {"fedavg": ((1.0, 0.8), (0.5, 0.9))},
    )
    built = report_of(path)
    assert "<b>" not in to_html(built)
    (line,) = table_under(to_markdown(built, with_plots=False), "Runs")
    assert line["folder"].endswith("a\\|b"), "a bar in a cell would begin another one"


def test_files_of_a_report(three_seeds: Path, tmp_path: Path) -> None:
    built = report_of(three_seeds)
    write_report(built, tmp_path / "out")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"report.md", "report.html", "table.csv", "plots/mnist-curves.png", "plots/mnist-clients.png"}
    markdown = (tmp_path / "out" / "report.md").read_text()
    links = [line.rpartition("](")[2].rstrip(")") for line in markdown.splitlines() if line.startswith("![")]
    assert {f"{link}" for link in links} == {name for name in written if name.endswith(".png")}
    assert (tmp_path / "out" / "table.csv").read_text() == built.csv
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"--output .*file cannot be written \(Not a directory\)"):
        write_report(built, tmp_path / "file")


def test_runs_are_found_at_any_depth_and_not_inside_runs(three_seeds: Path) -> None:
    """A report inside a run's folder, or a model's, is not another run."""
    inside = three_seeds / "E5-C20" / "seed0" / "report"
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    assert [path.name for path in find_runs(three_seeds.parent)] == ["seed0", "seed1", "seed2"]


COLUMNS = ",".join(
    ["num_train_examples"]
    + [
        f"after_{phase}_{kind}_{measure}"
        for phase in ("fedavg", "fine_tune")
        for kind in ("initial", "personalized")
        for measure in ("loss", "accuracy")
    ]
)
"""Of clients.csv, those that reports are made of."""


def damage(path: Path, name: str, content: str | None) -> None:
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("result.json", None, "holds a run that has not ended"),
        ("result.json", "{", "result.json is damaged"),
        ("result.json", "[]", "result.json is damaged (its content is an array, must be an object)"),
        ("result.json", "{}", "result.json is damaged (it lacks train_clients)"),
        ("config.json", None, "is not the folder of a run (it has no config.json)"),
        (
            "config.json",
            '{"experiment": {"seed": 0}}',
            "config.json is damaged, or of another version of this",
        ),
    ],
)
def test_a_run_that_cannot_be_read_is_one_clear_line(
    three_seeds: Path, name: str, content: str | None, said: str
) -> None:
    """The others are reported, and that they are two is seen in the number of seeds."""
    damage(three_seeds / "E5-C20" / "seed1", name, content)
    runs, reasons = read_runs([three_seeds])
    assert [run.seed for run in runs] == [0, 2]
    assert len(reasons) == 1
    assert "seed1" in reasons[0]
    assert said in reasons[0]
    assert "\n" not in reasons[0]
    assert read_runs([three_seeds / "E5-C20" / "seed1"]) == ([], reasons)


def test_a_phase_that_result_json_lacks_is_damage(three_seeds: Path) -> None:
    """Else the row would lose a line, and nobody would know why."""
    path = three_seeds / "E5-C20" / "seed1"
    result = json.loads((path / "result.json").read_text())
    del result["after_fine_tune"]
    damage(path, "result.json", json.dumps(result))
    _, reasons = read_runs([three_seeds])
    assert reasons == [f"{path / 'result.json'} is damaged (it lacks after_fine_tune)"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
        ("metrics.jsonl", '{"phase": "fed', "metrics.jsonl is damaged (line 1: "),
        ("clients.csv", None, "clients.csv is missing"),
        ("clients.csv", "client_id\n1\n", "clients.csv is damaged (it lacks num_train_examples)"),
        ("clients.csv", f"client_id,{COLUMNS}\n1\n", "clients.csv is damaged (a line has too few cells)"),
    ],
)
def test_a_run_without_its_details_keeps_its_results(
    three_seeds: Path, name: str, content: str | None, said: str
) -> None:
    damage(three_seeds / "E5-C20" / "seed1", name, content)
    runs, reasons = read_runs([three_seeds])
    assert len(runs) == 3
    assert len(reasons) == 1
    assert said in reasons[0]
    markdown = to_markdown(build_report(runs, 0.8), with_plots=True)
    assert table_under(markdown, "Results")[0]["seeds"] == "3"
    assert ("### Best and last round" in markdown) == (name != "metrics.jsonl")
    clients = table_under(markdown, "Unseen clients")[0]["clients"]
    assert clients == ("4" if name == "clients.csv" else "6"), "two clients a run"


def test_clients_csv_must_have_all_clients(three_seeds: Path) -> None:
    """A copy that broke off would show the distribution of some of them as that of all."""
    path = three_seeds / "E5-C20" / "seed1" / "clients.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    _, reasons = read_runs([three_seeds])
    assert "clients.csv is damaged (it has 1 rows, and result.json counts 2 clients)" in reasons[0]


def run_report(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "report.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_the_command_prints_and_writes_the_report(three_seeds: Path, tmp_path: Path) -> None:
    damage(three_seeds / "E5-C20" / "seed2", "result.json", None)
    done = run_report(three_seeds, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| FedAvg + Reptile | FedAvg | 2 |" in done.stdout
    assert "![" not in done.stdout, "a terminal shows no pictures"
    assert "left out: " in done.stderr
    assert "seed2" in done.stderr
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.md", "report.html", "table.csv", "plots"}


def test_the_report_of_a_single_run_lies_in_its_folder(three_seeds: Path, tmp_path: Path) -> None:
    path = three_seeds / "E5-C20" / "seed0"
    assert run_report(path, cwd=tmp_path).returncode == 0
    assert (path / "report" / "report.html").exists()
    assert not (tmp_path / "report").exists()


def test_the_command_refuses_what_it_cannot_report(three_seeds: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, said in (
        ([tmp_path / "nowhere"], "is not a folder"),
        ([tmp_path / "empty"], "no run was found in"),
        ([three_seeds, "--target", "80"], "--target 80.0 must be a number above 0 and at most 1"),
    ):
        done = run_report(*words, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert said in done.stderr.splitlines()[-1]
    done = run_report(tmp_path / "empty", tmp_path / "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["left out", "left out", "error"]


COMMITTED = sorted(path.parent.parent.name for path in ROOT.glob("results/*/report/report.md"))


@pytest.mark.parametrize("table", COMMITTED)
def test_committed_tables_are_what_the_kept_runs_make(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text on every processor. `report.py results/TABLE --output results/TABLE/report` mends it."""
    monkeypatch.chdir(ROOT)
    runs, reasons = read_runs([Path("results") / table])
    assert reasons == []
    built = build_report(runs, order=report.order_of(runs))
    folder = Path("results") / table / "report"
    assert to_markdown(built, with_plots=True) == (folder / "report.md").read_text(encoding="utf-8")
    assert built.csv == (folder / "table.csv").read_text(encoding="utf-8")


def test_rows_of_a_table_stand_as_there(three_seeds: Path, tmp_path: Path) -> None:
    """Found by the folders' names; runs elsewhere have no order of their own."""
    runs, _ = read_runs([three_seeds])
    assert report.order_of(runs) == []
    in_table = [dataclasses.replace(run, path=tmp_path / "sine" / "joint" / "seed0") for run in runs]
    assert report.order_of(in_table)[:2] == ["maml", "fomaml"]


def test_levels_follow_from_the_runs_unless_one_is_named() -> None:
    assert parse(report.Report, ["runs"]).target is None
    assert parse(report.Report, ["runs", "--target", "0.8"]).target == 0.8


def test_reads_what_a_run_writes(tmp_path: Path) -> None:
    """The folders above are written by this file; a real run must be read in the same way."""
    config = make_config(num_curve_epochs=2)
    dataset = digits_dataset(20)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    folder = RunFolder(tmp_path / "run")
    run_and_record(config, LocalExecutor(config, model, dataset), dataset, model, folder, {"world_size": 1})
    folder.close()
    runs, reasons = read_runs([tmp_path])
    assert reasons == []
    (run,) = runs
    assert list(run.phases) == list(Phase)
    assert run.curve is not None
    assert [point.round_number for point in run.curve] == [1, 2, 3, 4]
    for phase, result in run.phases.items():
        assert [scores["epochs"] for scores in result.by_epoch] == [0, 1, 2]
        assert result.by_epoch[0]["accuracy"] == result.initial["accuracy"]
        scores = run.client_scores(phase, "personalized", "accuracy")
        assert scores is not None
        assert scores.mean() == pytest.approx(result.personalized["accuracy"])
    assert "E 2, 4 clients a round" in to_markdown(build_report(runs, 0.8), with_plots=True)


def test_runs_on_own_files_go_by_the_files_names(tmp_path: Path) -> None:
    """Plots are files of that name, and two files of one name are not mixed up."""
    pairs = ((0.5, 0.5), (0.4, 0.6))
    for folder in ("a", "b"):
        config = experiment(dataset=f"/home/{folder}/own.csv", num_clients=None, partition=None)
        write_run(tmp_path / folder, config, {"fedavg": pairs, "fine_tune": pairs})
    report = report_of(tmp_path)
    assert [section.title for section in report.sections] == ["own.csv", "own.csv (2)"]
    names = [block.name for section in report.sections for block in section.blocks if isinstance(block, Plot)]
    assert len(names) == len(set(names)) > 0
    assert not any("/" in name for name in names)


def committed_table(table: str, heading: str) -> list[dict[str, str]]:
    return table_under((ROOT / "results" / table / "report" / "report.md").read_text(encoding="utf-8"), heading)


def figures_in(cell: str) -> list[float]:
    """With a sign or without, and without the deviation behind ±."""
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", re.sub(r"± \d+\.\d+", "", cell))]


def is_rounded(cell: str, exact: str) -> bool:
    """A cell of a page has one digit, those of reports have two."""
    shown, known = figures_in(cell), figures_in(exact)
    return len(shown) == len(known) and all(abs(a - b) < 0.0501 for a, b in zip(shown, known, strict=True))


def test_the_table_of_the_readme_is_the_reports() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    known = {line["row"]: line for line in committed_table("fashion_shards", "Results")}
    lines = re.findall(r"^\| (\S[^|]*) \| ([^|]*%) \| ([^|]*%) \| ([^|]*) \| ([^|]*%) \|$", readme, re.MULTILINE)
    assert len(lines) >= 4
    for row, *cells in lines:
        line = known[row.partition(" (")[0]]
        exact = [line[name] for name in ("initial", "personalized", "difference", "hurt")]
        wrong = [pair for pair in zip(cells, exact, strict=True) if not is_rounded(*pair)]
        assert not wrong, f"{row}: README.md has other figures than the report"


def test_the_verdicts_of_the_page_are_the_reports() -> None:
    """Each cell of the table of claims is a line of its claim on unseen clients, with its verdict."""
    lines = (ROOT / "results" / "README.md").read_text(encoding="utf-8").splitlines()
    (begin,) = [number for number, line in enumerate(lines) if line.startswith("| claim |")]
    tables = [name.strip() for name in lines[begin].split("|")[2:-1]]
    known = {table: committed_table(table, "Claims") for table in tables}
    num_cells = 0
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :]):
        claim, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        for table, cell in zip(tables, cells, strict=True):
            of_claim = [one for one in known[table] if (one["claim"], one["clients"]) == (claim[0], "unseen")]
            told = [
                one
                for one in of_claim
                if cell.startswith(one["verdict"]) and is_rounded(cell, one["difference in accuracy"])
            ]
            assert told or not cell, f"{table}: {claim}: no line of the report has {cell}"
            num_cells += 1
    assert num_cells >= 3 * 7
