"""A folder for secrets is gone when its process is."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, wait_until

from perfedavg.machine.private_folder import private_folder

HOLD = """
import sys
from perfedavg.machine.private_folder import private_folder
with private_folder("held-") as folder:
    (folder / "secret").write_text("a secret")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_it_is_for_its_user_alone_and_gone_at_the_end_of_the_block() -> None:
    with private_folder("held-") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "secret").write_text("a secret")
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_gone_too_where_its_process_is_killed(number: signal.Signals) -> None:
    words = (sys.executable, "-c", HOLD)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert (folder / "secret").exists()
        process.send_signal(number)
    wait_until(lambda: not folder.exists(), "its end")
