"""OpenSSH's own sshd on the hosts of a lan, and an `ssh` that reaches them by name."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

from benchmarks.lan import HOSTS, Lan

READY_SECONDS = 60
SSHD = "/usr/sbin/sshd"
HIDE = """
mkdir -p ~/.cache && mount --bind "$1" ~/.cache &&
mount --bind "$2" "$3" &&
mount -t tmpfs none "$4" &&
shift 4 && exec "$@"
"""
"""Gives a process another folder of caches, the environment elsewhere, and nothing where this project is."""


class SshHosts:
    """sshd on every host but the first. The last host has neither the folder of this project nor what lies in it.

    path: a folder with an `ssh` to be put in front of PATH.
    python: an interpreter on the last host that knows the packages.
    """

    def __init__(self, lan: Lan, folder: Path) -> None:
        self.lan = lan
        self.path = folder / "bin"
        self.python = folder / "venv" / "bin" / "python"
        self._folder = folder

    @contextlib.contextmanager
    def running(self) -> Iterator[SshHosts]:
        for key in ("user", "host"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / key)]
            subprocess.run(words, check=True)
        host_key = (self._folder / "host.pub").read_text()
        known = [f"{self.lan.address[host]} {host_key}" for host in HOSTS[1:]]
        (self._folder / "known_hosts").write_text("".join(known))
        (self._folder / "config").write_text(self._client_config())
        self.path.mkdir()
        wrapper = self.path / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self._folder}/config "$@"\n')
        wrapper.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            for host in HOSTS[1:-1]:
                stack.enter_context(self._sshd(host))
            cache, venv = self._folder / "cache", self._folder / "venv"
            cache.mkdir()
            venv.mkdir()
            own = (ROOT / ".venv").resolve()
            stack.enter_context(
                self._sshd(HOSTS[-1], "sh", "-c", HIDE, "sh", str(cache), str(own), str(venv), str(ROOT))
            )
            yield self

    @contextlib.contextmanager
    def _sshd(self, host: str, *before: str) -> Iterator[None]:
        """sshd on a host, with everything that it started gone at the end.  before: words of a command that runs it."""
        config = self._folder / f"sshd-{host}"
        config.write_text(self._server_config(host))
        words = [*before, SSHD, "-D", "-f", str(config), "-E", str(self._folder / f"{host}.log")]
        process = subprocess.Popen(["ip", "netns", "exec", self.lan.namespace(host), *words])
        try:
            self._wait_until_ready(host)
            yield
        finally:
            process.terminate()
            process.wait()
            for pid in self._all_pids(host):  # sessions whose cable was pulled
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _wait_until_ready(self, host: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        connect = f": < /dev/tcp/{self.lan.address[host]}/22"
        words = ["ip", "netns", "exec", self.lan.namespace(host), "bash", "-c", connect]
        while subprocess.run(words, capture_output=True).returncode:
            assert time.monotonic() < deadline, (self._folder / f"{host}.log").read_text()
            time.sleep(0.05)

    def pids(self, host: str) -> set[int]:
        """Of all processes on a host but sshd's own."""
        return {pid for pid in self._all_pids(host) if not _name(pid).startswith("sshd")}

    def _all_pids(self, host: str) -> set[int]:
        words = ["ip", "netns", "pids", self.lan.namespace(host)]
        return {int(word) for word in subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()}

    def _client_config(self) -> str:
        hosts = "".join(f"Host {host}\n  HostName {self.lan.address[host]}\n" for host in HOSTS[1:])
        return (
            f"{hosts}Host *\n  User root\n  IdentityFile {self._folder}/user\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self._folder}/known_hosts\n"
        )

    def _server_config(self, host: str) -> str:
        return (
            f"ListenAddress {self.lan.address[host]}\nHostKey {self._folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self._folder}/user.pub\nStrictModes no\nPermitRootLogin prohibit-password\n"
        )


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "sshd, which has ended"


@contextlib.contextmanager
def lan_or_skip() -> Iterator[Lan]:
    """The hosts; skips the test, with the reason, where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip (iproute2)")
    with contextlib.ExitStack() as stack:
        try:
            lan = stack.enter_context(Lan())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield lan


def ssh_hosts_or_skip(lan: Lan, folder: Path) -> contextlib.AbstractContextManager[SshHosts]:
    if not Path(SSHD).exists() or shutil.which("ssh") is None:
        pytest.skip(f"{SSHD} or ssh is missing; Debian and Ubuntu: apt-get install openssh-server openssh-client")
    return SshHosts(lan, folder).running()
