"""Figures with the digits that they have: medians over a few turns, on machines whose speed varies by a tenth."""

from __future__ import annotations

import math


def figure(value: float) -> str:
    """Two significant digits: `0.45`, `5.7`, `1,200`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = 1 - math.floor(math.log10(abs(float(f"{value:.1e}"))))
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def times(ratio: float) -> str:
    """`1.3 times`, or `equal` for 0.9, 1.0 and 1.1, which the next pair of turns may turn round."""
    return "equal" if abs(ratio - 1) < 0.15 else f"{figure(ratio)} times"
