"""Run an entry point whose run waits behind a round, for as long as a file is there.

python tests/held_run.py FILE ROUND server.py|single_process.py|quick_start.py [its arguments]

Behind the round of phase 1 that is named; it has been recorded and shown then. Signals and workers are answered
meanwhile. So what a test does in the middle of a run is done there, however fast the run is and however late the test.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from perfedavg import recorded_run  # noqa: E402
from perfedavg.engine.experiment import RoundRecord, experiment_rounds  # noqa: E402
from perfedavg.settings import Phase  # noqa: E402


def hold(file: Path, round_number: int) -> None:
    """In this process, and in those that it forks."""

    def held_rounds(*told: Any) -> Iterator[RoundRecord]:
        for record in experiment_rounds(*told):
            while (record.phase, record.round_number) == (Phase.FEDAVG, round_number) and file.exists():
                time.sleep(0.01)
            yield record

    recorded_run.experiment_rounds = held_rounds


if __name__ == "__main__":
    hold(Path(sys.argv[1]), int(sys.argv[2]))
    sys.argv = sys.argv[3:]
    sys.argv[0] = str(ROOT / sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
