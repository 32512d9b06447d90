"""Means with standard errors, and shares with intervals."""

import math

import numpy as np
import numpy.typing as npt

# Neighbouring tokens are not independent; means of as many nearly are.
BLOCK = 64


def mean_with_error(values: npt.ArrayLike, block: int = BLOCK) -> tuple[float, float]:
    """The mean of a series, and its standard error by batch means.

    The series is cut into blocks and the error is that of the mean of their means, so
    correlation within a block is allowed for. NaN with fewer than two blocks.
    """
    values = np.asarray(values, np.float64)
    n_blocks = len(values) // block
    if n_blocks < 2:
        return float(values.mean()), math.nan
    means = values[: n_blocks * block].reshape(n_blocks, block).mean(axis=1)
    return float(values.mean()), float(means.std(ddof=1) / math.sqrt(n_blocks))


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson (1927): sensible at 0 and 1, too."""
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    spread = share * (1 - share) / n + z * z / (4 * n * n)
    half = z * math.sqrt(spread) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
