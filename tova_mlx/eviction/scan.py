"""The prefill scan: replays the evictions of a block of rows on its logits.

Within a layer, who leaves depends only on that layer's queries and keys, so the
logits of a whole block come from one matmul and only the bookkeeping is sequential.
This is the portable NumPy version; the Metal one is in `kernels`. R below is [B * H']
flattened, H' = 1 (layer) or n_kv_heads (head); N = n_held + L columns in order of
position; row i's own token is column n_held + i.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..policies import Rule
from ..storage.packed import to_mlx

Floats = npt.NDArray[np.float32]

# Below this the living columns share so little of a row's exponentials, taken against
# the maximum over dead columns too, that they are taken again without the dead.
_LOST = np.float32(1e-20)
_TINY = np.float32(1e-38)


class ScanResult(NamedTuple):
    """Until when each column was alive, and what it was worth.

    last: int32 [R, N], the last row that saw the column, L if it is still there;
    scores: float32 [R, N] after the last row; before: float32 [R, n_before, N], the
    scores before each of the last rows.
    """

    last: mx.array
    scores: mx.array
    before: mx.array | None


def scan_on_cpu(
    logits: mx.array,
    positions: mx.array,
    scores: mx.array,
    norms: mx.array | None,
    rule: Rule,
    *,
    limit: int | None,
    n_before: int = 0,
    sinks: mx.array | None = None,
) -> ScanResult:
    """Replay L steps on logits [B, n_heads, L, N], -inf where a mask hides.

    What comes after a row need not be hidden. positions: int32 [R, N]; scores: float32
    [R, N], 0 in the block's own columns; norms: float32 [B, n_kv_heads, N] for
    value-weighted rules; limit: tokens kept after each step, None for all; n_before:
    for how many of the last rows `before` is wanted; sinks: learned logits [n_heads]
    in the denominator.
    """
    batch, n_heads, length, columns = logits.shape
    n_held = columns - length
    causal = mx.arange(n_held, columns)[:, None] >= mx.arange(columns)
    seen = mx.where(causal, logits.astype(mx.float32), -mx.inf)
    rows = np.array(seen, copy=False)
    n_rows = positions.shape[0]
    heads = batch * n_heads // n_rows
    rows = rows.reshape(n_rows, heads, length, columns)
    sink = None
    if sinks is not None:
        learned = np.array(sinks.astype(mx.float32))
        sink = np.tile(learned, batch).reshape(n_rows, heads)
    factors = None
    if norms is not None:
        repeated = np.repeat(np.array(norms), n_heads // norms.shape[1], axis=1)
        factors = np.nan_to_num(repeated.reshape(n_rows, heads, columns), nan=0.0)
    top = _top(rows, sink[:, :, None] if sink is not None else None)
    doubtful = ~np.isfinite(top)
    exponentials = _exp(rows, top)
    extra = np.zeros_like(top)
    if sink is not None:
        extra = _exp(sink[:, :, None, None], top)[..., 0]

    places = np.array(positions)
    living = np.zeros((n_rows, columns), np.float32)
    living[:, :n_held] = 1
    # Added to the scores: 0 where a token may leave, inf where it may not.
    barred = np.where(living > 0, np.float32(0), np.float32(np.inf))
    barred[places < rule.n_sinks] = np.inf
    last = np.full((n_rows, columns), length, np.int32)
    current = np.array(scores)
    memory = np.float32(rule.memory)
    before = []
    every_row = np.arange(n_rows)
    first = int(places[0, n_held])

    for i in range(length):
        own = n_held + i
        living[:, own] = 1
        if first + i >= rule.n_sinks:
            barred[:, own] = 0
        if i >= length - n_before:
            before.append(current)
        evicts = limit is not None and own + 1 > limit
        if not (evicts or memory or i == length - 1):
            continue
        row = exponentials[:, :, i]
        total = np.matmul(row, living[:, :, None])[..., 0] + extra[:, :, i]
        broken = None
        if total.min() < _LOST or doubtful[:, :, i].any():
            visible = np.where(living[:, None] > 0, rows[:, :, i], -np.inf)
            highest = _top(visible, sink)
            row = _exp(visible, highest)
            total = row.sum(axis=-1)
            if sink is not None:
                total += _exp(sink[..., None], highest)[..., 0]
            total = np.maximum(total, _TINY)
            broken = ~np.isfinite(highest).all(axis=1)
        if factors is not None:
            row = row * factors
        received = (row * np.reciprocal(total)[:, :, None]).sum(axis=1)
        received *= np.float32(1 / heads)
        if broken is not None:
            received[broken] = 0
        current = current * memory + received if memory else received
        if evicts:
            ranks = current + barred
            if rule.n_recent:
                recent = places > first + i - rule.n_recent
                ranks = np.where(recent, np.float32(np.inf), ranks)
            victims = np.argmin(ranks, axis=1)
            living[every_row, victims] = 0
            barred[every_row, victims] = np.inf
            last[every_row, victims] = i
    earlier = to_mlx(np.stack(before, axis=1)) if before else None
    return ScanResult(to_mlx(last), to_mlx(current), earlier)


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
