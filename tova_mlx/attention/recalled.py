"""What a chunk's queries read of an archive.

Each query reads the blocks of neighbours in each of which it attends most to one key: a
summary of a block (its mean key, or its least and greatest numbers) misses the one
token in it that is asked for, see docs/results.md.

The weights are those of a softmax over the slots and all archived rows, as in the full
cache. Rows that are not read have the mean value of their 4 neighbours: otherwise the
few best of thousands, or the slots, would stand for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..policies import RECALL_BLOCK
from ..storage.archive import MEAN_OF, Archive, Tile, rows_of
from ..storage.device import on_gpu
from ..storage.disk_archive import DiskArchive
from ..storage.entries import Entries, dequantized, product


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
    queries: mx.array, archive: Archive | DiskArchive, n: int
) -> tuple[Recalled, mx.array]:
    """Attend to an archive, and read the n rows that each query attends to most.

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
    best = mx.concatenate([one.best for one in seen], axis=-1)
    # In order of position: what is added up is the same for any order.
    blocks = mx.sort(
        mx.argpartition(-best, n // RECALL_BLOCK - 1)[..., : n // RECALL_BLOCK]
    )
    columns = archive.start + rows_of(blocks, RECALL_BLOCK)
    chosen = mx.zeros(best.shape, mx.bool_)
    chosen = mx.put_along_axis(chosen, blocks, mx.array(True), axis=-1)
    top = functools.reduce(mx.maximum, (one.top for one in seen))
    # There is nothing in a batch row that has evicted nothing.
    top = mx.where(top == -mx.inf, 0, top)
    output = _read_values(archive, seen, chosen, top)
    if not whole:
        output = output + _read_rows(asked, archive, columns, top)
    total = mx.array(0.0)
    for one in seen:
        total = total + mx.exp(one.top - top) * one.sums.sum(axis=-1, keepdims=True)
    output = output / mx.where(total == 0, 1, total)
    lse = top + mx.log(total)
    return Recalled(
        *(a.reshape(batch, n_heads, length, -1) for a in (output, lse))
    ), columns


class _Seen(NamedTuple):
    """What queries see of a tile.

    best: the greatest logit in each block [B, n_kv_heads, L, blocks]; top: the greatest
    of all [B, n_kv_heads, G, L, 1]; weights: exponentials of logits - top [B,
    n_kv_heads, G, L, n]; sums: of every 4 of them [B, n_kv_heads, G, L, n / 4]; means:
    the tile's.
    """

    best: mx.array
    top: mx.array
    weights: mx.array | None
    sums: mx.array
    means: Entries


def _see(queries: mx.array, tile: Tile) -> _Seen:
    batch, heads, group, length, width = queries.shape
    flat = queries.reshape(batch, heads, group * length, width)
    logits = product(flat, tile.keys, transpose=True)
    logits = mx.where(tile.there[:, :, None], logits, -mx.inf)
    logits = logits.reshape(batch, heads, group, length, -1)
    # One axis after the other: both at once take MLX's CPU backend longer.
    blocks = _grouped(logits, RECALL_BLOCK).max(axis=-1)
    top = blocks.max(axis=-1, keepdims=True)
    weights = _exponentials(logits, mx.where(top == -mx.inf, 0, top))
    sums = _grouped(weights, MEAN_OF).sum(axis=-1)
    return _Seen(blocks.max(axis=2), top, weights, sums, tile.means)


def _grouped(rows: mx.array, size: int) -> mx.array:
    """[..., size n] as [..., n, size]."""
    return rows.reshape(*rows.shape[:-1], -1, size)


def _exponentials(logits: mx.array, top: mx.array) -> mx.array:
    """exp(logits - top)."""
    if on_gpu():
        return mx.exp(logits - top)
    # MLX's CPU backend takes one number at a time, ten times as long.
    result = np.array(logits - top)
    np.exp(result, out=result)
    return mx.array(result)


def _read_values(
    archive: Archive | DiskArchive,
    seen: Sequence[_Seen],
    chosen: mx.array,
    top: mx.array,
) -> mx.array:
    """Weigh means where a block is not chosen [B, n_kv_heads, L, blocks], or its rows.

    Rows only if their weights are known. Returns [B, n_kv_heads, G, L, D], of the
    exponentials of logits - top.
    """
    output, start = mx.array(0.0), 0
    rows = archive.values_of_tiles()
    for one in seen:
        stop = start + one.best.shape[-1]
        read = chosen[:, :, None, :, start:stop, None]
        rest = mx.where(read, 0, _grouped(one.sums, RECALL_BLOCK // MEAN_OF))
        part = _weighed(rest.flatten(-2, -1), one.means)
        if one.weights is not None:
            own = mx.where(read, _grouped(one.weights, RECALL_BLOCK), 0)
            part = part + _weighed(own.flatten(-2, -1), next(rows))
        output = output + mx.exp(one.top - top) * part
        start = stop
    return output


def _weighed(weights: mx.array, values: Entries) -> mx.array:
    """weights [B, n_kv_heads, G, L, n] times values [B, n_kv_heads, n, D]."""
    *first, group, length, n = weights.shape
    flat = weights.reshape(*first, group * length, n)
    return product(flat, values, transpose=False).reshape(*first, group, length, -1)


def _read_rows(
    queries: mx.array,
    archive: Archive | DiskArchive,
    columns: mx.array,
    top: mx.array,
) -> mx.array:
    """Weigh rows [B, n_kv_heads, L, n], fetched for each query; as `_read_values`."""
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
    return (mx.exp(logits - top.swapaxes(2, 3)) @ values).swapaxes(2, 3)
