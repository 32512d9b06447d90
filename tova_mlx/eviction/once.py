"""The cut of `prefill="once"`: all that is too much is evicted after the last query."""

import mlx.core as mx
import numpy as np

from ..policies import Rule
from ..storage.entries import to_mlx
from .scan import ScanResult


def cut_once(result: ScanResult, positions: mx.array, rule: Rule) -> ScanResult:
    """Evict the lowest ranked columns from the scan of a chunk that evicted nothing.

    positions: int32 [R, N], ascending. The shortcut waits for the device: MLX does not
    say how its sort treats ties, and ours go to the oldest.
    """
    assert rule.max_size is not None
    ages, scores = np.array(positions), np.array(result.scores)
    surplus = ages.shape[1] - rule.max_size
    if surplus <= 0:
        return result
    protected = (ages < rule.n_sinks) | (ages > ages[:, -1:] - rule.n_recent)
    ranks = np.where(protected, np.inf, scores)
    victims = np.argsort(ranks, axis=1, kind="stable")[:, :surplus]
    last = np.array(result.last)
    np.put_along_axis(last, victims, last.max(axis=1, keepdims=True) - 1, axis=1)
    return result._replace(last=to_mlx(last), at_eviction=result.scores)
