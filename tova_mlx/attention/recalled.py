"""What a chunk's queries read of an archive.

Each query reads the blocks of neighbours in each of which it attends most to one key: a
summary of a block (its mean key, or its least and greatest numbers) misses the one
token in it that is asked for, see docs/results.md.

Both parts of an attention, over the slots and over what came back, are softmaxes of
their own. What came back gets the share that it has in a softmax over the slots and all
archived rows, as in the full cache; the slots get the rest. A softmax over both parts
alone would give it more: the few best of thousands would stand for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..policies import RECALL_BLOCK
from ..storage.archive import Archive, Tile
from ..storage.device import on_gpu
from ..storage.disk_archive import DiskArchive
from ..storage.entries import dequantized, product


class Recalled(NamedTuple):
    """Output [B, n_heads, L, D] over what came back.

    lse, total: logsumexp of its logits, and of those of all archived rows, [B, n_heads,
    L, 1].
    """

    output: mx.array
    lse: mx.array
    total: mx.array

    def cut(self, start: int, stop: int) -> Recalled:
        """Return that of queries start to stop."""
        return Recalled(*(a[:, :, start:stop] for a in self))

    def merged(self, output: mx.array, lse: mx.array) -> mx.array:
        """Return the attention over both, given that over the slots alone."""
        share = mx.exp(self.lse - mx.logaddexp(self.total, lse))
        return (output * (1 - share) + self.output * share).astype(output.dtype)


def recall(
    queries: mx.array, archive: Archive | DiskArchive, n: int
) -> tuple[Recalled, mx.array]:
    """Attend to the n archived rows that each query attends to most, or to all rows.

    queries: [B, n_heads, L, head_dim], scaled; n: a multiple of 16. Those of one token
    in the heads of a KV head choose together. Returns the positions that each read,
    too, whether the archive has a row there or not: int32 [B, n_kv_heads, L, n], n no
    more than the positions that it has room for.
    """
    n = min(n, archive.room)
    batch, n_heads, length, width = queries.shape
    heads = archive.n_kv_heads
    asked = queries.astype(mx.float32)
    asked = asked.reshape(batch, heads, n_heads // heads, length, width)
    # Where every query's rows together are more than all there are, all are read, and
    # those not chosen have no weight.
    whole = length * n >= archive.room
    seen = []
    for tile in archive.tiles():
        one = _see(asked, tile)
        seen.append(one if whole else one._replace(weights=None))
    total = functools.reduce(mx.logaddexp, (one.total for one in seen))
    best = mx.concatenate([one.best for one in seen], axis=-1)
    # In order of position: what is added up is the same for any order.
    blocks = mx.sort(
        mx.argpartition(-best, n // RECALL_BLOCK - 1)[..., : n // RECALL_BLOCK]
    )
    columns = blocks[..., None] * RECALL_BLOCK + mx.arange(RECALL_BLOCK)
    columns = columns.flatten(3, 4).astype(mx.int32)
    if whole:
        output, lse = _read_whole(archive, seen, blocks)
    else:
        output, lse = _read_rows(asked, archive, columns)
    outputs = (a.reshape(batch, n_heads, length, -1) for a in (output, lse, total))
    return Recalled(*outputs), columns


class _Seen(NamedTuple):
    """What queries see of a tile.

    best: the greatest logit in each block [B, n_kv_heads, L, blocks]; weights: the
    exponentials of logits - top [B, n_kv_heads, G, L, n]; top, total: the greatest of
    all logits and their logsumexp [B, n_kv_heads, G, L, 1].
    """

    best: mx.array
    top: mx.array
    total: mx.array
    weights: mx.array | None


def _see(queries: mx.array, tile: Tile) -> _Seen:
    keys, there = tile
    batch, heads, group, length, width = queries.shape
    flat = queries.reshape(batch, heads, group * length, width)
    logits = product(flat, keys, transpose=True)
    logits = mx.where(there[:, :, None], logits, -mx.inf)
    logits = logits.reshape(batch, heads, group, length, -1)
    # One axis after the other: both at once take MLX's CPU backend longer.
    blocks = logits.reshape(*logits.shape[:4], -1, RECALL_BLOCK).max(axis=-1)
    top = blocks.max(axis=-1, keepdims=True)
    weights = _exponentials(logits, mx.where(top == -mx.inf, 0, top))
    total = top + mx.log(weights.sum(axis=-1, keepdims=True))
    return _Seen(blocks.max(axis=2), top, total, weights)


def _exponentials(logits: mx.array, top: mx.array) -> mx.array:
    """exp(logits - top)."""
    if on_gpu():
        return mx.exp(logits - top)
    # MLX's CPU backend takes one number at a time, ten times as long.
    result = np.array(logits - top)
    np.exp(result, out=result)
    return mx.array(result)


def _read_whole(
    archive: Archive | DiskArchive, seen: Sequence[_Seen], blocks: mx.array
) -> tuple[mx.array, mx.array]:
    """Attend to blocks [B, n_kv_heads, L, ·]: output [B, n_kv_heads, G, L, D], lse."""
    sizes = [one.best.shape[-1] for one in seen]
    chosen = mx.zeros((*blocks.shape[:3], sum(sizes)), mx.bool_)
    chosen = mx.put_along_axis(chosen, blocks, mx.array(True), axis=-1)
    top = functools.reduce(mx.maximum, (one.top for one in seen))
    output, total, start = mx.array(0.0), mx.array(0.0), 0
    for one, size, values in zip(seen, sizes, archive.values_of_tiles(), strict=True):
        assert one.weights is not None
        read = chosen[:, :, None, :, start : start + size, None]
        weights = one.weights.reshape(*one.weights.shape[:4], size, RECALL_BLOCK)
        weights = mx.where(read, weights, 0).reshape(one.weights.shape)
        batch, heads, group, length, n = weights.shape
        part = product(
            weights.reshape(batch, heads, group * length, n), values, transpose=False
        )
        scale = mx.exp(mx.where(one.top == -mx.inf, -mx.inf, one.top - top))
        output = output + scale * part.reshape(batch, heads, group, length, -1)
        total = total + scale * weights.sum(axis=-1, keepdims=True)
        start += size
    # A head whose own logits are far below those of what its group chose reads nothing.
    return output / mx.where(total == 0, 1, total), top + mx.log(total)


def _read_rows(
    queries: mx.array, archive: Archive | DiskArchive, columns: mx.array
) -> tuple[mx.array, mx.array]:
    """As `_read_whole`, of columns [B, n_kv_heads, L, n], fetched for each query."""
    batch, heads, length, n = columns.shape
    rows = archive.take(columns.reshape(batch, heads, -1))
    # [B, n_kv_heads, L, G, D] by [B, n_kv_heads, L, n, D]
    keys, values = (
        dequantized(e).reshape(batch, heads, length, n, -1)
        for e in (rows.keys, rows.values)
    )
    there = rows.positions.reshape(*columns.shape)[..., None, :] >= 0
    logits = queries.swapaxes(2, 3) @ keys.swapaxes(3, 4)
    logits = mx.where(there, logits, -mx.inf)
    lse = mx.logsumexp(logits, axis=-1, keepdims=True)
    # A query that finds no rows gives them no weight.
    weights = mx.exp(logits - mx.where(lse == -mx.inf, 0, lse))
    return (weights @ values).swapaxes(2, 3), lse.swapaxes(2, 3)
