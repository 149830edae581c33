"""Settings are searched on validation clients: the same trials again, whatever ended a search in between."""

from __future__ import annotations

import math
import shlex
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import ENDS_WITHIN_SECONDS, Launched, finish

import perfedavg
import utils
from datasets.clients.views import ValidationView
from experiments import rows
from launch.flags import parse
from launch.settings import SingleProcess
from perfedavg.contracts import ClientData
from perfedavg.methods import METHODS
from perfedavg.plain_values import parse_toml
from perfedavg.settings import ExperimentConfig, Phase
from tune import Tune, read_experiments, search_command, search_rows
from tuning.chosen import read_chosen, write_chosen
from tuning.search import Choice, Plan, search
from tuning.space import default_texts, read_space, with_effect
from tuning.study import NUM_UNPRUNED_TRIALS, Study
from tuning.trial import DivergedError, Objective, OnPoint, Trials, num_rounds, trial_words

TINY = ["--dataset", "digits", "--model", "mlp", "--client_num_in_total", "20", "--client_num_per_round", "4"]
TINY += ["--rounds", "4", "--local_epochs", "1", "--personalization_epochs", "1", "--fine_tune_method", "none"]
TINY += ["--threads", "1", "--unseen_fraction", "0.2", "--local_test_fraction", "0.2"]
BEST_RATE = 0.1


def experiment(*words: str) -> ExperimentConfig:
    config: ExperimentConfig = parse(SingleProcess, [*TINY, *words]).experiment
    return config


def plan(folder: Path, *words: str, searches: Sequence[str] = ("local_lr=0.001..1:log",), **changes: Any) -> Plan:
    made = Plan("digits", [*TINY, *words], (), searches, None, 6, None, 4, 100, folder)
    return replace(made, **changes)


def planted(rate: float) -> float:
    """The best rate is known, and its value is 1."""
    return 1 - abs(math.log10(rate / BEST_RATE)) / 3


class Planted(Trials):
    """Trials whose accuracy is a function of the client's rate, reached in equal parts at the points of the curve.

    tried: rates, in order.  fault: is told of the number of the trial, and of the point that comes next.
    """

    def __init__(
        self,
        value: Callable[[float], float] = planted,
        fault: Callable[[int, int], None] = lambda trial, point: None,
    ) -> None:
        super().__init__()
        self.tried: list[float] = []
        self._value = value
        self._fault = fault

    def run(self, args: Any, states: Path, on_point: OnPoint) -> dict[str, Any]:
        rate = args.experiment.fedavg.client_optimizer.learning_rate
        self.tried.append(rate)
        for number in (1, 2, 3, 4):
            self._fault(len(self.tried), number)
            on_point(number, self._summary(self._value(rate) * number / 4))
        return self._summary(self._value(rate))

    def _summary(self, accuracy: float) -> dict[str, Any]:
        return {"personalized": {"accuracy": accuracy, "loss": 1 - accuracy}}


def chosen(of: Plan, trials: Trials) -> Choice:
    choice = search(of, trials)
    assert choice is not None
    return choice


def test_a_search_finds_what_is_planted_and_compares_it_with_what_there_was(tmp_path: Path) -> None:
    trials = Planted()
    choice = chosen(plan(tmp_path, num_trials=20), trials)
    assert trials.tried[0] == 0.02, "the first trial is the experiment as it is"
    rate = float(choice.settings["local_lr"])
    assert rate == max(trials.tried, key=planted)
    assert BEST_RATE / 1.5 < rate < BEST_RATE * 1.5
    summary = choice.summary
    assert summary["default"] == {"local_lr": "0.02"}
    assert summary["default_value"] == pytest.approx(planted(0.02))
    assert summary["best_value"] == pytest.approx(planted(rate))
    assert summary["space"] == {"local_lr": "0.001..1:log"}
    assert summary["trials"] == 20 == summary["complete"] + summary["pruned"] + summary["failed"]
    assert (summary["rounds_per_trial"], summary["seed"]) == (4, 100)


def test_the_experiment_as_it_is_wins_a_tie(tmp_path: Path) -> None:
    choice = chosen(plan(tmp_path), Planted(value=lambda rate: 0.5))
    assert choice.settings == {"local_lr": "0.02"}
    assert choice.summary["best_trial"] == 1


def test_a_search_that_was_interrupted_tries_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    """In the middle of a trial, which is repeated: were it counted, all that follow would be others."""
    undisturbed = Planted()
    expected = chosen(plan(tmp_path / "undisturbed", num_trials=11), undisturbed)

    def interrupt(trial: int, point: int) -> None:
        if (trial, point) in ((4, 1), (11, 3)):
            raise KeyboardInterrupt

    interrupted = Planted(fault=interrupt)
    for num_tried in (4, 11):
        with pytest.raises(KeyboardInterrupt):
            search(plan(tmp_path / "interrupted", num_trials=11), interrupted)
        assert len(interrupted.tried) == num_tried
    assert chosen(plan(tmp_path / "interrupted", num_trials=11), interrupted) == expected
    rates = undisturbed.tried
    assert interrupted.tried == [*rates[:4], *rates[3:10], *rates[9:]]


def test_a_search_goes_on_to_more_trials_and_repeats_none_that_ended(tmp_path: Path) -> None:
    at_once, later = Planted(), Planted()
    expected = chosen(plan(tmp_path / "at once", num_trials=11), at_once)
    first = chosen(plan(tmp_path / "later", num_trials=9), later)
    assert chosen(plan(tmp_path / "later", num_trials=11), later) == expected
    assert later.tried == at_once.tried
    assert chosen(plan(tmp_path / "later", num_trials=9), later) == first, "of the first nine"
    assert later.tried == at_once.tried


def test_what_is_worse_at_the_same_round_is_given_up_but_never_the_experiment_as_it_is(tmp_path: Path) -> None:
    """The values fall from trial to trial, so that each is worse than all before it."""
    falling = iter(range(100, 0, -1))
    values: dict[float, float] = {}
    trials = Planted(value=lambda rate: values.setdefault(rate, next(falling) / 100))
    summary = chosen(plan(tmp_path), trials).summary
    assert (summary["complete"], summary["pruned"]) == (NUM_UNPRUNED_TRIALS, 6 - NUM_UNPRUNED_TRIALS)
    assert summary["best_trial"] == 1
    rising = Planted(value=lambda rate: len(rising.tried) / 100)
    assert chosen(plan(tmp_path / "rising"), rising).summary["complete"] == 6


def test_a_trial_that_cannot_come_to_anything_ends_no_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = {2: DivergedError("every update of round 1 was refused"), 5: ValueError("--mu 9 is too much")}

    def fail(trial: int, point: int) -> None:
        if trial in reasons:
            raise reasons[trial]

    trials = Planted(fault=fail, value=lambda rate: math.nan if len(trials.tried) == 3 else planted(rate))
    choice = chosen(plan(tmp_path), trials)
    assert choice.summary["failed"] == 3
    assert choice.summary["trials"] == 6
    said = capsys.readouterr().out
    for reason in ("failed: every update of round 1 was refused", "failed: --mu 9 is too much", "is no finite number"):
        assert reason in said


def test_an_experiment_that_cannot_be_run_as_it_is_is_an_error(tmp_path: Path) -> None:
    def fail(trial: int, point: int) -> None:
        raise ValueError("--threads 9 is too much")

    with pytest.raises(ValueError, match="--threads 9"):
        search(plan(tmp_path), Planted(fault=fail))


def test_two_searchers_share_a_study_and_repeat_what_a_dead_one_left(tmp_path: Path) -> None:
    dimensions = read_space(["local_lr=0.001..1:log"], experiment())

    def searcher() -> Study:
        return Study(tmp_path, dimensions, experiment(), {}, 100, True, 0)

    first, second, third = searcher(), searcher(), searcher()
    trials = [study.begin(4) for study in (first, second, third)]
    assert [trial and trial.place for trial in trials] == [0, 1, 2]
    assert trials[0] is not None
    assert trials[1] is not None
    trials[0].complete(0.5)
    second.close()
    repeated = first.begin(4)
    assert repeated is not None
    assert (repeated.place, repeated.settings) == (1, trials[1].settings)
    repeated.complete(0.5)
    last = first.begin(4)
    assert last is not None
    assert last.place == 3
    last.complete(0.5)
    assert first.begin(4) is None, "the third still works on its own"
    assert [ended.place for ended in first.ended(4)] == [0, 1, 3]
    assert first.states_folder != third.states_folder


def test_two_searches_side_by_side_come_to_one_choice(tmp_path: Path) -> None:
    """The one that ends first may have nothing to choose from yet."""
    barrier = threading.Barrier(2, timeout=ENDS_WITHIN_SECONDS)
    choices: list[Choice | None] = []

    def take_part() -> None:
        trials = Planted(fault=lambda trial, point: barrier.wait() if (trial, point) == (1, 1) else None)
        choices.append(search(plan(tmp_path, num_trials=6), trials))

    threads = [threading.Thread(target=take_part) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(choices) == 2
    told = [choice for choice in choices if choice is not None]
    assert told
    assert told == [told[0]] * len(told)
    assert told[0].summary["trials"] == 6


def test_a_study_of_another_search_is_refused(tmp_path: Path) -> None:
    search(plan(tmp_path, num_trials=1), Planted())
    others = {
        "search.local_lr is 0.001..2:log, was 0.001..1:log": plan(tmp_path, searches=["local_lr=0.001..2:log"]),
        "fedavg.num_rounds is 5, was 4": plan(tmp_path, "--rounds", "5", num_points=5),
        "seed is 101, was 100": plan(tmp_path, seed=101),
        "objective is initial_accuracy": plan(tmp_path, objective="initial_accuracy"),
    }
    for reason, other in others.items():
        with pytest.raises(ValueError, match=f"--studies .* holds another search: .*{reason}.*move it away"):
            search(other, Planted())


def test_a_damaged_study_is_told_from_a_bug(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"no database, but long enough to be taken for one" * 9)
    with pytest.raises(ValueError, match=r"study\.db is damaged .*move that folder away"):
        search(plan(tmp_path), Planted())


class Spy:
    """A data set that remembers whose examples were asked for."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.asked: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def client_data(self, client_id: int) -> ClientData:
        self.asked.add(client_id)
        data: ClientData = self._dataset.client_data(client_id)
        return data


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_a_search_trains_as_a_run_does_and_leaves_the_unseen_clients_alone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ditto's clients keep models between rounds."""
    spies: list[Spy] = []

    def load(config: Any, data_root: Path, may_download: bool) -> Any:
        spies.append(Spy(load_clients(config, data_root, may_download)))
        return spies[-1]

    load_clients = utils.load_clients
    monkeypatch.setattr(utils, "load_clients", load)
    choice = chosen(plan(tmp_path / "study", "--method", method, num_trials=2), Trials())
    assert len(spies) == 1, "the data are read once"
    (spy,) = spies
    assert len(spy.unseen_client_ids) == 4
    validation = ValidationView(spy, choice.summary["validation_clients"])
    assert spy.asked >= set(validation.unseen_client_ids)
    assert not spy.asked & set(spy.unseen_client_ids)
    monkeypatch.undo()
    values = dict(zip([word[2:] for word in TINY[::2]], TINY[1::2], strict=True))
    run = perfedavg.run(**values, method=method, validation=True, seed=100, run_dir=tmp_path / "run")
    assert choice.summary["default_value"] == run.result["after_fedavg"]["personalized"]["accuracy"]
    assert not list((tmp_path / "study").glob("*states")), "what clients kept is gone"


def test_the_default_space_is_the_clients_rate_and_what_the_method_has() -> None:
    spaces = {name: read_space((), experiment("--method", name)) for name in METHODS.built_in}
    names = {method: [each.name for each in space] for method, space in spaces.items()}
    assert names["fedavg"] == names["fedper"] == ["local_lr"]
    assert names["fedprox"] == ["local_lr", "mu"]
    assert names["pfedme"] == ["local_lr", "pfedme_lambda", "pfedme_eta", "pfedme_beta"]
    assert {name for space in names.values() for name in space} >= {"ditto_lambda", "apfl_alpha", "head_epochs"}
    for space in spaces.values():
        for each in space:
            assert each.default_value is not None, f"{each.name} is outside of its range of interest"
    (rate,) = spaces["fedavg"]
    assert rate.text == "0.002..0.2:log"
    (rate,) = read_space((), experiment("--local_lr", "0.8"))
    assert rate.text == "0.08..8:log", "where the rate is another one, so is the range"
    two_phases = read_space((), experiment("--fine_tune_method", "fomaml"))
    assert [each.name for each in two_phases] == ["local_lr", "fine_tune_local_lr", "fine_tune_support_fraction"]
    assert [each.name for each in read_space((), experiment("--method", "fedprox"), ["mu"])] == ["local_lr"]


def test_a_space_is_read_and_written_in_the_same_words() -> None:
    texts = ["local_lr=0.005..0.2:log", "mu=0..1", "batch_size=5..50", "server_optimizer=sgd,momentum"]
    space = read_space(texts, experiment("--method", "fedprox"))
    assert [f"{each.name}={each.text}" for each in space] == texts
    assert [each.value_text(each.distribution().high) for each in space[:3]] == ["0.2", "1", "50"]  # type: ignore[attr-defined]
    assert space[0].value_text(0.0123456) == "0.0123"
    assert [each.default_value for each in space] == [0.02, 0.01, 20, "momentum"]
    (multiple,) = read_space(["batch_size=0.5x..2x"], experiment())
    assert multiple.text == "10..40"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("local_lr", "must be NAME=LOW..HIGH"),
        ("local_rate=1..2", "local_rate is unknown; use local_lr"),
        ("mu=0.1..1", "mu has no effect with --method fedavg; leave it out"),
        ("fine_tune_local_lr=0.1..1", "fine_tune_local_lr has no effect with --fine_tune_method none; leave it out"),
        ("local_lr=0.2..0.1", "0.2 is not below 0.1"),
        ("local_lr=0.1..0.1", "0.1 is not below 0.1"),
        ("local_lr=0..1:log", "0 must be a number above 0"),
        ("unseen_fraction=0.1..0.2", "its values are no numbers"),
        ("server_momentum=0..1", "1 must be a number 0 or more and below 1"),
        ("server_momentum=0..0.9:log", "0 has no logarithm"),
        ("batch_size=1.5..3", "1.5 is no whole number"),
        ("local_steps=1x..2x", "local_steps has no value to multiply"),
        ("local_lr=fast..slow", "fast is no number"),
        ("server_optimizer=sgd", "there is only one value"),
        ("server_optimizer=sgd,adamw", "adamw is unknown"),
        ("seed=1..5", "the search itself sets seed"),
    ],
)
def test_a_space_that_cannot_be_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"--search .*{reason}"):
        read_space([text], experiment())


@pytest.mark.parametrize("present", ["momentum", "sgd"])
def test_a_setting_is_tried_where_it_has_an_effect(present: str, tmp_path: Path) -> None:
    """With an optimizer without momentum none is told, which would be refused; nor is any chosen with it."""
    space = ("server_optimizer=sgd,momentum", "server_momentum=0.5..0.95")
    searched = plan(tmp_path, "--server_optimizer", present, searches=space, num_trials=8)
    choice = chosen(searched, Planted(value=lambda rate: 0.5))
    assert choice.summary["failed"] == 0
    assert ("server_momentum" in choice.settings) == (present == "momentum")
    with_momentum, without = ({**choice.settings, "server_optimizer": name} for name in ("momentum", "sgd"))
    with_momentum["server_momentum"] = without["server_momentum"] = "0.7"
    config = experiment("--server_optimizer", present)
    assert with_effect(with_momentum, config) == with_momentum
    assert with_effect(without, config) == {"server_optimizer": "sgd"}


def test_a_setting_is_searched_once() -> None:
    with pytest.raises(ValueError, match="mu is searched twice"):
        read_space(["mu=0..1", "--mu=0..2"], experiment("--method", "fedprox"))


def test_what_counts_is_named_with_its_population() -> None:
    config = experiment("--metrics", "macro_f1")
    dataset = utils.get_datasets(config, Path("."))
    read = Objective.read
    assert read(None, config, dataset) == Objective("personalized", "accuracy", True)
    assert read("initial_loss", config, dataset) == Objective("initial", "loss", False)
    assert read("personalized_macro_f1_p10", config, dataset) == Objective("personalized", "macro_f1_p10", True)
    with pytest.raises(ValueError, match="--objective accuracy is unknown; use one of personalized_loss"):
        read("accuracy", config, dataset)
    sine = parse(SingleProcess, ["--dataset", "sine", "--client_num_in_total", "51"]).experiment
    tasks = utils.get_datasets(sine, Path("."))
    assert read(None, sine, tasks) == Objective("personalized", "loss", False)
    with pytest.raises(ValueError, match="personalized_accuracy is unknown"):
        read("personalized_accuracy", sine, tasks)


def test_phases_are_shortened_in_proportion() -> None:
    words = [*TINY, "--rounds", "50", "--fine_tune_method", "reptile", "--fine_tune_rounds", "10"]

    def trial(trial_rounds: int | None) -> ExperimentConfig:
        config: ExperimentConfig = parse(SingleProcess, trial_words(words, 100, trial_rounds, 5)).experiment
        return config

    assert num_rounds(trial(None)) == num_rounds(trial(99)) == {Phase.FEDAVG: 50, Phase.FINE_TUNE: 10}
    assert num_rounds(trial(30)) == {Phase.FEDAVG: 25, Phase.FINE_TUNE: 5}
    assert (trial(30).eval_every, trial(30).seed, trial(30).validation) == (6, 100, True)
    no_rounds = trial_words([*TINY, "--rounds", "0"], 100, 30, 5)
    assert num_rounds(parse(SingleProcess, no_rounds).experiment) == {Phase.FEDAVG: 0}


def test_what_is_chosen_becomes_part_of_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHOSEN", tmp_path)
    before = rows.select_rows("fashion_dirichlet")
    study = {"trials": 3, "space": {"ditto_lambda": "0.05..2:log"}, "best_value": 0.5, "command": 'say "so"'}
    path = write_chosen(tmp_path, "fashion_dirichlet", "ditto", {"ditto_lambda": "0.75", "local_lr": "0.004"}, study)
    once = path.read_bytes()
    write_chosen(tmp_path, "fashion_dirichlet", "apfl", {"apfl_alpha": "1", "apfl_adaptive": "true"}, {"trials": 3})
    after = rows.select_rows("fashion_dirichlet")
    assert after["ditto"] == {**before["ditto"], "ditto_lambda": "0.75", "local_lr": "0.004"}
    assert after["apfl"] == {**before["apfl"], "apfl_alpha": "1", "apfl_adaptive": "true"}
    assert rows.select_rows("fashion_dirichlet", with_chosen=False) == before
    assert {name: flags for name, flags in after.items() if name not in ("ditto", "apfl")} == {
        name: flags for name, flags in before.items() if name not in ("ditto", "apfl")
    }
    content = parse_toml(path.read_text())
    assert content["studies"]["ditto"] == study
    assert list(content["rows"]) == ["apfl", "ditto"]
    write_chosen(tmp_path, "fashion_dirichlet", "apfl", {"apfl_alpha": "1", "apfl_adaptive": "true"}, {"trials": 3})
    assert path.read_bytes().startswith(once.splitlines()[0])
    assert read_chosen(path)[0]["ditto"] == {"ditto_lambda": 0.75, "local_lr": 0.004}
    path.write_text("[rows")
    with pytest.raises(ValueError, match=r"fashion_dirichlet\.toml is damaged"):
        write_chosen(tmp_path, "fashion_dirichlet", "ditto", {}, {})


def test_rows_chosen_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    names = [f"row {number}" for number in range(8)]
    threads = [
        threading.Thread(target=write_chosen, args=(tmp_path, "table", name, {"mu": "0.5"}, {"trials": 1}))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chosen_rows, studies = read_chosen(tmp_path / "table.toml")
    assert chosen_rows == {name: {"mu": 0.5} for name in names}
    assert list(studies) == names
    assert [path.name for path in tmp_path.iterdir()] == ["table.toml"]


def read(*words: str) -> tuple[Tune, list[str]]:
    others: list[str] = []
    return parse(Tune, words, others), others


def test_an_experiment_or_the_rows_of_a_table_are_searched() -> None:
    args, others = read("--trials", "3", "--method", "fedprox", "--search", "mu=0..1", "--search", "local_lr=1..2")
    assert args.search == ("mu=0..1", "local_lr=1..2")
    assert read_experiments(args, [*others, "--dataset", "digits"]) == {
        "digits-fedprox-reptile": ["--method", "fedprox", "--dataset", "digits"]
    }
    args, others = read("--table", "fashion_dirichlet", "--rows", "ditto", "apfl", "--threads", "1", "--rounds", "7")
    experiments = read_experiments(args, others)
    assert list(experiments) == ["ditto", "apfl"]
    config = parse(SingleProcess, experiments["ditto"]).experiment
    assert (config.dataset, config.fedavg.method.name, config.fedavg.num_rounds) == ("fashion_mnist", "ditto", 7)
    assert search_command(replace(args, rows=("ditto",)), others) == (
        "python tune.py --table fashion_dirichlet --rows ditto --rounds 7"
    )


@pytest.mark.parametrize("table", sorted(path.stem for path in rows.CHOSEN.glob("*.toml")))
def test_the_committed_choices_are_those_of_the_rows(table: str) -> None:
    """A row that changed after its search would have settings chosen for another one, from a command that repeats
    nothing; and with unequal budgets rows could not be compared.
    """
    chosen_rows, studies = read_chosen(rows.CHOSEN / f"{table}.toml")
    with_chosen = rows.select_rows(table)
    assert list(chosen_rows) == list(studies) == sorted(with_chosen)
    budgets = set()
    for row, study in studies.items():
        program, script, *words = shlex.split(study["command"])
        args, others = read(*words)
        assert (program, script, args.table, args.rows) == ("python", "tune.py", table, (row,))
        budgets.add((args.trials, args.trial_rounds, args.points, args.seed))
        words = trial_words(read_experiments(args, others)[row], args.seed, args.trial_rounds, args.points)
        config = parse(SingleProcess, words).experiment
        space = read_space(args.search, config, rows.fixed_settings(table, row))
        assert study["space"] == {each.name: each.text for each in space}
        assert study["default"] == default_texts({each.name: each.default for each in space})
        assert study["rounds_by_phase"] == {phase.field: number for phase, number in num_rounds(config).items()}
        assert study["rounds_per_trial"] == sum(study["rounds_by_phase"].values())
        assert (study["trials"], study["points_per_trial"], study["seed"]) == (args.trials, args.points, args.seed)
        assert study["trials"] == study["complete"] + study["pruned"] + study["failed"]
        assert study["best_value"] >= study.get("default_value", 0), "none where the row as it is diverged"
        assert list(chosen_rows[row]) == list(study["space"])
        for each in space:
            value = chosen_rows[row][each.name]
            assert value in each.choices if each.choices else each.low <= value <= each.high
        is_as_it_was = {name: with_chosen[row][name] for name in study["default"]} == study["default"]
        assert is_as_it_was == (study["best_trial"] == 1)
    assert len(budgets) == 1


def test_a_row_that_cannot_be_searched_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FedAvg has no mu; what was chosen for FedProx must not be lost with it."""
    monkeypatch.setattr("tuning.trial.Trials", Planted)
    args, others = read("--table", "fashion_dirichlet", "--rows", "fedavg", "fedprox", "--search", "mu=0.1..1")
    args = replace(args, trials=2, studies=tmp_path / "studies", chosen=tmp_path)
    words = [*TINY, "--method"]
    with pytest.raises(ValueError, match="nothing was chosen for fedavg, "):
        search_rows(args, {name: [*words, name] for name in ("fedavg", "fedprox")}, others)
    assert (
        "fashion_dirichlet fedavg: --search mu=0.1..1: mu has no effect with --method fedavg" in capsys.readouterr().err
    )
    assert list(read_chosen(tmp_path / "fashion_dirichlet.toml")[0]) == ["fedprox"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rows", "ditto"], "--rows ditto needs --table"),
        (["--table", "mnist", "--dataset", "mnist"], "--dataset mnist does not go with --table"),
        (["--table", "mnist", "--rows", "E3-C3"], "--rows E3-C3 is none of mnist's"),
        (["--validation", "false"], "--validation false is nothing to give here"),
        (["--run_dir", "here"], "--run_dir here is nothing to give here"),
        (["--local_rate", "1"], "--local_rate is unknown; use --local_lr"),
        (["--trials", "0"], "--trials 0 must be a whole number from 1"),
    ],
)
def test_a_command_that_cannot_be_is_refused_with_the_fix(words: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_experiments(*read(*words))


def test_the_command_searches_rows_and_goes_on_where_it_was(tmp_path: Path, launched: Launched) -> None:
    words = ["tune.py", "--table", "sine", "--rows", "reptile", "--trials", "2", "--trial_rounds", "2", "--points", "1"]
    words += ["--client_num_in_total", "102", "--personalization_epochs", "1", "--threads", "1", "--device", "cpu"]
    folders = ["--studies", tmp_path / "studies", "--chosen", tmp_path]
    status, output, errors = finish(launched.start(*words, *folders))
    assert (status, errors) == (0, "")
    assert "[1/2] as it is: " in output
    written = (tmp_path / "sine.toml").read_bytes()
    content = parse_toml(written.decode())
    assert list(content["rows"]) == ["reptile"]
    command, space = content["studies"]["reptile"]["command"], content["studies"]["reptile"]["space"]
    assert space
    assert f"--search {' '.join(f'{name}={text}' for name, text in space.items())} --table" in command
    status, output, errors = finish(launched.start(*words, *folders))
    assert (status, errors) == (0, "")
    assert "2 are done" in output
    assert "as it is: " not in output
    assert (tmp_path / "sine.toml").read_bytes() == written
