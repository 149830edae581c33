"""Experiments from Python: what `import perfedavg` offers, in this process or with workers, rounds as they end."""

from perfedavg.terminal.entry_point import ignore_known_warnings
from python_api.finished import Run, open_run
from python_api.going_on import Rounds, rounds, run

ignore_known_warnings()

__all__ = ["Rounds", "Run", "open_run", "rounds", "run"]
