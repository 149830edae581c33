"""Run an entry point whose clients count their rounds, in the n-th send an n-th of their update, and adapt by them.

python tests/counting_run.py server.py|client_worker.py|single_process.py|benchmarks/planted_fault.py [its arguments]

What clients keep is then not nothing, in whatever process they train.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from helpers import count_rounds, from_counted_rounds  # noqa: E402

from multi_process import travelling_states  # noqa: E402
from perfedavg.engine import client_states  # noqa: E402
from perfedavg.methods import FedAvg, Reptile  # noqa: E402

if __name__ == "__main__":
    client_states.BATCH_BYTES = travelling_states.BATCH_BYTES = 1  # each state travels by itself, before the sum
    for method in (FedAvg, Reptile):
        method.keeps_state = True
        method.update = count_rounds(method.update)  # type: ignore[method-assign]
        method.personalize = from_counted_rounds(method.personalize)  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
