"""Metrics: figures by which clients are scored besides loss and accuracy. Known here by name, or users' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from perfedavg.metrics.base import Metric as Metric
from perfedavg.metrics.macro_f1 import MACRO_F1
from perfedavg.own_module import explained, import_own

if TYPE_CHECKING:
    from torch import Tensor

BASIC_METRICS = {"loss": False, "accuracy": True}
"""What every client is scored by, as it is counted batch by batch, and whether higher is better."""
METRICS = {"macro_f1": MACRO_F1}
_ASKED = "is a function of outputs and labels or a perfedavg.metrics.Metric"


def name_in_results(name: str) -> str:
    """What results call a metric: its name, or of a user's own `package.module:name` the part behind the colon."""
    return name.rpartition(":")[2]


def problem_with(names: Sequence[str]) -> str | None:
    """What is wrong with the names of metrics, to be read behind them; None where nothing is."""
    taken = [*BASIC_METRICS]
    for name in names:
        called = name_in_results(name)
        if name not in METRICS and not (":" in name and called.isidentifier()):
            return f"must be {', '.join(METRICS)} or package.module:name for your own; several with commas between"
        if called in taken:
            return f"would score by {called} twice; leave one out, or rename yours"
        taken.append(called)
    return None


def find_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics, by what results call them. Raises ValueError where a user's own cannot be had."""
    return {name_in_results(name): METRICS[name] if name in METRICS else _users_own(name) for name in names}


def better_when_higher(names: Sequence[str]) -> dict[str, bool]:
    """Of all that clients are scored by, with metrics of these names: whether higher is better, by results' names."""
    return BASIC_METRICS | {name: metric.higher_is_better for name, metric in find_metrics(names).items()}


def _is_metric(found: object) -> bool:
    return isinstance(found, Metric) or callable(found)


def _users_own(name: str) -> Metric:
    """A plain function is a metric of which higher values are better. Its errors are said in one line."""
    found = import_own("--metrics", name, "name", _is_metric, _ASKED)
    metric = found if isinstance(found, Metric) else Metric(found)

    def value_of(outputs: Tensor, labels: Tensor) -> float:
        try:
            return float(metric.value_of(outputs, labels))
        except Exception as error:
            raise explained(f"--metrics {name}", error) from error

    return replace(metric, value_of=value_of)
