"""The cut of `prefill="once"`: all that is too much leaves after a chunk's last row."""

import mlx.core as mx
import numpy as np

from ..policies import Rule
from ..storage.packed import to_mlx
from .scan import ScanResult


def cut_once(result: ScanResult, positions: mx.array, rule: Rule) -> ScanResult:
    """The scan of a chunk that nobody left, with those gone that rank lowest.

    positions: int32 [R, N], ascending. The shortcut waits for the device: MLX does not
    say how its sort treats ties, and ours go to the oldest.
    """
    assert rule.max_size is not None
    places, scores = np.array(positions), np.array(result.scores)
    surplus = places.shape[1] - rule.max_size
    if surplus <= 0:
        return result
    newest = places[:, -1:]
    stays = (places < rule.n_sinks) | (places > newest - rule.n_recent)
    ranks = np.where(stays, np.inf, scores)
    leaving = np.argsort(ranks, axis=1, kind="stable")[:, :surplus]
    last = np.array(result.last)
    np.put_along_axis(last, leaving, last.max(axis=1, keepdims=True) - 1, axis=1)
    return result._replace(last=to_mlx(last))
