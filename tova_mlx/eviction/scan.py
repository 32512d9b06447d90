"""The prefill scan: replays the evictions of a block of tokens on its logits.

Within a layer, which token is evicted depends only on that layer's queries and keys, so
the logits of a whole block come from one matmul and only the bookkeeping is sequential.
This is the portable NumPy version; the Metal one is in `scan_kernels`. R below is
[B * H'] flattened, H' = 1 (layer) or n_kv_heads (head); N = n_held + L columns in order
of position; the token of step i is column n_held + i.
"""

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..policies import Rule
from ..storage.entries import to_mlx

Floats = npt.NDArray[np.float32]

# Below this the columns held share so little of a query's exponentials, taken against
# the maximum over evicted columns too, that they are taken again without the evicted.
_LOST = np.float32(1e-20)
_TINY = np.float32(1e-38)


class Columns(NamedTuple):
    """What is known of a block's N columns, in order of position.

    positions: int32 [R, N]; scores: float32 [R, N], 0 in the block's own columns;
    value_norms: float32 [B, n_kv_heads, N] for value-weighted rules.
    """

    positions: mx.array
    scores: mx.array | None
    value_norms: mx.array | None = None


class ScanResult(NamedTuple):
    """Until when each column was held, and what it was worth.

    last: int32 [R, N], the last step that saw the column, L if it is still held;
    scores: float32 [R, N] after the last step; before: float32 [R, n_before, N], the
    scores before each of the last steps; at_eviction: float32 [R, N], the score that
    each column was evicted with, if it is wanted.
    """

    last: mx.array
    scores: mx.array
    before: mx.array | None
    at_eviction: mx.array | None = None


def scan_on_cpu(
    logits: mx.array,
    columns: Columns,
    rule: Rule,
    *,
    limit: int | None,
    n_before: int = 0,
    sinks: mx.array | None = None,
    at_eviction: bool = False,
) -> ScanResult:
    """Replay L steps on logits [B, n_heads, L, N], -inf where a mask hides.

    What comes after a query need not be hidden. limit: tokens held after each step,
    None for all; n_before: for how many of the last steps `before` is wanted; sinks:
    learned logits [n_heads] in the denominator; at_eviction: whether that is wanted.
    """
    length, n_columns = logits.shape[2:]
    n_held = n_columns - length
    weights = _Weights(logits, columns, sinks)
    tokens = _Tokens(np.array(columns.positions), n_held, rule)
    worth = np.zeros(tokens.positions.shape, np.float32) if at_eviction else None
    memory, current = np.float32(rule.memory), np.array(columns.scores)
    before = []
    for step in range(length):
        tokens.arrive(step)
        if step >= length - n_before:
            before.append(current)
        evicts = limit is not None and n_held + step + 1 > limit
        if not (evicts or memory or step == length - 1):
            continue
        received = weights.received(step, tokens.held)
        current = current * memory + received if memory else received
        if evicts:
            tokens.evict_lowest(step, current, worth)
    earlier = to_mlx(np.stack(before, axis=1)) if before else None
    evicted = None if worth is None else to_mlx(worth)
    return ScanResult(to_mlx(tokens.last), to_mlx(current), earlier, evicted)


class _Tokens:
    """Which columns are held, and which may be evicted."""

    def __init__(self, positions: npt.NDArray[np.int32], n_held: int, rule: Rule):
        self.positions, self.n_held, self.rule = positions, n_held, rule
        self.held = np.zeros(positions.shape, np.float32)
        self.held[:, :n_held] = 1
        # Added to the scores: 0 where a token may be evicted, inf where it may not.
        self._barred = np.where(self.held > 0, np.float32(0), np.float32(np.inf))
        self._barred[positions < rule.n_sinks] = np.inf
        self._first = int(positions[0, n_held])
        self._each = np.arange(len(positions))
        self.last = np.full(positions.shape, positions.shape[1] - n_held, np.int32)

    def arrive(self, step: int) -> None:
        """Hold the token of this step."""
        own = self.n_held + step
        self.held[:, own] = 1
        if self._first + step >= self.rule.n_sinks:
            self._barred[:, own] = 0

    def evict_lowest(self, step: int, scores: Floats, worth: Floats | None) -> None:
        """Evict the lowest score that is not protected; ties go to the oldest.

        worth: takes the victims' scores, if it is given.
        """
        ranks = scores + self._barred
        if self.rule.n_recent:
            recent = self.positions > self._first + step - self.rule.n_recent
            ranks = np.where(recent, np.float32(np.inf), ranks)
        victims = np.argmin(ranks, axis=1)
        self.held[self._each, victims] = 0
        self._barred[self._each, victims] = np.inf
        self.last[self._each, victims] = step
        if worth is not None:
            worth[self._each, victims] = scores[self._each, victims]


class _Weights:
    """What each column receives of a query's attention: the mean over the heads.

    The exponentials of all queries are taken at once, as if nothing was evicted.
    """

    def __init__(self, logits: mx.array, columns: Columns, sinks: mx.array | None):
        batch, n_heads, length, n = logits.shape
        n_choices = columns.positions.shape[0]
        self._heads = batch * n_heads // n_choices
        shape = (n_choices, self._heads)
        causal = mx.arange(n - length, n)[:, None] >= mx.arange(n)
        seen = mx.where(causal, logits.astype(mx.float32), -mx.inf)
        self._logits = np.array(seen, copy=False).reshape(*shape, length, n)
        self._sinks = self._norms = None
        if sinks is not None:
            learned = np.array(sinks.astype(mx.float32))
            self._sinks = np.tile(learned, batch).reshape(shape)
        if columns.value_norms is not None:
            per_head = n_heads // columns.value_norms.shape[1]
            norms = np.repeat(np.array(columns.value_norms), per_head, axis=1)
            self._norms = np.nan_to_num(norms.reshape(*shape, n), nan=0.0)
        sink = None if self._sinks is None else self._sinks[:, :, None]
        top = _top(self._logits, sink)
        self._doubtful = ~np.isfinite(top)
        self._exponentials = _exp(self._logits, top)
        self._extra = np.zeros_like(top)
        if sink is not None:
            self._extra = _exp(sink[..., None], top)[..., 0]

    def received(self, step: int, held: Floats) -> Floats:
        """Return what each column [R, N] receives from the query of this step."""
        weights = self._exponentials[:, :, step]
        total = np.matmul(weights, held[:, :, None])[..., 0] + self._extra[:, :, step]
        broken = None
        if total.min() < _LOST or self._doubtful[:, :, step].any():
            weights, total, broken = self._without_evicted(step, held)
        if self._norms is not None:
            weights = weights * self._norms
        received = (weights * np.reciprocal(total)[:, :, None]).sum(axis=1)
        received *= np.float32(1 / self._heads)
        if broken is not None:
            received[broken] = 0
        return received

    def _without_evicted(self, step: int, held: Floats) -> tuple[Floats, Floats, Any]:
        """Exponentials against the maximum of the held, totals, and what is broken."""
        visible = np.where(held[:, None] > 0, self._logits[:, :, step], -np.inf)
        top = _top(visible, self._sinks)
        weights = _exp(visible, top)
        total = weights.sum(axis=-1)
        if self._sinks is not None:
            total += _exp(self._sinks[..., None], top)[..., 0]
        broken = np.logical_not(np.isfinite(top).all(axis=1))
        return weights, np.maximum(total, _TINY), broken


def _top(logits: Floats, sink: Floats | None) -> Floats:
    """The maximum of the last axis; NaN if any logit is."""
    top = logits.max(axis=-1)
    return top if sink is None else np.maximum(top, sink)


def _exp(logits: Floats, top: Floats) -> Floats:
    """exp(logits - top), 0 where all is hidden or not a number."""
    shift = np.where(np.isfinite(top), top, 0).astype(np.float32)
    result = logits - shift[..., None]
    np.exp(result, out=result)
    if not np.isfinite(top).all():
        np.nan_to_num(result, copy=False, nan=0.0, posinf=0.0)
    return result
