"""The file of hosts: what it may say, and what is said about a line that is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from over_ssh.hosts_file import Host, read_hosts


def write(folder: Path, text: str) -> Path:
    path = folder / "hosts.txt"
    path.write_text(text)
    return path


def test_a_line_is_a_host_with_what_it_contributes(tmp_path: Path) -> None:
    text = """
# the machines of the lab
alpha
anna@beta   slots=3 device=cuda:0,cuda:1 data_root=/scratch/my=data   # two GPUs
localhost python=~/env/bin/python ethernet=ib0
"""
    first, second, third = read_hosts(write(tmp_path, text))
    assert first == Host("alpha")
    assert second == Host("anna@beta", slots=3, device="cuda:0,cuda:1", data_root="/scratch/my=data")
    assert third == Host("localhost", python="~/env/bin/python", ethernet="ib0")
    assert [second.device_of(slot) for slot in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert first.device_of(0) is None
    assert [host.is_this_machine for host in (first, second, third)] == [False, False, True]
    assert second.file_name == "anna_beta", "it becomes a part of a file's name"


def test_a_file_from_windows_and_a_path_with_spaces_are_understood(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b'\xef\xbb\xbfalpha\r\nbeta data_root="/my data"\r\n# don\'t\r\n')
    assert read_hosts(tmp_path / "hosts") == [Host("alpha"), Host("beta", data_root="/my data")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("# alpha\n\n", "names no host"),
        ("alpha\n-oProxyCommand=x", "line 2: '-oProxyCommand=x' is no name of a host"),
        ("slots=2", "line 1: 'slots=2' is no name of a host"),
        ("beta:2222", "what else it takes (a port, a jump host) into ~/.ssh/config"),
        ("alpha\n\nalpha slots=2", "line 3: alpha is in line 1 already; name it once, with slots=N"),
        ("alpha slots=0", "line 1: slots=0 is no number of workers; use 1 to 1024"),
        ("alpha slots=two", "slots=two is no number"),
        ("alpha slots=1 slots=2", "slots is given twice"),
        ("alpha gpus=2", "'gpus=2' is unknown; behind the name of a host stand slots=..., device=..., data_root=..."),
        ("alpha 2", "'2' is unknown"),
        ("alpha device=gpu0", "device=gpu0 is none; use auto, cpu, cuda or cuda:i"),
        ("alpha data_root=data", "'data' is no path from the root or from ~/"),
        ("alpha ethernet=", "a value is missing"),
        ("alpha data_root='/my data", "line 1: No closing quotation"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        read_hosts(path)
    assert str(refusal.value).startswith(f"--hosts {path}")


def test_a_file_that_cannot_be_read_is_said_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--hosts {tmp_path / 'none'} cannot be read (No such file or dir")):
        read_hosts(tmp_path / "none")
    (tmp_path / "image").write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match=re.escape("cannot be read (not text); name a file with a host a line")):
        read_hosts(tmp_path / "image")
