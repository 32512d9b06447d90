"""What a chunk's queries read of what was evicted: all of it.

The weights are those of a softmax over all tokens, as in the full cache. Reading few
rows, even the best of thousands by exact choice, costs more quality than it saves time:
see CHANGELOG.md.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..policies import RECALL_BLOCK
from ..storage.archive import Archive, Rows, Tile
from ..storage.device import on_gpu
from ..storage.disk_archive import DiskArchive
from ..storage.entries import product

# Weights of a head beyond which each tile is computed before the next is thought of.
_MANY = 1 << 20
# Below all logits, and still a number: its exponential is 0.
_LOWEST = mx.finfo(mx.float32).min


class Recalled(NamedTuple):
    """Output [B, n_heads, L, D] over all evicted rows.

    lse: logsumexp of their logits [B, n_heads, L, 1].
    """

    output: mx.array
    lse: mx.array

    def cut(self, start: int, stop: int) -> Recalled:
        """Return that of queries start to stop."""
        return Recalled(*(a[:, :, start:stop] for a in self))

    def merged(self, output: mx.array, lse: mx.array) -> mx.array:
        """Return the attention over both, given that over the slots alone."""
        share = mx.exp(self.lse - mx.logaddexp(self.lse, lse))
        return (output * (1 - share) + self.output * share).astype(output.dtype)


def recall(
    queries: mx.array,
    archive: Archive | DiskArchive,
    waiting: Rows | None = None,
    *,
    shown: int,
    newest: int = 1,
) -> tuple[Recalled, mx.array | None]:
    """Attend to all evicted rows: those of an archive, and those that wait for it.

    queries: [B, n_heads, L, head_dim], scaled; shown: a multiple of 16. Returns, for so
    many of the newest queries, the archived positions that each attends to most too, in
    blocks of 16, -1 where one has no row: int32 [B, n_kv_heads, newest, shown], or all
    that the archive has room for; None if it has no row. The heads of a KV head have
    them together.
    """
    batch, n_heads, length, width = queries.shape
    heads = archive.n_kv_heads if waiting is None else waiting.keys.shape[1]
    group = n_heads // heads
    asked = queries.astype(mx.float32).reshape(batch, heads, group * length, width)
    sums, best, there = _NOTHING, [], []
    for tile in archive.tiles():
        logits = _logits(asked, tile)
        best.append(_best_of_blocks(logits, group, newest))
        there.append(tile.there)
        sums = sums.with_tile(logits, tile)
        if length * archive.room > _MANY:
            # On the CPU `_exponential` waits anyway.
            (mx.async_eval if on_gpu() else mx.eval)(*sums, best[-1])
    if waiting is not None:
        tile = Tile(waiting.keys, waiting.values, waiting.positions >= 0)
        sums = sums.with_tile(_logits(asked, tile), tile)
    # There is nothing in a batch row that has evicted nothing.
    output = sums.output / mx.where(sums.total == 0, 1, sums.total)
    lse = sums.top + mx.log(sums.total)
    recalled = Recalled(*(a.reshape(batch, n_heads, length, -1) for a in (output, lse)))
    if not best:
        return recalled, None
    blocks = mx.concatenate(best, axis=-1)
    columns = _greatest_blocks(blocks, min(shown // RECALL_BLOCK, blocks.shape[-1]))
    held = mx.concatenate(there, axis=-1)[:, :, None]
    held = mx.broadcast_to(held, (*columns.shape[:3], held.shape[-1]))
    held = mx.take_along_axis(held, columns, axis=-1)
    return recalled, mx.where(held, archive.start + columns, -1)


class _Sums(NamedTuple):
    """Sums over rows of exponentials of logits - top [B, n_kv_heads, G L, ·].

    output: times the values; total: themselves; top: the greatest logit.
    """

    output: mx.array
    total: mx.array
    top: mx.array

    def with_tile(self, logits: mx.array, tile: Tile) -> _Sums:
        top = mx.maximum(self.top, logits.max(axis=-1, keepdims=True))
        weights, before = _exponential(logits - top), mx.exp(self.top - top)
        output = product(weights, tile.values, transpose=False)
        total = weights.sum(axis=-1, keepdims=True)
        return _Sums(self.output * before + output, self.total * before + total, top)


_NOTHING = _Sums(mx.array(0.0), mx.array(0.0), mx.array(_LOWEST))


def _logits(queries: mx.array, tile: Tile) -> mx.array:
    """[B, n_kv_heads, G L, n], -inf where there is no row."""
    logits = product(queries, tile.keys, transpose=True)
    return mx.where(tile.there[:, :, None], logits, -mx.inf)


def _best_of_blocks(logits: mx.array, group: int, newest: int) -> mx.array:
    """The greatest logit in each block [B, n_kv_heads, newest, blocks]."""
    *first, rows, n = logits.shape
    logits = logits.reshape(*first, group, rows // group, n)[..., -newest:, :]
    blocks = logits.reshape(*first, group, newest, n // RECALL_BLOCK, RECALL_BLOCK)
    # One axis after the other: both at once take MLX's CPU backend longer.
    return blocks.max(axis=-1).max(axis=2)


def _greatest_blocks(best: mx.array, n: int) -> mx.array:
    """The places in the n greatest blocks of the last axis, in order."""
    blocks = mx.sort(mx.argpartition(-best, n - 1)[..., :n])
    places = blocks[..., None] * RECALL_BLOCK + mx.arange(RECALL_BLOCK)
    return places.flatten(-2, -1).astype(mx.int32)


def _exponential(logits: mx.array) -> mx.array:
    if on_gpu():
        return mx.exp(logits)
    # MLX's CPU backend takes one number at a time, ten times as long.
    result = np.array(logits)
    np.exp(result, out=result)
    return mx.array(result)
