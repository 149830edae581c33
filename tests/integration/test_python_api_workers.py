"""Experiments from Python with workers: processes that end when they are no longer wanted, and the same results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import ROOT

import perfedavg
from perfedavg import own_module
from perfedavg.methods import METHODS

TINY = {"model": "mlp", "client_num_in_total": 10, "client_num_per_round": 2, "rounds": 100, "local_epochs": 1}
TINY |= {"fine_tune_method": "none", "personalization_epochs": 1, "eval_every": 50, "checkpoint_every": 5}

SCRIPT = """
import itertools, os, signal, sys, time
import psutil
sys.path.insert(0, {root!r})
from dataclasses import dataclass
import perfedavg
from perfedavg.fields import setting
from perfedavg.methods import FedAvg

calls = itertools.count(1)

@dataclass(frozen=True)
class Mine(FedAvg):
    strength: float = setting(0.5, "how strongly it pulls", at_least=0)

    def penalty(self, start):
        while next(calls) > 30 and os.path.exists({hold!r}):
            time.sleep(0.01)
        return lambda parameters: self.strength * (parameters - start)

if __name__ == "__main__":
    for record in perfedavg.rounds(workers=2, method=Mine(0.01), run_dir="here", **{tiny!r}):
        if record.round_number == 7:
            print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
"""
"""Whose workers train no more than 30 clients each while a file is there, so that no run of it ends before its time."""


@pytest.fixture(autouse=True)
def forget_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The script's method, which a run that goes on imports into this process."""
    monkeypatch.setattr(own_module, "_sources", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_script", None)
    METHODS.forget_own()


@pytest.mark.slow
def test_workers_give_the_same_and_go_on_with_what_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's own method is imported by its workers; its death by SIGKILL stops the run, with a checkpoint."""
    monkeypatch.chdir(tmp_path)
    hold = tmp_path / "hold"
    hold.touch()
    (tmp_path / "own_script.py").write_text(SCRIPT.format(root=str(ROOT), tiny=TINY, hold=str(hold)))
    with subprocess.Popen([sys.executable, "own_script.py"], stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 4
    children = [one for one in psutil.process_iter() if one.pid in pids]
    assert not psutil.wait_procs(children, timeout=60)[1]
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    with perfedavg.rounds(resume="here", workers=1) as rounds:
        first = next(rounds)
        assert first.round_number > 6
        children = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
        assert len(children) == 3
        rounds.close()
        assert next(rounds, None) is None, "a loop over them ends here"
        assert not psutil.wait_procs(children, timeout=60)[1]
    hold.unlink()
    records = list(rounds := perfedavg.rounds(resume="here", workers=2))
    numbers = [record.round_number for record in records]
    assert numbers == list(range(numbers[0], 101))
    assert numbers[0] > first.round_number, "the run did not wait for the loop"
    expected = perfedavg.run(run_dir="there", method="fedprox", mu=0.01, threads=1, **TINY)
    assert rounds.result.model_sha256 == expected.model_sha256
    assert (tmp_path / "here" / "clients.csv").read_bytes() == (tmp_path / "there" / "clients.csv").read_bytes()


def test_why_it_failed_is_the_line_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no "):
        perfedavg.run(workers=1, dataset="folder", data_root=str(tmp_path), run_dir="here", client_num_per_round=1)
    assert not Path("here").exists()
