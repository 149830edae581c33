"""Experiments from Python, in one process: the same results as from the command line, as objects, round by round."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, digits_dataset
from torch import Tensor, nn

import perfedavg
import utils
from perfedavg import own_module
from perfedavg.fields import setting
from perfedavg.methods import METHODS, Ditto, FedAvg
from perfedavg.methods.fedprox import FedProx
from perfedavg.metrics import Metric

TINY: dict[str, Any] = {"model": "mlp", "client_num_in_total": 10, "client_num_per_round": 2, "rounds": 3}
TINY |= {"local_epochs": 1, "fine_tune_rounds": 1, "fine_tune_local_epochs": 1, "personalization_epochs": 1}
TINY |= {"eval_every": 2, "threads": 1, "unseen_fraction": 0.2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder. What a test brings of its own is forgotten after it."""
    monkeypatch.setattr(own_module, "_given", {})
    monkeypatch.setattr(own_module, "_sources", {})
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    METHODS.forget_own()


@dataclass(frozen=True)
class Pull(FedAvg):
    """FedProx by another name."""

    strength: float = setting(0.5, "how strongly it pulls", at_least=0)

    def penalty(self, start: Tensor) -> Any:
        return lambda parameters: self.strength * (parameters - start)


def test_a_run_is_the_command_lines_to_the_bit(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records: list[Any] = []
        run = perfedavg.run(run_dir="here", seed=3, on_round=records.append, **TINY)
    assert capfd.readouterr() == ("", ""), "nothing is printed unless it is asked for"
    settings = {**TINY, "dataset": "digits", "seed": 3, "run_dir": "there"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "single_process.py", *words]
    subprocess.run(command, check=True, capture_output=True)
    assert run.model_sha256 == perfedavg.open("there").model_sha256
    assert (folder / "here" / "clients.csv").read_bytes() == (folder / "there" / "clients.csv").read_bytes()
    assert [(record.phase.field, record.round_number) for record in records] == [
        *(("fedavg", number) for number in (1, 2, 3)),
        ("fine_tune", 1),
    ]


def test_what_came_of_it_are_objects() -> None:
    run = perfedavg.run(run_dir="here", **TINY)
    unseen = run.clients[run.clients.population == "unseen"]
    assert list(unseen.groupby("phase").size()) == [2, 2]
    means = unseen[unseen.phase == "fine_tune"].personalized_accuracy.mean()
    assert means == pytest.approx(run.result["after_fine_tune"]["personalized"]["accuracy"])
    assert list(run.rounds.round_number) == [1, 2, 3, 1]
    assert list(run.rounds.initial_accuracy.isna()) == [True, False, False, False]
    assert run.settings["dataset"] == "digits"
    with torch.no_grad():
        assert run.model(torch.zeros(4, 1, 28, 28)).shape == (4, 10)
    client = run.clients[run.clients.phase == "fine_tune"].iloc[0]
    data = utils.get_datasets(utils.get_args("single", ["--config", "here/config.json"]).experiment, Path("."))
    examples = data.client_data(client.client_id)
    with torch.no_grad():
        right = run.client_model(client.client_id)(examples.test_inputs).argmax(1) == examples.test_labels
    assert float(right.float().mean()) == pytest.approx(client.personalized_accuracy)
    assert run.folder == Path("here").absolute()
    assert eval(repr(run)).model_sha256 == run.model_sha256


def test_torchs_settings_are_the_callers_between_rounds() -> None:
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    with perfedavg.rounds(run_dir="here", **TINY) as rounds:
        for _ in rounds:
            assert (torch.get_num_threads(), torch.get_deterministic_debug_mode()) == before
    assert (torch.get_num_threads(), torch.get_deterministic_debug_mode()) == before


@pytest.mark.parametrize("end", ["close", "break", "interrupt", "error"])
def test_a_loop_that_is_left_leaves_a_run_that_goes_on(end: str) -> None:
    expected = perfedavg.run(run_dir="expected", **TINY).model_sha256

    def leave() -> None:
        rounds = perfedavg.rounds(run_dir="here", **TINY)
        for record in rounds:
            if record.round_number == 2 and end == "close":
                rounds.close()
                assert next(rounds, None) is None
            if record.round_number == 2 and end == "break":
                break
            if record.round_number == 2 and end == "error":
                raise ZeroDivisionError

    if end == "interrupt":

        def interrupt(record: Any) -> None:
            if record.round_number == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            perfedavg.run(run_dir="here", on_round=interrupt, **TINY)
    elif end == "error":
        with pytest.raises(ZeroDivisionError):
            leave()
    else:
        leave()
    with pytest.raises(ValueError, match="holds a run that has not ended"):
        perfedavg.open("here")
    records = list(perfedavg.rounds(resume="here"))
    assert [record.round_number for record in records] == [3, 1]
    assert perfedavg.open("here").model_sha256 == expected


def test_an_interrupt_while_clients_train_leaves_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = perfedavg.run(run_dir="expected", method=Pull(), **TINY).model_sha256
    with perfedavg.rounds(run_dir="here", method=Pull(), **TINY) as rounds:
        next(rounds)
        with monkeypatch.context() as patched:
            patched.setattr(Pull, "penalty", lambda self, start: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                next(rounds)
    assert perfedavg.run(resume="here", method=Pull()).model_sha256 == expected


def test_nothing_is_left_of_a_run_that_never_began(folder: Path) -> None:
    perfedavg.rounds(run_dir="here", **TINY).close()
    with pytest.raises(ValueError, match=r"^--client_num_per_round 2 exceeds the 1 training clients"):
        perfedavg.run(run_dir="here", **{**TINY, "client_num_in_total": 2, "unseen_fraction": 0.5})
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"round": 3}, "--round is unknown; use --rounds"),
        ({"rounds": "many"}, "--rounds many must be a whole number from 0"),
        ({"rounds": -1}, "--rounds -1 must be a whole number from 0"),
        ({"model": nn.Linear(1, 1)}, "model is a Linear; give a function"),
        ({"rounds": print}, "rounds is a builtin_function_or_method; give a text or a number"),
        ({"resume": "nowhere"}, "--resume .*nowhere is not the folder of a run"),
        ({"method": "nowhere:Mine"}, "--method nowhere:Mine cannot be imported"),
    ],
)
def test_what_cannot_be_is_an_exception_with_the_commands_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        perfedavg.run(**settings)


def test_objects_stand_for_names() -> None:
    """An instance of a method brings its settings; what is not given follows the defaults."""
    proximal = perfedavg.run(run_dir="a", method=FedProx(mu=0.3), **TINY)
    assert proximal.settings["fedavg"]["method"] == {"name": "fedprox", "mu": 0.3}
    own = perfedavg.run(run_dir="b", method=Pull(strength=0.3), **TINY)
    assert own.settings["fedavg"]["method"] == {"name": f"{__name__}:Pull", "strength": 0.3}
    assert own.model_sha256 == proximal.model_sha256
    again = perfedavg.run(run_dir="c", method=Pull, fine_tune_method=Pull(0.1), strength=0.3, **TINY)
    assert again.settings["fine_tune"]["method"]["strength"] == 0.1
    assert json.loads((again.folder / "config.json").read_text())["environment"]["own_code"].keys() == {__name__}


def test_what_is_no_method_is_one_line(folder: Path) -> None:
    class Plain:
        pass

    for given in (Plain, Plain()):
        with pytest.raises(ValueError, match=r"it is no subclass of perfedavg\.methods\.base\.Method; make it one"):
            perfedavg.run(method=given, **TINY)
    assert not list(folder.iterdir())


def test_a_data_set_may_be_an_object() -> None:
    data = digits_dataset(10)
    tiny = {name: value for name, value in TINY.items() if name not in ("client_num_in_total", "client_num_per_round")}
    run = perfedavg.run(run_dir="a", dataset=data, client_num_per_round=2, **tiny)
    assert run.result["data_fingerprint"] == data.fingerprint


def test_a_class_that_is_written_anew_takes_the_place_of_the_old_one() -> None:
    """As in a notebook, whose cell is run again."""
    digests = []
    for factor in (0.0, 1.0):

        @dataclass(frozen=True)
        class Mine(FedAvg):
            def penalty(self, start: Tensor, factor: float = factor) -> Any:
                return lambda parameters: factor * (parameters - start)

        digests.append(perfedavg.run(run_dir=f"run{factor}", method=Mine, **TINY).model_sha256)
    assert digests[0] == perfedavg.run(run_dir="plain", **TINY).model_sha256 != digests[1]


def test_workers_cannot_be_given_what_they_cannot_import(folder: Path) -> None:
    @dataclass(frozen=True)
    class Mine(FedAvg):
        pass

    for given in ({"method": Mine}, {"dataset": digits_dataset(10)}):
        with pytest.raises(ValueError, match="is of this process alone, and workers cannot import it"):
            perfedavg.run(workers=2, **given)
    assert not list(folder.iterdir())


def test_a_module_that_begins_a_run_when_it_is_imported_is_refused(folder: Path, monkeypatch: Any) -> None:
    """A worker would begin one too, whose workers would begin one."""
    (folder / "own_script.py").write_text("import perfedavg\nclass Mine: pass\nperfedavg.run(workers=2)\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match=r"own_script\.py, line 3.*under if __name__ == '__main__'"):
        perfedavg.run(method="own_script:Mine")


def test_importing_takes_no_time() -> None:
    """Nothing is imported before it is used, also where only the library is."""
    code = (
        "import sys, perfedavg; print([name for name in ('torch', 'pandas', 'numpy', 'utils') if name in sys.modules])"
    )
    command = [sys.executable, "-c", f"{code}; perfedavg.run; print('torch' in sys.modules, 'pandas' in sys.modules)"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed.split("\n")[:2] == ["[]", "False False"]
    assert {"run", "rounds", "open"} <= set(dir(perfedavg))
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        perfedavg.train  # noqa: B018


def test_a_users_model_needs_no_name() -> None:
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(784, 10))

    run = perfedavg.run(run_dir="a", **{**TINY, "model": lambda input_shape, num_classes: Net()})
    assert sum(parameter.numel() for parameter in run.model.parameters()) == 7850


def test_a_metric_may_be_a_function() -> None:
    def half(outputs: Tensor, labels: Tensor) -> float:
        return 0.5

    def fifth(outputs: Tensor, labels: Tensor) -> float:
        return 0.2

    tiny = {name: value for name, value in TINY.items() if not name.startswith("fine_tune")}
    run = perfedavg.run(run_dir="a", metrics=["macro_f1", half, Metric(fifth)], method=Ditto(ditto_lambda=0.5), **tiny)
    assert run.settings["fedavg"]["method"]["ditto_lambda"] == 0.5
    assert set(run.clients.filter(like="half").to_numpy().ravel()) == {0.5}
    assert set(run.clients.filter(like="fifth").to_numpy().ravel()) == {0.2}
    assert {"initial_macro_f1", "personalized_macro_f1"} <= set(run.clients)
    assert set(run.clients.population) == {"unseen", "trained"}
