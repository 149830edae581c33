"""How sure a mean over seeds and clients is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def mean_over_seeds(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The mean over seeds of the mean over clients, (kinds,). values: for each seed, (num_clients, kinds)."""
    mean: NDArray[np.float64] = np.mean([of_seed.mean(axis=0) for of_seed in values], axis=0)
    return mean


def confidence_interval(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The 95 % interval of `mean_over_seeds`, (2, kinds): lower, upper bound; NaN for a single client of a single seed.

    values: for each seed, of each client, (num_clients, kinds). Of differences between two runs they are paired: a
    client is compared with itself, so that how clients differ from each other does not widen the interval.

    A seed is a cluster: its clients share one model, one draw of clients and one course of training, and are not
    independent of each other. So each seed's mean is one observation, and the interval is that of Student's t over
    them, which has all these in it. A bootstrap over a few clusters would be too narrow: over three seeds it ends at
    the lowest and the highest of their means, between which the true one lies in three of four cases.

    A few seeds may be more alike, by chance, than the draw of their clients lets them be. So the interval is never
    narrower than that draw alone makes it; with one seed it is this, and says nothing of the chance in training.
    """
    num_seeds = len(values)
    middle = mean_over_seeds(values)
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that diverged
        variances = [of_seed.var(axis=0) / max(len(of_seed) - 1, 1) for of_seed in values]  # of the seeds' means
        half_width = t_quantile(sum(map(len, values)) - num_seeds) * np.sqrt(sum(variances)) / num_seeds
        if num_seeds > 1:
            spread = np.std([of_seed.mean(axis=0) for of_seed in values], axis=0, ddof=1)
            half_width = np.fmax(half_width, t_quantile(num_seeds - 1) * spread / math.sqrt(num_seeds))
    return np.stack([middle - half_width, middle + half_width])


def t_quantile(degrees_of_freedom: int) -> float:
    """Where 97.5 % of Student's t distribution lie below; NaN without a degree of freedom."""
    from scipy.special import stdtrit  # takes a third of a second to load

    return float(stdtrit(degrees_of_freedom, 0.975))
