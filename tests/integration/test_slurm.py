"""The batch script, as it stands, on a real Slurm of four nodes that are all here."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ENDS_WITHIN_SECONDS, ROOT, TINY, Launched, digest_in_one_process, free_port, read_result

pytestmark = pytest.mark.slow

NEEDED = {
    **dict.fromkeys(("slurmctld", "slurmd", "sbatch", "srun", "scancel", "sinfo"), "slurm-wlm"),
    "munged": "munge",
}
"""Commands, and Debian's packages that have them."""
NODES = 4
CORES = 16
"""Of each node, as the script asks for; these need not be there."""
FLAGS = [*TINY, "--rounds", "6", "--eval_every", "3"]
HELD_SERVER = f"""
import runpy, sys
from pathlib import Path
sys.path.insert(0, "{ROOT}/tests")
from held_run import hold
hold(Path("{{hold}}"), 1)
runpy.run_path("{ROOT}/server.py", run_name="__main__")
"""
"""A server.py whose run waits behind its first round, so that the job is stopped in the middle of it."""


class Cluster:
    """A Slurm of this test's own: its configuration, keys, ports and state are in a folder.

    Leaving the block ends its jobs, and its daemons by their process ids.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons = Launched()

    def __enter__(self) -> Cluster:
        self._write_configuration()
        try:
            key, munge = self._folder / "munge.key", self._folder / "munge"
            key.write_bytes(secrets.token_bytes(128))
            key.chmod(0o600)
            files = (f"--key-file={key}", f"--socket={munge}", f"--pid-file={munge}.pid", f"--seed-file={munge}.seed")
            self._start("munged", "--foreground", "--force", *files)
            self._wait_for(munge.exists, "munged")
            self._start("slurmctld", "-D")
            for number in range(1, NODES + 1):
                self._start("slurmd", "-D", "-N", f"node{number}")
            self._wait_for(lambda: self.ask("sinfo", "--noheader", "--format=%t %D").split() == ["idle", "4"], "nodes")
        except BaseException:
            self._daemons.kill_all()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.ask("scancel", "--user=root")
            self._wait_for(lambda: not self.ask("squeue", "--noheader"), "the end of all jobs")
        finally:
            for daemon in reversed(self._daemons.processes):
                daemon.terminate()
                daemon.wait(60)
            self._daemons.kill_all()

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        answer = subprocess.run(command, env=self._environment, capture_output=True, text=True, cwd=cwd)
        return answer.stdout.strip()

    def submit(self, folder: Path, *flags: str) -> str:
        """Submit the script from a folder. Returns the job's number."""
        return self.ask("sbatch", "--parsable", str(ROOT / "examples" / "slurm.sh"), *flags, cwd=folder)

    def state_of(self, job: str) -> str:
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def wait_for_end(self, job: str) -> str:
        """The state in which a job has ended."""
        going = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        self._wait_for(lambda: self.state_of(job) not in going, f"the end of job {job}")
        return self.state_of(job)

    def signal_batch(self, job: str, name: str) -> None:
        """As --signal=B: of the script does when time is nearly up."""
        self.ask("scancel", "--batch", f"--signal={name}", job)

    def log_of_daemons(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self._folder.glob("log-*"))

    def _start(self, name: str, *words: str) -> None:
        with open(self._folder / f"log-{name}{words[-1]}".replace("/", "_"), "wb") as output:
            self._daemons.start(name, *words, env=self._environment, output=output)

    def _wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + ENDS_WITHIN_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.log_of_daemons()}"
            time.sleep(0.1)

    def _write_configuration(self) -> None:
        host, at = socket.gethostname(), self._folder
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={free_port()}",
            f"FirstJobId={1 + secrets.randbelow(9000)}",  # of which the script makes the server's port
            "SlurmUser=root",
            "SlurmdUser=root",
            f"AuthInfo=socket={at / 'munge'}",
            f"StateSaveLocation={at / 'state'}",
            f"SlurmdSpoolDir={at / 'spool'}-%n",
            f"SlurmctldPidFile={at / 'slurmctld.pid'}",
            f"SlurmdPidFile={at / 'slurmd'}-%n.pid",
            "ProctrackType=proctrack/pgid",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "SlurmdParameters=config_overrides",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            *(
                f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={CORES}"
                for number in range(1, NODES + 1)
            ),
            "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        ]
        (at / "state").mkdir()
        (at / "slurm.conf").write_text("\n".join(lines) + "\n")
        version = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
        (at / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/{version}\n")  # none that it could do without


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = {package for command, package in NEEDED.items() if shutil.which(command) is None}
    if missing:
        pytest.skip(f"Slurm is not here; install {' and '.join(sorted(missing))}")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def submit_folder(tmp_path: Path) -> Path:
    """Has what the script needs of this project's folder, and takes in the runs. These wait while `hold` is there."""
    (tmp_path / "hold").touch()
    (tmp_path / "server.py").write_text(HELD_SERVER.format(hold=tmp_path / "hold"))
    (tmp_path / "client_worker.py").symlink_to(ROOT / "client_worker.py")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def test_the_batch_script_gives_the_model_of_one_process_also_where_time_is_up(
    cluster: Cluster, submit_folder: Path
) -> None:
    """A first job is told that its time is nearly up, and saves a checkpoint; a second one goes on with --resume."""
    digest = digest_in_one_process(FLAGS, submit_folder / "single")
    run = submit_folder / "runs" / "first"
    job = cluster.submit(submit_folder, *FLAGS, "--run_dir", "runs/first")
    said = submit_folder / f"slurm-{job}.out"
    deadline = time.monotonic() + ENDS_WITHIN_SECONDS
    while not (run / "metrics.jsonl").exists() or "\n" not in (run / "metrics.jsonl").read_text():
        assert cluster.state_of(job) in ("PENDING", "RUNNING"), said.read_text() + cluster.log_of_daemons()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)
    cluster.signal_batch(job, "TERM")
    cluster.wait_for_end(job)
    assert "stopped by SIGTERM" in said.read_text()
    (submit_folder / "hold").unlink()
    job = cluster.submit(submit_folder, "--resume", "runs/first")
    state = cluster.wait_for_end(job)
    said = submit_folder / f"slurm-{job}.out"
    assert state == "COMPLETED", said.read_text() + cluster.log_of_daemons()
    assert read_result(run)["model_sha256"] == digest
    assert all(f"worker {rank} is ready" in said.read_text() for rank in range(1, NODES + 1))
