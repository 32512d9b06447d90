"""What a chunk's queries read of an archive: all of it.

The weights are those of a softmax over the slots and all archived rows, as in the full
cache. Reading few rows, even the best of thousands by exact choice, costs more quality
than it saves time: see docs/results.md.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..policies import RECALL_BLOCK
from ..storage.archive import Archive, rows_of
from ..storage.device import on_gpu
from ..storage.disk_archive import DiskArchive
from ..storage.entries import product

# Weights of a head beyond which each tile is computed before the next is thought of.
_MANY = 1 << 20
# Below all logits, and still a number: its exponential is 0.
_LOWEST = mx.finfo(mx.float32).min


class Recalled(NamedTuple):
    """Output [B, n_heads, L, D] over all archived rows.

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
    queries: mx.array, archive: Archive | DiskArchive, slots: int, *, newest: int = 1
) -> tuple[Recalled, mx.array]:
    """Attend to all rows of an archive.

    queries: [B, n_heads, L, head_dim], scaled; slots: a multiple of 16. Returns, for
    so many of the newest queries, the positions that each attends to most too, in
    blocks of 16, whether the archive has a row there or not: int32 [B, n_kv_heads,
    newest, slots], no more than the positions that it has room for. The heads of a KV
    head have them together.
    """
    batch, n_heads, length, width = queries.shape
    heads = archive.n_kv_heads
    group = n_heads // heads
    asked = queries.astype(mx.float32).reshape(batch, heads, group * length, width)
    output, total, top = mx.array(0.0), mx.array(0.0), mx.array(_LOWEST)
    best = []
    for tile in archive.tiles():
        logits = product(asked, tile.keys, transpose=True)
        logits = mx.where(tile.there[:, :, None], logits, -mx.inf)
        best.append(_best_of_blocks(logits, group, newest))
        highest = mx.maximum(top, logits.max(axis=-1, keepdims=True))
        weights, before = _exponential(logits - highest), mx.exp(top - highest)
        output = output * before + product(weights, tile.values, transpose=False)
        total = total * before + weights.sum(axis=-1, keepdims=True)
        top = highest
        if length * archive.room > _MANY:
            # On the CPU `_exponential` waits anyway.
            (mx.async_eval if on_gpu() else mx.eval)(output, total, top, best[-1])
    # There is nothing in a batch row that has evicted nothing.
    output = output / mx.where(total == 0, 1, total)
    lse = top + mx.log(total)
    columns = _greatest_blocks(mx.concatenate(best, axis=-1), slots // RECALL_BLOCK)
    return Recalled(
        *(a.reshape(batch, n_heads, length, -1) for a in (output, lse))
    ), archive.start + columns


def _best_of_blocks(logits: mx.array, group: int, newest: int) -> mx.array:
    """The greatest logit in each block [B, n_kv_heads, newest, blocks]."""
    *first, rows, n = logits.shape
    logits = logits.reshape(*first, group, rows // group, n)[..., -newest:, :]
    blocks = logits.reshape(*first, group, newest, n // RECALL_BLOCK, RECALL_BLOCK)
    # One axis after the other: both at once take MLX's CPU backend longer.
    return blocks.max(axis=-1).max(axis=2)


def _greatest_blocks(best: mx.array, n: int) -> mx.array:
    """The places in the n greatest blocks of the last axis, in order."""
    n = min(n, best.shape[-1])
    blocks = mx.sort(mx.argpartition(-best, n - 1)[..., :n])
    return rows_of(blocks, RECALL_BLOCK)


def _exponential(logits: mx.array) -> mx.array:
    if on_gpu():
        return mx.exp(logits)
    # MLX's CPU backend takes one number at a time, ten times as long.
    result = np.array(logits)
    np.exp(result, out=result)
    return mx.array(result)
