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
from ..storage.archive import Archive, Rows
from ..storage.device import on_gpu
from ..storage.disk_archive import DiskArchive
from ..storage.entries import product

# Weights of a head that a tile has; and in all, beyond which each tile is computed
# before the next is thought of.
_MANY = 1 << 20
# That a tile has on a CPU: more do not stay in its cache, and take twice as long.
_FEWER = 1 << 17
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
    queries: mx.array, archive: Archive | DiskArchive, waiting: Rows | None = None
) -> Recalled | None:
    """Attend to all evicted rows: those of an archive, and those that wait for it.

    queries: [B, n_heads, L, head_dim], scaled. None: there are none.
    """
    if waiting is None and not archive.held:
        return None
    heads = archive.n_kv_heads if waiting is None else waiting.keys.shape[1]
    return Ahead(queries, heads, archive).next(queries.shape[2], waiting)


def attended_most(
    queries: mx.array, archive: Archive | DiskArchive, count: int, n: int
) -> np.ndarray | None:
    """Return which of an archive's first `count` rows each query attends to most.

    queries: [B, n_heads, L, head_dim], scaled; n: a multiple of 16. Returns positions
    in blocks of 16, -1 where one has no row: int32 [B, n_kv_heads, L, n]; None if there
    are no rows. The heads of a KV head have them together.
    """
    count -= archive.lost
    if min(count, archive.held) <= 0:
        return None
    asked = _grouped(queries, archive.n_kv_heads)
    logits, positions = [], []
    for tile in archive.tiles(_rows_at_once(asked)):
        logits.append(np.array(_logits(asked, tile).max(axis=2)))
        positions.append(np.array(tile.positions))
    found = np.concatenate(logits, axis=-1)[..., :count]
    there = np.concatenate(positions, axis=-1)[..., :count]
    most = np.full((*found.shape[:3], n), -1, np.int32)
    for b, h in np.ndindex(*found.shape[:2]):
        # H' may be 1.
        of_head = there[b, min(h, there.shape[1] - 1)]
        best = _in_best_blocks(found[b, h], of_head, n // RECALL_BLOCK)
        most[b, h, :, : best.shape[1]] = best
    return most


def _in_best_blocks(logits: np.ndarray, positions: np.ndarray, n: int) -> np.ndarray:
    """Positions [N] in the n blocks with the greatest logits [L, N], ascending."""
    order = np.argsort(positions)
    positions, logits = positions[order], logits[:, order]
    starts = np.flatnonzero(np.diff(positions // RECALL_BLOCK, prepend=-1))
    best = np.maximum.reduceat(logits, starts, axis=1)
    n = min(n, len(starts))
    blocks = np.sort(np.argpartition(-best, n - 1, axis=1)[:, :n], axis=1)
    stops = np.append(starts[1:], len(positions))
    places = starts[blocks][..., None] + np.arange(RECALL_BLOCK)
    there = places < stops[blocks][..., None]
    found = np.where(there, positions[np.minimum(places, len(positions) - 1)], -1)
    return found.reshape(len(logits), -1)


class Ahead:
    """Attention to an archive, for all queries of a chunk that comes in parts.

    What is archived between two parts is told, so that each row is unpacked once for
    all queries that attend to it.

    queries: [B, n_heads, L, head_dim], scaled.
    """

    def __init__(
        self, queries: mx.array, n_kv_heads: int, archive: Archive | DiskArchive
    ):
        self._asked = _grouped(queries, n_kv_heads)
        self._sums, self._read, self._lost = _NOTHING, 0, archive.lost
        self.read(archive)

    def read(self, archive: Archive | DiskArchive) -> None:
        """Let the queries left attend to what the archive has that it had not."""
        if archive.lost != self._lost:
            # What they attended to may be gone.
            self._sums, self._read, self._lost = _NOTHING, 0, archive.lost
        for tile in archive.tiles(_rows_at_once(self._asked), self._read):
            self._sums = self._sums.with_rows(self._asked, tile)
            if self.left * archive.held > _MANY:
                # On the CPU `_exponential` waits anyway.
                (mx.async_eval if on_gpu() else mx.eval)(*self._sums)
        self._read = archive.held

    @property
    def left(self) -> int:
        """Queries that have not been asked for."""
        return self._asked.shape[3]

    def next(self, n: int, waiting: Rows | None) -> Recalled | None:
        """Return what the next n queries read, of rows that wait too; None: nothing."""
        asked, sums = self._asked, self._sums
        if n < self.left:
            asked, sums = asked[..., :n, :], sums.cut(0, n)
        self._asked, self._sums = self._asked[..., n:, :], self._sums.cut(n, None)
        if waiting is not None:
            sums = sums.with_rows(asked, waiting)
        elif not self._read:
            return None
        return sums.recalled()


def _grouped(queries: mx.array, n_kv_heads: int) -> mx.array:
    """[B, n_kv_heads, G, L, head_dim], in float32."""
    batch, n_heads, *shape = queries.shape
    group = n_heads // n_kv_heads
    return queries.astype(mx.float32).reshape(batch, n_kv_heads, group, *shape)


def _rows_at_once(asked: mx.array) -> int:
    """Rows of a tile, given the queries [B, n_kv_heads, G, L, head_dim]."""
    return (_MANY if on_gpu() else _FEWER) // asked.shape[3]


class _Sums(NamedTuple):
    """Sums over rows of exponentials of logits - top [B, n_kv_heads, G, L, ·].

    output: times the values; total: themselves; top: the greatest logit.
    """

    output: mx.array
    total: mx.array
    top: mx.array

    def with_rows(self, asked: mx.array, rows: Rows) -> _Sums:
        logits = _logits(asked, rows)
        top = mx.maximum(self.top, logits.max(axis=-1, keepdims=True))
        weights, before = _exponential(logits - top), mx.exp(self.top - top)
        output = product(weights.flatten(2, 3), rows.values, transpose=False)
        output = output.reshape(*weights.shape[:4], -1)
        total = weights.sum(axis=-1, keepdims=True)
        return _Sums(self.output * before + output, self.total * before + total, top)

    def cut(self, start: int, stop: int | None) -> _Sums:
        """Return those of queries start to stop."""
        if not self.top.ndim:
            return self
        return _Sums(*(a[..., start:stop, :] for a in self))

    def recalled(self) -> Recalled:
        output, lse = self.output / self.total, self.top + mx.log(self.total)
        return Recalled(output.flatten(1, 2), lse.flatten(1, 2))


_NOTHING = _Sums(mx.array(0.0), mx.array(0.0), mx.array(_LOWEST))


def _logits(queries: mx.array, rows: Rows) -> mx.array:
    """[B, n_kv_heads, G, L, n]."""
    logits = product(queries.flatten(2, 3), rows.keys, transpose=True)
    return logits.reshape(*queries.shape[:4], -1)


def _exponential(logits: mx.array) -> mx.array:
    if on_gpu():
        return mx.exp(logits)
    # MLX's CPU backend takes one number at a time, ten times as long.
    result = np.array(logits)
    np.exp(result, out=result)
    return mx.array(result)
