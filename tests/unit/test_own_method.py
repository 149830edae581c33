"""A user's own method: one flag names it, and its settings are flags, as those of this project's methods are."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import TINY

import utils
from launch.commands import to_argv
from launch.parser import build_parser, default_words
from launch.settings import Server, SingleProcess
from perfedavg import own_module
from perfedavg.engine.experiment import ExperimentState
from perfedavg.fields import flags_by_name
from perfedavg.methods import METHODS
from perfedavg.recording.checkpoint import Checkpoints, RunIdentity
from perfedavg.recording.client_states import StateFiles
from perfedavg.recording.runs import RecordedRun
from perfedavg.settings import ExperimentConfig

CODE = """
from dataclasses import dataclass
from perfedavg.fields import setting
from perfedavg.methods import FedAvg

@dataclass(frozen=True)
class Pull(FedAvg):
    mu: float = setting(0.5, "how strongly it pulls", at_least=0.1)
    ways: int = setting(3, "ways to go", at_least=1)

@dataclass(frozen=True)
class Further(Pull):
    pass

@dataclass(frozen=True)
class Taken(FedAvg):
    run_dir: float = setting(0.5, "", at_least=0)

@dataclass(frozen=True)
class Older(FedAvg):
    struct: float = setting(0.5, "", at_least=0)

@dataclass(frozen=True)
class Text(FedAvg):
    mu: str = setting("a", "")

class Plain(FedAvg):
    mu: float = setting(0.5, "")

@dataclass(frozen=True)
class NoSetting(FedAvg):
    mu: float = 0.5

@dataclass(frozen=True)
class NoDefault(FedAvg):
    mu: float = setting(__import__("dataclasses").MISSING, "")

from perfedavg.methods import Method
class Lazy(Method): pass
not_a_class = FedAvg()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, in which the user's module lies. It and what was named is forgotten after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(own_module, "_sources", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_methods.py").write_text(CODE)
    yield tmp_path
    METHODS.forget_own()
    sys.modules.pop("my_methods", None)


def config(*argv: str) -> ExperimentConfig:
    experiment: ExperimentConfig = utils.get_args("single", [*TINY, *argv]).experiment
    return experiment


def test_its_settings_are_flags_in_both_phases() -> None:
    named = config("--method", "my_methods:Pull", "--mu", "0.7", "--fine_tune_method=my_methods:Pull")
    assert named.fedavg.method.name == "my_methods:Pull"
    assert dataclasses.asdict(named.fedavg.method) == {"mu": 0.7, "ways": 3}
    assert named.fine_tune is not None
    assert dataclasses.asdict(named.fine_tune.method) == {"mu": 0.5, "ways": 3}
    assert ExperimentConfig.from_dict(json.loads(json.dumps(named.to_dict()))) == named
    server = utils.get_args("server", to_argv(utils.get_args("single", [*TINY, "--method", "my_methods:Pull"]), Server))
    assert server.experiment.fedavg.method == config("--method", "my_methods:Pull").fedavg.method


def test_a_file_may_name_it(folder: Path) -> None:
    (folder / "a.toml").write_text('method = "my_methods:Pull"\nmu = 0.7\n')
    assert config("--config", "a.toml", "--ways", "4") == config(
        *("--method", "my_methods:Pull", "--mu", "0.7", "--ways", "4")
    )


def test_methods_with_a_setting_of_one_name_keep_their_own_default_and_bounds() -> None:
    """Or the one that was imported last would change the others."""
    before = config("--method", "fedprox")
    config("--method", "my_methods:Pull")
    assert config("--method", "fedprox") == before
    assert config("--method", "fedprox", "--mu", "0.05").fedavg.method == type(before.fedavg.method)(mu=0.05)
    with pytest.raises(ValueError, match=r"^--mu 0\.05 must be a number 0\.1 or more$"):
        config("--method", "my_methods:Pull", "--mu", "0.05")


def test_help_shows_its_flags_once_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ways" not in build_parser(SingleProcess).format_help()
    with pytest.raises(SystemExit):
        config("--method", "my_methods:Pull", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--fine_tune_ways N my_methods:Pull: ways to go (default: 3)" in shown
    mu = flags_by_name(SingleProcess)["mu"]
    assert default_words(mu) == "(default: 0.01 for fedprox; 0.5 for my_methods:Pull)"
    assert mu.help.endswith("(fedprox); how strongly it pulls (my_methods:Pull)")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Taken", "cannot give its setting run_dir the flag --run_dir, which is another one's; rename it"),
        ("Older", "cannot give its setting struct the flag --struct, which is another one's; rename it"),
        ("Text", "my_methods:Text has a setting mu as fedprox has, of another type; rename it"),
        ("Plain", "its class is no dataclass, and so mu no setting; write @dataclass(frozen=True) above it"),
        ("NoSetting", "its field mu is no setting; write mu = perfedavg.fields.setting(default, help)"),
        ("NoDefault", "its setting mu has no default; give it one"),
        ("Lazy", "it has no update; write one"),
        ("not_a_class", "has no not_a_class that is a subclass of perfedavg.methods.base.Method"),
        ("FedAvg", "this is fedavg; name it so"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(name: str, reason: str) -> None:
    for flag in ("--method", "--fine_tune_method"):
        with pytest.raises(ValueError, match=r"^--method my_methods") as refused:
            config(flag, f"my_methods:{name}")
        assert reason in str(refused.value)
        assert "\n" not in str(refused.value)
    assert set(METHODS) == METHODS.built_in, "it must not stay in the way of the next one"
    config("--method", "fedprox")


def test_a_run_can_be_read_without_its_code(folder: Path) -> None:
    """A report imports nothing: the settings are those that were recorded."""
    settled = dataclasses.replace(config("--method", "my_methods:Pull", "--mu", "0.7"), client_batching=1)
    content = {"experiment": settled.to_dict()}
    (folder / "config.json").write_text(json.dumps(content))
    METHODS.forget_own()
    del sys.modules["my_methods"]
    (folder / "my_methods.py").unlink()
    run = RecordedRun.read(folder)
    assert json.dumps(run.experiment(ignore_unknown=True).to_dict()) == json.dumps(settled.to_dict())
    with pytest.raises(ValueError, match=r"^--method my_methods:Pull cannot be imported"):
        run.experiment()


def test_code_that_was_changed_before_a_resumption_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settled = dataclasses.replace(config("--method", "my_methods:Pull"), client_batching=1)
    checkpoints = Checkpoints(
        folder / "checkpoint", RunIdentity(settled, "data", {}), StateFiles(folder / "client_states")
    )
    checkpoints.save(ExperimentState.fresh(settled, torch.zeros(2)))
    checkpoints.load()
    assert "has changed" not in capsys.readouterr().err
    own_module._sources["my_methods"] = "0" * 64
    checkpoints.load()
    assert (
        "the code of my_methods has changed since the run was begun: its result may differ" in capsys.readouterr().err
    )
