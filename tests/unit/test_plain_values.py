"""Whatever JSON stands in a run's files, it is read as the right type or refused with one line that names the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import make_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfedavg.engine.experiment import RoundRecord
from perfedavg.engine.scores import ClientScore
from perfedavg.methods.fomaml import FOMAML
from perfedavg.personal_model import RunModel
from perfedavg.plain_values import from_plain, parse_json, parse_toml
from perfedavg.recording.model_file import ModelFacts
from perfedavg.recording.runs import RecordedRun, read_unfinished_run
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from reporting.contents import build_report, read_runs
from reporting.files import to_markdown

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SGD = OptimizerConfig("sgd", 0.1)
EXPERIMENT = json.loads(json.dumps(make_config(fine_tune=PhaseConfig(2, 1, SGD, SGD, method=FOMAML())).to_dict()))
SUMMARY = {"initial": {"loss": 1.0, "accuracy": 0.5}, "personalized": {"loss": 0.5, "accuracy": 0.75}}
RECORD = json.loads(
    json.dumps(
        RoundRecord(
            Phase.FEDAVG, 3, (1, 2), 40, {2: "why"}, None, 0.5, 1.5, 0.25, {1: "gone"}, {**SUMMARY, "fraction_hurt": 0}
        ).to_dict()
    )
)
SCORE = {"client_id": 3, "num_train_examples": 5, "num_test_examples": 2, "by_epoch": [{"loss": 1.0}, {"loss": 0.5}]}
SCORE |= {"initial": {"loss": 1, "accuracy": 0.5}, "personalized": {"loss": 0.5, "accuracy": 1.0}}


def places(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The way to every value in a JSON value, itself first."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(way for key, entry in entries for way in places(entry, (*prefix, key)))]


def edited(value: Any, way: tuple[str | int, ...], other: Any) -> Any:
    if not way:
        return other
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[way[0]] = edited(copied[way[0]], way[1:], other)
    return copied


def edits(value: Any) -> st.SearchStrategy[Any]:
    """The value with another one somewhere in it."""
    return st.builds(lambda way, other: edited(value, way, other), st.sampled_from(places(value)), PLAIN)


def assert_one_line(error: ValueError, part: str = "") -> None:
    assert type(error) is ValueError
    assert str(error)
    assert part in str(error)
    assert len(str(error).splitlines()) == 1, str(error)


@settings(max_examples=300, deadline=None)
@given(edits(EXPERIMENT))
def test_an_edited_experiment_is_one_or_is_refused_in_a_line(values: Any) -> None:
    try:
        config = ExperimentConfig.from_dict(values)
    except ValueError as error:
        assert_one_line(error)
    else:
        assert ExperimentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@settings(max_examples=200, deadline=None)
@given(edits(RECORD))
def test_an_edited_round_is_one_or_is_refused_in_a_line(values: Any) -> None:
    try:
        record = RoundRecord.from_dict(values)
    except ValueError as error:
        assert_one_line(error)
    else:
        assert isinstance(record.phase, Phase)


@settings(max_examples=200, deadline=None)
@given(edits(SCORE))
def test_an_edited_score_is_one_or_is_refused_in_a_line(values: Any) -> None:
    try:
        from_plain(ClientScore, values)
    except ValueError as error:
        assert_one_line(error)


@settings(max_examples=100, deadline=None)
@given(PLAIN, PLAIN, PLAIN)
def test_edited_metadata_of_a_model_are_refused(names: Any, parts: Any, number: Any) -> None:
    metadata = {"dataset": "digits", "architecture": "mlp", "class_names": json.dumps(names)}
    try:
        facts = ModelFacts.from_metadata({**metadata, "own_parts": json.dumps(parts), "num_classes": str(number)})
    except ValueError:
        return
    assert facts.num_classes is None or facts.num_classes >= 1
    assert all(type(name) is str for name in facts.class_names or ())


@pytest.mark.parametrize(
    ("way", "value", "said"),
    [
        (("fedavg", "num_rounds"), "12", 'fedavg.num_rounds is "12", must be a whole number'),
        (("partition",), 7, "partition is 7, must be a text or null"),
        (("initial_model",), 3, "initial_model is 3, must be a text or null"),
        (("initial_model",), "runs/a", 'initial_model is "runs/a", must be null or 64 hexadecimal digits'),
        (("fedavg", "client_optimizer"), None, "fedavg.client_optimizer is null, must be an object"),
        (("fedavg", "client_optimizer", "betas"), [0.9], "fedavg.client_optimizer.betas has 1 entries, must have 2"),
        (
            ("fedavg", "client_optimizer", "betas"),
            [0.9, "x"],
            'fedavg.client_optimizer.betas[1] is "x", must be a number',
        ),
        (("joint",), 1, "joint is 1, must be true or false"),
        (("seed",), True, "seed is true, must be a whole number"),
        (("seed",), 1.0, "seed is 1.0, must be a whole number"),
        (("unseen_fraction",), "1e-999999999", "--unseen_fraction 1e-999999999 must be 0, or above 0 and below 1"),
        (("cohort_size",), [[]], "cohort_size is an array, must be a whole number"),
    ],
)
def test_the_line_says_which_field_and_what_it_must_be(way: tuple[str | int, ...], value: Any, said: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011, compared whole
        ExperimentConfig.from_dict(edited(EXPERIMENT, way, value))
    assert said in str(refusal.value)


def test_a_field_that_is_missing_or_unknown_is_named() -> None:
    with pytest.raises(ValueError, match=r"^it lacks dataset$"):
        ExperimentConfig.from_dict({name: value for name, value in EXPERIMENT.items() if name != "dataset"})
    with pytest.raises(ValueError, match=r"^colour is unknown$"):
        ExperimentConfig.from_dict({**EXPERIMENT, "colour": 1})
    assert from_plain(ExperimentConfig, {**EXPERIMENT, "colour": 1}, ignore_unknown=True) == ExperimentConfig.from_dict(
        EXPERIMENT
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, b"\xff", "{", "", "1" * 5000 + "x"])
def test_text_that_is_no_json_is_one_line(text: str | bytes) -> None:
    """100,000 brackets are a RecursionError to the library, which is no message for a user."""
    with pytest.raises(ValueError):  # noqa: PT011, the library's words
        parse_json(text)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = ", "a = 1\na = 2", "[a"])
def test_text_that_is_no_toml_is_one_line(text: str) -> None:
    assert parse_toml("[rows.a]\nepochs = 3\nserver_lr = 1.0\n") == {"rows": {"a": {"epochs": 3, "server_lr": 1.0}}}
    with pytest.raises(ValueError):  # noqa: PT011, the library's words
        parse_toml(text)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def write_finished_run(path: Path, experiment: Any, result: Any) -> None:
    (path / "config.json").write_text(json.dumps({"experiment": experiment, "environment": {}}))
    (path / "result.json").write_text(json.dumps(result))
    (path / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    (path / "clients.csv").write_text("client_id\n1\n")


SPREAD = dict.fromkeys(("loss", "accuracy", "accuracy_std", "accuracy_p10", "accuracy_p50", "accuracy_p90"), 0.5)
PHASE = {"clients": 2, "initial": SPREAD, "personalized": SPREAD, "fraction_hurt": 0.5}
PHASE["by_epoch"] = [{"epochs": 0, "loss": 1.0, "loss_std": 0.1, "accuracy": 0.5, "accuracy_std": 0.1}]
RESULT = {"train_clients": 16, "unseen_clients": 4, "seconds": 2.5, "model_sha256": "ab" * 32, "after_fedavg": PHASE}
RESULT["after_fine_tune"] = PHASE


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(edits(EXPERIMENT), st.just(RESULT)) | st.tuples(st.just(EXPERIMENT), edits(RESULT)))
def test_every_reader_of_an_edited_finished_run_has_a_line(run_folder: Path, contents: tuple[Any, Any]) -> None:
    """report.py leaves the run out and says why, or reports it; personalize.py and --resume refuse it."""
    write_finished_run(run_folder, *contents)
    runs, reasons = read_runs([run_folder])
    assert all(len(reason.splitlines()) == 1 for reason in reasons)
    if runs:
        to_markdown(build_report(runs, 0.8), with_plots=False)
    for read in (RunModel.read, read_unfinished_run):
        with pytest.raises(ValueError) as refusal:  # noqa: PT011, any
            read(run_folder)
        assert len(str(refusal.value).splitlines()) == 1


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits({"initial_model_path": "/x", "experiment": EXPERIMENT, "resumed": []}))
def test_a_config_json_is_a_run_or_a_line(run_folder: Path, content: Any) -> None:
    (run_folder / "config.json").write_text(json.dumps(content))
    try:
        RecordedRun.read(run_folder).experiment()
    except ValueError as error:
        assert_one_line(error, "config.json")
