"""What a chunk's queries read of an archive.

Each query reads the blocks of neighbours in each of which it attends most to one key: a
summary of a block (its mean key, or its least and greatest numbers) misses the one
token in it that is asked for, see docs/results.md.

The weights are those of a softmax over the slots and all archived rows, as in the full
cache. Rows that are not read have the mean value of their 4 neighbours: otherwise the
few best of thousands, or the slots, would stand for all of them. How many are read
grows with the archive: means do no harm for all but 64 of 800 rows, and do for all but
64 of 8,000.
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

# One in so many archived rows is read at least.
READ_SHARE = 16
# Weights of a head that are there at once; more are computed a tile at a time, twice.
_KEPT = 1 << 20


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
    queries: mx.array, archive: Archive | DiskArchive, slots: int
) -> tuple[Recalled, mx.array]:
    """Attend to an archive, and read the rows that each query attends to most.

    queries: [B, n_heads, L, head_dim], scaled; slots: how many rows each reads, a
    multiple of 16, or one in 16 of all that there are, if that is more. Those of one
    token in the heads of a KV head choose together. Returns the positions of those that
    each attends to most, too, whether the archive has a row there or not: int32 [B,
    n_kv_heads, L, slots], no more than the positions that it has room for.
    """
    batch, n_heads, length, width = queries.shape
    heads = archive.n_kv_heads
    asked = queries.astype(mx.float32)
    asked = asked.reshape(batch, heads, n_heads // heads, length, width)
    n_blocks = archive.room // RECALL_BLOCK
    shown = min(slots // RECALL_BLOCK, n_blocks)
    share = -(-archive.held // (READ_SHARE * RECALL_BLOCK))
    n_read = min(max(shown, share), n_blocks)
    # Where every query's rows together are more than all there are, all are read, and
    # those not chosen have no weight.
    whole = length * n_read >= n_blocks
    many = length * archive.room > _KEPT
    seen = []
    for tile in archive.tiles():
        one = _see(asked, tile)
        if many or not whole:
            one = one._replace(weights=None)
        if many:
            _compute(one.best, one.top, one.sums)
        seen.append(one)
    best = mx.concatenate([one.best for one in seen], axis=-1)
    blocks = _greatest(best, n_read)
    chosen = mx.zeros(best.shape, mx.bool_)
    chosen = mx.put_along_axis(chosen, blocks, mx.array(True), axis=-1)
    top = functools.reduce(mx.maximum, (one.top for one in seen))
    # There is nothing in a batch row that has evicted nothing.
    top = mx.where(top == -mx.inf, 0, top)
    output = _read_means(seen, chosen, top)
    if whole:
        output = output + _read_values(asked, archive, seen, chosen, top)
    else:
        output = output + _read_rows(asked, archive, _columns(archive, blocks), top)
    total = mx.array(0.0)
    for one in seen:
        total = total + mx.exp(one.top - top) * one.sums.sum(axis=-1, keepdims=True)
    output = output / mx.where(total == 0, 1, total)
    lse = top + mx.log(total)
    if shown < n_read:
        blocks = _greatest(best, shown)
    return Recalled(
        *(a.reshape(batch, n_heads, length, -1) for a in (output, lse))
    ), _columns(archive, blocks)


def _compute(*arrays: mx.array) -> None:
    """Compute arrays now, or what they are computed from is there until all are."""
    # On the CPU `_exponentials` waits anyway.
    (mx.async_eval if on_gpu() else mx.eval)(*arrays)


def _greatest(best: mx.array, n: int) -> mx.array:
    """Return the n greatest of the last axis, in order of place.

    So what is added up is the same for any order.
    """
    return mx.sort(mx.argpartition(-best, n - 1)[..., :n])


def _columns(archive: Archive | DiskArchive, blocks: mx.array) -> mx.array:
    return archive.start + rows_of(blocks, RECALL_BLOCK)


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
    logits = _logits(queries, tile)
    # One axis after the other: both at once take MLX's CPU backend longer.
    blocks = _grouped(logits, RECALL_BLOCK).max(axis=-1)
    top = blocks.max(axis=-1, keepdims=True)
    weights = _exponentials(logits, top)
    sums = _grouped(weights, MEAN_OF).sum(axis=-1)
    return _Seen(blocks.max(axis=2), top, weights, sums, tile.means)


def _logits(queries: mx.array, tile: Tile) -> mx.array:
    """[B, n_kv_heads, G, L, n], -inf where there is no row."""
    batch, heads, group, length, width = queries.shape
    flat = queries.reshape(batch, heads, group * length, width)
    logits = product(flat, tile.keys, transpose=True)
    logits = mx.where(tile.there[:, :, None], logits, -mx.inf)
    return logits.reshape(batch, heads, group, length, -1)


def _grouped(rows: mx.array, size: int) -> mx.array:
    """[..., size n] as [..., n, size]."""
    return rows.reshape(*rows.shape[:-1], -1, size)


def _exponentials(logits: mx.array, top: mx.array) -> mx.array:
    """exp(logits - top), 0 where there is no row."""
    top = mx.where(top == -mx.inf, 0, top)
    if on_gpu():
        return mx.exp(logits - top)
    # MLX's CPU backend takes one number at a time, ten times as long.
    result = np.array(logits - top)
    np.exp(result, out=result)
    return mx.array(result)


def _read_means(seen: Sequence[_Seen], chosen: mx.array, top: mx.array) -> mx.array:
    """Weigh means where a block is not chosen [B, n_kv_heads, L, blocks].

    Returns [B, n_kv_heads, G, L, D], of the exponentials of logits - top.
    """
    output, start = mx.array(0.0), 0
    for one in seen:
        read = _of_tile(chosen, start, one)
        rest = mx.where(read, 0, _grouped(one.sums, RECALL_BLOCK // MEAN_OF))
        part = _weighed(rest.flatten(-2, -1), one.means)
        output = output + mx.exp(one.top - top) * part
        start += one.best.shape[-1]
    return output


def _read_values(
    queries: mx.array,
    archive: Archive | DiskArchive,
    seen: Sequence[_Seen],
    chosen: mx.array,
    top: mx.array,
) -> mx.array:
    """Weigh all values, those of blocks that are not chosen by 0; as `_read_means`."""
    output, start = mx.array(0.0), 0
    values = archive.values_of_tiles()
    again = archive.tiles() if seen[0].weights is None else None
    for one in seen:
        weights = one.weights
        if again is not None:
            weights = _exponentials(_logits(queries, next(again)), one.top)
        assert weights is not None
        read = _of_tile(chosen, start, one)
        own = mx.where(read, _grouped(weights, RECALL_BLOCK), 0)
        part = _weighed(own.flatten(-2, -1), next(values))
        output = output + mx.exp(one.top - top) * part
        if again is not None:
            _compute(output)
        start += one.best.shape[-1]
    return output


def _of_tile(chosen: mx.array, start: int, one: _Seen) -> mx.array:
    """Which of a tile's blocks are chosen [B, n_kv_heads, 1, L, blocks, 1]."""
    return chosen[:, :, None, :, start : start + one.best.shape[-1], None]


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
    """Weigh rows [B, n_kv_heads, L, n], fetched for each query; as `_read_means`."""
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
