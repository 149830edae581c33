"""The check before a run: a line a subject, and each fault with the way out."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, free_port

from over_ssh import check
from over_ssh.check import (
    FAILS,
    LOOK,
    OK,
    PROBE,
    Line,
    Machine,
    _compare_clocks,
    _take_probe,
    look_here,
    look_there,
    make_lines,
    probe_argv,
)
from over_ssh.hosts_file import Host
from over_ssh.on_host.probe import probe
from over_ssh.ports import Reach, answering, explain, try_ports
from over_ssh.preparing import OF_ANY_VERSION, PACKAGES, Wanted
from over_ssh.session import HostError, Session
from over_ssh.tree import Tree
from perfedavg.training.compute import reproducible_kernels
from utils import get_args

ARGS = get_args("cluster", ["--dataset", "digits", "--check"])
FOUND: dict[str, Any] = {
    "cores": 8,
    "memory_gb": 12.3,
    "disk_gb": 40.0,
    "gpus": [],
    "device": "cpu",
    "kernels": [{"torch": "2.13.0", "MKL": "GenuineIntel AVX2"}],
    "server_kernels": {"torch": "2.13.0"},
    "data": "0123456789abcdef",
    "sources": {"my_net": "1"},
}


def machine(name: str, trains: bool = True, **changes: Any) -> Machine:
    """One whose look at itself gave FOUND, with changes."""
    found = Machine(name, facts={"project": "version 1"})
    _take_probe(found, {"status": 0, "output": json.dumps({**FOUND, **changes}), "last": ""}, ARGS, trains)
    return found


def lines(*machines: Machine) -> dict[str, Line]:
    here, *there = machines
    return {line.subject: line for line in make_lines(here, there)}


def test_machines_that_are_alike_are_named_together() -> None:
    found = lines(machine("this machine"), machine("beta"), machine("gamma", cores=4))
    assert {line.verdict for line in found.values()} == {OK}
    assert found["data"].said == ["all: digits, fingerprint 0123456789ab"]
    assert found["devices"].said == [
        "this machine, beta: 8 cores, GPUs: none; trains on cpu",
        "gamma: 4 cores, GPUs: none; trains on cpu",
    ]
    assert str(found["room"]) == "room      ok     all: 12 GB of memory and 40 GB of disk are free"
    assert len(str(found["devices"]).splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "subject", "verdict", "said"),
    [
        ({"data": "ffff"}, "data", FAILS, "beta: digits, fingerprint ffff, and here 0123456789ab; give both the same"),
        ({"data": "missing: mnist is not in /x"}, "data", LOOK, "beta: mnist is not in /x; a run downloads it, unless"),
        ({"data": "error: no files; get them"}, "data", FAILS, "beta: no files; get them"),
        ({"sources": {"my_net": "2"}}, "project", FAILS, "beta: the code of my_net is not this machine's; give both"),
        ({"device": "error: no GPU; use cpu", "kernels": "error: "}, "devices", FAILS, "beta: no GPU; use cpu"),
        ({"kernels": [{"MKL": "other"}]}, "kernels", LOOK, "beta: MKL is other, not GenuineIntel AVX2: the last bits"),
        ({"kernels": "error: it has no AVX2; leave it out"}, "kernels", FAILS, "beta: it has no AVX2; leave it out"),
        ({"memory_gb": 0.4}, "room", LOOK, "beta: that is little"),
    ],
)
def test_what_differs_or_is_missing_stands_in_its_line(
    changes: dict[str, Any], subject: str, verdict: str, said: str
) -> None:
    found = lines(machine("this machine"), machine("beta", **changes))
    assert found[subject].verdict == verdict
    assert found[subject].said[0].startswith(said)
    assert {line.verdict for name, line in found.items() if name != subject} == {OK}


@pytest.mark.parametrize("trains", [True, False])
def test_nccl_needs_a_gpu_for_each_process(trains: bool) -> None:
    for devices, subjects in (("cuda:0, cpu", {"devices"}), ("cuda:0, cuda:1", set())):
        found = Machine("beta")
        answer = {"status": 0, "output": json.dumps({**FOUND, "device": devices}), "last": ""}
        _take_probe(found, answer, replace(ARGS, backend="nccl"), trains)
        assert set(found.faults) == subjects


def test_a_machine_that_only_serves_needs_not_compute_as_those_that_train() -> None:
    """It steps and adds. Those that train are compared with each other."""
    here = machine("this machine", trains=False, kernels=[{"torch": "2.13.0", "MKL": "AuthenticAMD AVX2"}])
    found = lines(here, machine("beta"), machine("gamma"))
    assert (found["kernels"].verdict, found["kernels"].said) == (OK, ["all: torch 2.13.0, MKL GenuineIntel AVX2"])
    assert found["devices"].said == ["all: 8 cores, GPUs: none; trains on cpu"]
    other = machine("gamma", kernels=[{"MKL": "AuthenticAMD AVX2"}])
    said = lines(here, machine("beta"), other)["kernels"].said
    assert said[0].startswith("gamma: MKL is AuthenticAMD AVX2, not GenuineIntel AVX2")
    old = machine("this machine", trains=False, server_kernels={"torch": "1.0"})
    assert lines(old, machine("beta"))["kernels"].said[0].startswith("beta: torch is 2.13.0, not 1.0")


MY_METHOD = """
import torch
from perfedavg.methods.fedavg import FedAvg
class Mine(FedAvg):
    pass
"""


def test_a_host_looks_at_what_a_worker_is_told(tmp_path: Path) -> None:
    """Portable kernels have to be known before torch is loaded, also where a user's own method loads it, or the check
    would say that a run fails which works. A run that goes on has a folder here alone.
    """
    (tmp_path / "my_method.py").write_text(MY_METHOD)
    argv = ["--dataset", "digits", "--fine_tune_method", "none", "--portable_kernels", "any_vendor"]
    args = replace(get_args("cluster", argv), resume=tmp_path / "of another machine")
    told = json.loads(probe_argv(args, tmp_path, ["cpu"])[0])
    told["experiment"]["fedavg"]["method"]["name"] = "my_method:Mine"

    def run_probe() -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.path[0] = {str(ROOT)!r}; from {PROBE} import main; main()"
        words = [sys.executable, "-c", code, json.dumps(told)]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    answer = run_probe()
    found = json.loads(answer.stdout or "{}")
    assert len(found["data"]) > 12, answer.stderr
    assert [kind["MKL"] for kind in found["kernels"]] == ["COMPATIBLE"]
    told["experiment"]["cohort_size"] = "x"
    assert run_probe().stderr.splitlines()[-1].startswith('error: cohort_size is "x"')


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["mnist", "--model", "no_such_module:Net"], "--model no_such_module:Net cannot be imported"),
        (["digits", "--metrics", "no_such_module:score"], "--metrics no_such_module:score cannot be imported"),
        (
            ["digits", "--method", "fedper", "--personal_layers", "no_such_layer"],
            "--method fedper does not go with the model",
        ),
    ],
)
def test_the_model_and_the_metrics_are_had_as_in_a_run(flags: list[str], said: str, tmp_path: Path) -> None:
    """A worker that cannot have them would end when it has joined."""
    config = get_args("cluster", ["--dataset", *flags]).experiment
    with reproducible_kernels():
        found = probe(config.to_dict(), str(tmp_path), ["cpu", "cuda:99"])
    assert found["data"].startswith(f"error: {said}")
    assert found["device"].startswith("error: --device cuda:99 is not there"), "it is the second"


def test_the_initial_model_is_read_where_the_server_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = get_args("cluster", ["--dataset", "digits", "--initial_model", str(tmp_path / "none")])
    versions = dict.fromkeys(("python", *PACKAGES, *OF_ANY_VERSION), "1")
    told = Told([{"found": [{"path": sys.executable, "versions": versions}]}, {"status": 2, "output": "", "last": ""}])
    monkeypatch.setattr(check, "open_session", lambda *asked: told)
    look_here(args, Wanted(Tree(Path("/code"), (), "", b""), None, {}), [])
    (argv,) = told.asked[-1][1]["argv"]
    with reproducible_kernels():
        assert probe(**json.loads(argv))["data"].startswith(f"error: {tmp_path}/none")


def test_a_host_with_unlike_gpus_is_warned_of() -> None:
    unlike = [{"torch": "2.13.0", "GPU": "A100"}, {"torch": "2.13.0", "GPU": "H100"}]
    found = lines(machine("this machine"), machine("beta", kernels=unlike))
    assert (found["kernels"].verdict, found["kernels"].said[2]) == (LOOK, "beta: torch 2.13.0, GPU A100 and H100")
    assert found["kernels"].said[0].startswith("beta: GPU is H100, not A100: the last bits of the model")


def test_a_look_that_fails_says_why() -> None:
    found = Machine("beta")
    _take_probe(found, {"status": 2, "output": "", "last": "error: --dataset x is unknown; use digits"}, ARGS)
    assert found.faults == {"data": "--dataset x is unknown; use digits"}


def test_a_clock_is_compared_as_well_as_the_way_allows() -> None:
    for theirs, seconds in ((100.0, 0), (103.0, 0), (140.0, 35), (50.0, 50)):
        found = Machine("beta")
        _compare_clocks(found, 100.0, theirs, 105.0)
        assert ("clocks" in found.warnings) == (seconds > 30)
        if found.warnings:
            assert found.warnings["clocks"].startswith(f"{seconds} s from this machine's")


class Told(Session):
    """A connection whose answers are given.  asked: what it was asked."""

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self.host = Host("beta")
        self.answers, self.asked = answers, []

    def ask(self, do: str, attached: bytes = b"", /, **fields: Any) -> dict[str, Any]:
        self.asked.append((do, fields))
        return self.answers.pop(0)

    def receive(self) -> dict[str, Any]:
        return self.answers.pop(0)


@pytest.mark.parametrize(("hosts", "verdict"), [(None, FAILS), (Path("hosts.txt"), LOOK)])
def test_a_package_that_this_machine_lacks_keeps_it_from_training(
    hosts: Path | None, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {**dict.fromkeys(("python", *PACKAGES, *OF_ANY_VERSION), "1"), "pyarrow": None}
    python = {"path": sys.executable, "versions": versions}
    told = Told([{"found": [python]}, {"status": 0, "output": json.dumps(FOUND), "last": ""}])
    monkeypatch.setattr(check, "open_session", lambda *asked: told)
    wanted = Wanted(Tree(Path("/code"), (), "", b""), None, {})
    found = lines(look_here(replace(ARGS, hosts=hosts), wanted, []))
    assert (found["packages"].verdict, found["data"].verdict) == (verdict, OK)
    said = f"this machine: pyarrow missing; run: {sys.executable} -m pip install -r {ROOT}/requirements.txt"
    assert found["packages"].said[0] == said


def test_each_device_of_a_host_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    python = {"path": "/python", "versions": dict.fromkeys(("python", *PACKAGES, *OF_ANY_VERSION), "1")}
    told = Told([{"time": 0.0}, {"at": "/code"}, {"found": [python]}, {"status": 2, "output": "", "last": "error: x"}])
    monkeypatch.setattr(check, "open_session", lambda *asked: told)
    wanted = Wanted(Tree(Path("/code"), (), "", b""), None, {})
    found = look_there(Host("beta", slots=3, device="cuda:0,cuda:1"), ARGS, wanted, [])
    assert found.faults == {"data": "x"}
    (argv,) = told.asked[-1][1]["argv"]
    assert json.loads(argv)["devices"] == ["cuda:0", "cuda:1"]


def test_tensors_are_tried_in_the_direction_in_which_gloo_connects() -> None:
    told = Told([{"own": "10.0.0.10"}, {"own": None, "reason": "no answer"}])
    assert try_ports(told, "10.0.0.9", 3002, 40000) == Reach(None, "no answer", "10.0.0.10")
    assert [fields["address"] for _, fields in told.asked] == [["10.0.0.9", 3002], ["10.0.0.9", 40000]]
    told = Told([{"own": "127.0.0.1"}, {"port": free_port()}, {"is_reached": False}])
    assert try_ports(told, "127.0.0.2", 3002, 40000) == Reach(None, "Connection refused", "127.0.0.1")
    assert try_ports(Told([{"own": None, "reason": "refused"}]), "10.0.0.9", 3002, 1) == Reach("refused", None, None)


def test_a_port_that_is_not_reached_comes_with_the_rule_that_opens_it() -> None:
    session = Told([])
    assert explain(session, Reach(None, None, "10.0.0.2"), "10.0.0.1", 3002) is None
    fault = explain(session, Reach("no answer", None, None), "10.0.0.1", 3002)
    assert isinstance(fault, HostError)
    assert str(fault).startswith("beta: does not reach 10.0.0.1:3002 of this machine (no answer); open the port")
    for own, said in (
        ("10.0.0.2", "beta does not reach the ports that this machine"),
        ("10.0.0.0", "this machine does"),
    ):
        assert said in str(explain(session, Reach(None, "no answer", own), "10.0.0.1", 3002))


def test_a_port_in_use_is_said() -> None:
    with answering("127.0.0.1", 0) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"abc")
            assert connection.recv(3) == b"cba", "it is this program that answers"
        with pytest.raises(
            ValueError, match=rf"cannot listen on --ip 127.0.0.1 --port {port} .Address already in use.; use"
        ):
            answering("127.0.0.1", port).__enter__()
    with answering("127.0.0.1", port):
        pass  # and is free again
