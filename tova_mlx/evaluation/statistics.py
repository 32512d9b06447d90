"""Means with standard errors, shares with intervals, and lifetimes."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EvaluationError

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


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share: sensible at 0 and 1, too.

    Source: Wilson 1927, as scipy has it. Raises EvaluationError without scipy.
    """
    interval = scipy_stats().binomtest(hits, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mean_survival(
    times: npt.NDArray[np.integer], left: npt.NDArray[np.bool_], limit: int
) -> float:
    """Compute the mean time that things stay, of at most `limit`.

    times: of each when it left, or where it had not, until when it was seen; that it
    was there at `limit` then counts as likely as for those seen longer.

    Source: the area below Kaplan and Meier's curve (1958), which is scipy's `ecdf` of
    censored data. Raises EvaluationError without scipy.
    """
    stats = scipy_stats()
    data = stats.CensoredData(uncensored=times[left], right=times[~left])
    curve = stats.ecdf(data).sf
    steps = np.diff([0, *curve.quantiles, limit])
    return float(np.concatenate([[1.0], curve.probabilities]) @ steps)


def scipy_stats() -> Any:
    """Import scipy's statistics. Raises EvaluationError without scipy."""
    try:
        from scipy import stats
    except ImportError as error:
        raise EvaluationError(
            'Intervals and lifetimes need scipy. Run: pip install "tova_mlx[eval]"'
        ) from error
    return stats
