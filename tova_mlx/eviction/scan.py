"""The prefill scan: replays the evictions of a block of rows on its logits.

Within a layer, who leaves depends only on that layer's queries and keys, so the
logits of a whole block come from one matmul and only the bookkeeping is sequential.
This is the portable NumPy version. R below is [B * H'] flattened, H' = 1 (layer) or
n_kv_heads (head); N = n_held + L columns in order of position; row i's own token is
column n_held + i.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..policies import Rule

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

# Below this the living columns share so little of a row's exponentials, taken against
# the maximum over dead columns too, that they are taken again without the dead.
_LOST = np.float32(1e-20)
_TINY = np.float32(1e-38)


class ScanResult(NamedTuple):
    """Who was alive at each row, and who is left.

    alive: bool [R, L, N]; survivors: int32 [R, kept], columns in ascending order;
    scores: float32 [R, kept]; before: the scores [R, N] before each row.
    """

    alive: npt.NDArray[np.bool_]
    survivors: Ints
    scores: Floats
    before: list[Floats]

    @property
    def gone(self) -> Ints:
        """The columns that left, in order of step: int32 [R, n]."""
        stays = np.zeros_like(self.alive[:, :1])
        np.put_along_axis(stays, self.survivors[:, None], True, axis=2)
        after = np.concatenate([self.alive[:, 1:], stays], axis=1)
        left = np.nonzero(self.alive & ~after)[2]
        return left.reshape(len(self.alive), -1).astype(np.int32)


def scan(
    logits: Floats,
    positions: Ints,
    scores: Floats,
    norms: Floats | None,
    rule: Rule,
    *,
    limit: int | None,
    cut_once: bool = False,
    sinks: Floats | None = None,
) -> ScanResult:
    """Replay L steps on logits [B, n_heads, L, N] (-inf where a row may not look).

    positions: int32 [R, N]; scores: float32 [R, N], 0 in the block's own columns;
    norms: float32 [B, n_kv_heads, N] for value-weighted rules; limit: tokens kept
    after each step, None for all; cut_once: evict only after the last row
    (`prefill="once"`); sinks: learned logits [n_heads] in the denominator.
    """
    batch, n_heads, length, columns = logits.shape
    n_held = columns - length
    n_rows = len(positions)
    heads = batch * n_heads // n_rows
    logits = logits.reshape(n_rows, heads, length, columns)
    sink = None if sinks is None else np.tile(sinks, batch).reshape(n_rows, heads)
    factors = None
    if norms is not None:
        repeated = np.repeat(norms, n_heads // norms.shape[1], axis=1)
        factors = np.nan_to_num(repeated.reshape(n_rows, heads, columns), nan=0.0)
    top = _top(logits, sink[:, :, None] if sink is not None else None)
    broken = np.isnan(top)
    exponentials = _exp(logits, top)
    extra = np.zeros_like(top)
    if sink is not None:
        extra = _exp(sink[:, :, None, None], top)[..., 0]

    living = np.zeros((n_rows, columns), np.float32)
    living[:, :n_held] = 1
    # Added to the scores: 0 where a token may leave, inf where it may not.
    barred = np.where(living > 0, np.float32(0), np.float32(np.inf))
    barred[positions < rule.n_sinks] = np.inf
    alive = np.empty((n_rows, length, columns), np.bool_)
    scores = scores.copy()
    memory = np.float32(rule.memory)
    before = []
    every_row = np.arange(n_rows)
    first = int(positions[0, n_held])

    def ranked(row: int) -> Floats:
        """Scores, inf where protected or dead."""
        if not rule.n_recent:
            return scores + barred
        old = positions <= first + row - rule.n_recent
        return np.where(old, scores + barred, np.float32(np.inf))

    for i in range(length):
        own = n_held + i
        living[:, own] = 1
        if first + i >= rule.n_sinks:
            barred[:, own] = 0
        alive[:, i] = living
        before.append(scores)
        evicts = limit is not None and not cut_once and own + 1 > limit
        ranks = evicts or (cut_once and i == length - 1)
        if not (ranks or memory):
            continue
        row = exponentials[:, :, i]
        total = np.matmul(row, living[:, :, None])[..., 0] + extra[:, :, i]
        if total.min() < _LOST:
            visible = np.where(living[:, None] > 0, logits[:, :, i], -np.inf)
            highest = _top(visible, sink)
            row = _exp(visible, highest)
            total = row.sum(axis=-1)
            if sink is not None:
                total += _exp(sink[..., None], highest)[..., 0]
            total = np.maximum(total, _TINY)
        if factors is not None:
            row = row * factors
        received = (row * np.reciprocal(total)[:, :, None]).sum(axis=1)
        received *= np.float32(1 / heads)
        received[broken[:, :, i].any(axis=1)] = 0
        scores = scores * memory + received if memory else received
        if evicts:
            victims = np.argmin(ranked(i), axis=1)
            living[every_row, victims] = 0
            barred[every_row, victims] = np.inf
    surplus = 0 if limit is None else int(living[0].sum()) - limit
    if cut_once and surplus > 0:
        leaving = np.argsort(ranked(length - 1), axis=1, kind="stable")[:, :surplus]
        np.put_along_axis(living, leaving, 0, axis=1)
    survivors = np.nonzero(living)[1].reshape(n_rows, -1)
    kept_scores = np.take_along_axis(scores, survivors, axis=1)
    return ScanResult(alive, survivors.astype(np.int32), kept_scores, before)


def _top(logits: Floats, sink: Floats | None) -> Floats:
    """The maximum of the last axis; NaN if any logit is."""
    top = logits.max(axis=-1)
    return top if sink is None else np.maximum(top, sink)


def _exp(logits: Floats, top: Floats) -> Floats:
    """exp(logits - top), 0 in hidden rows and in rows that are not numbers."""
    shift = np.where(np.isfinite(top), top, 0).astype(np.float32)
    result = logits - shift[..., None]
    np.exp(result, out=result)
    if not np.isfinite(top).all():
        np.nan_to_num(result, copy=False, nan=0.0, posinf=0.0)
    return result
