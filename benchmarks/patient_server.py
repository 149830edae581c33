"""Run a server that does not end before so many workers are there: one that comes back later would find no server.

python benchmarks/patient_server.py WORKERS server.py|benchmarks/planted_fault.py [its arguments]

It waits for nobody where the run takes longer than a worker needs to come back.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from planted_fault import before  # noqa: E402

from multi_process.server import WorkerPool  # noqa: E402
from perfedavg.terminal.entry_point import prepare_process  # noqa: E402

POLL_SECONDS = 0.02


def main() -> None:
    prepare_process()
    num_workers, script, *flags = sys.argv[1:]

    def wait(pool: WorkerPool) -> None:
        while len(pool._network.present) < int(num_workers):
            time.sleep(POLL_SECONDS)

    before(WorkerPool, "shutdown", wait)
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main()
