"""Personalized FedAvg (Jiang et al. 2019, arXiv 1909.12488): the algorithm and its runs.

    import perfedavg

    run = perfedavg.run(dataset="digits", method="fedprox", mu=0.1, rounds=20)
    run.clients.groupby("phase").personalized_accuracy.mean()

Imports neither the network nor FedLab, and parses no flags. Its errors name flags all the same: a flag is what their
reader can mend. `run`, `rounds`, `open`, `Run` and `Rounds` are those of `python_api`, which is imported when one of
them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from python_api import Rounds, Run, rounds, run
    from python_api import open_run as open  # noqa: F401

__all__ = ["Rounds", "Run", "rounds", "run"]  # `import *` leaves Python's own `open`

_OFFERED = {"Rounds": "Rounds", "Run": "Run", "open": "open_run", "rounds": "rounds", "run": "run"}
"""What `python_api` calls it, by the names here."""


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import python_api

    return getattr(python_api, _OFFERED[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *_OFFERED])
