"""What a chunk's queries read of what was evicted: all of it.

The weights are those of a softmax over all tokens, as in the full cache. Reading few
rows, even the best of thousands by exact choice, costs more quality than it saves time:
see CHANGELOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..policies import RECALL_BLOCK
from ..storage.archive import Archive, Rows, Tile, stored_as
from ..storage.device import on_gpu
from ..storage.disk_archive import DiskArchive
from ..storage.entries import product

# Weights of a head that a tile has: more do not stay in a CPU's cache, and take twice
# as long.
_TOGETHER = 1 << 17
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
) -> tuple[Recalled | None, mx.array | None]:
    """Attend to all evicted rows: those of an archive, and those that wait for it.

    queries: [B, n_heads, L, head_dim], scaled; shown: a multiple of 16. Returns, for so
    many of the newest queries, the archived positions that each attends to most too, in
    blocks of 16, -1 where one has no row: int32 [B, n_kv_heads, newest, shown], or all
    that the archive may have; None if it has no row. The heads of a KV head have
    them together.
    """
    if waiting is None and not archive.room:
        return None, None
    heads = archive.n_kv_heads if waiting is None else waiting.keys.shape[1]
    found = _Found(newest)
    ahead = Ahead(queries, heads, archive, found)
    return ahead.next(queries.shape[2], waiting), found.positions(archive, shown)


def attended_most(
    queries: mx.array, archive: Archive | DiskArchive, *, shown: int
) -> mx.array | None:
    """Return the archived positions that `recall` says the queries attend to most."""
    found = _Found(queries.shape[2])
    if archive.room:
        asked = _grouped(queries, archive.n_kv_heads)
        for tile, logits in _tiles(asked, archive):
            found.add(tile, logits)
    return found.positions(archive, shown)


class _Found:
    """The greatest logits of the newest queries, of tile after tile."""

    def __init__(self, newest: int):
        self._newest = newest
        self.best: list[mx.array] = []
        self._there: list[mx.array] = []

    def add(self, tile: Tile, logits: mx.array) -> None:
        """logits: [B, n_kv_heads, G, L, n]."""
        blocks = mx.unflatten(logits[..., -self._newest :, :], -1, (-1, RECALL_BLOCK))
        # One axis after the other: both at once take MLX's CPU backend longer.
        self.best.append(blocks.max(axis=-1).max(axis=2))
        self._there.append(tile.there)

    def positions(self, archive: Archive | DiskArchive, shown: int) -> mx.array | None:
        """Return those in the best blocks, -1 where there is no row."""
        if not self.best:
            return None
        blocks = mx.concatenate(self.best, axis=-1)
        columns = _greatest_blocks(blocks, min(shown // RECALL_BLOCK, blocks.shape[-1]))
        held = mx.concatenate(self._there, axis=-1)[:, :, None]
        held = mx.broadcast_to(held, (*columns.shape[:3], held.shape[-1]))
        held = mx.take_along_axis(held, columns, axis=-1)
        return mx.where(held, archive.start + columns, -1)


class Ahead:
    """Attention to an archive, for all queries of a chunk that comes in parts.

    What is archived between two parts is told, so that each row is unpacked once for
    all queries that attend to it.

    queries: [B, n_heads, L, head_dim], scaled; found: is given all tiles.
    """

    def __init__(
        self,
        queries: mx.array,
        n_kv_heads: int,
        archive: Archive | DiskArchive,
        found: _Found | None = None,
    ):
        self._asked = _grouped(queries, n_kv_heads)
        self._begin(archive, found)

    def _begin(
        self, archive: Archive | DiskArchive, found: _Found | None = None
    ) -> None:
        self._sums, self._lost = _NOTHING, archive.lost
        self._is_empty = not archive.room
        for tile, logits in _tiles(self._asked, archive):
            self._sums = self._sums.with_tile(logits, tile)
            if found is not None:
                found.add(tile, logits)
            if self._asked.shape[3] * archive.room > _MANY:
                # On the CPU `_exponential` waits anyway.
                wanted = [] if found is None else found.best[-1:]
                (mx.async_eval if on_gpu() else mx.eval)(*self._sums, *wanted)

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
        if self._is_empty and waiting is None:
            return None
        return sums.with_rows(asked, waiting).recalled()

    def archived(self, rows: Rows, archive: Archive | DiskArchive) -> None:
        """Let the queries left attend to rows that the archive has now, too."""
        if archive.lost != self._lost:
            # What they attended to may be gone.
            self._begin(archive)
            return
        self._sums = self._sums.with_rows(self._asked, stored_as(archive.storage, rows))
        self._is_empty = False


def _grouped(queries: mx.array, n_kv_heads: int) -> mx.array:
    """[B, n_kv_heads, G, L, head_dim], in float32."""
    batch, n_heads, *shape = queries.shape
    group = n_heads // n_kv_heads
    return queries.astype(mx.float32).reshape(batch, n_kv_heads, group, *shape)


def _tiles(
    asked: mx.array, archive: Archive | DiskArchive
) -> Iterator[tuple[Tile, mx.array]]:
    """Yield an archive's tiles, and the logits of each [B, n_kv_heads, G, L, n]."""
    for tile in archive.tiles(_TOGETHER // asked.shape[3]):
        yield tile, _logits(asked, tile)


class _Sums(NamedTuple):
    """Sums over rows of exponentials of logits - top [B, n_kv_heads, G, L, ·].

    output: times the values; total: themselves; top: the greatest logit.
    """

    output: mx.array
    total: mx.array
    top: mx.array

    def with_tile(self, logits: mx.array, tile: Tile) -> _Sums:
        top = mx.maximum(self.top, logits.max(axis=-1, keepdims=True))
        weights, before = _exponential(logits - top), mx.exp(self.top - top)
        output = product(weights.flatten(2, 3), tile.values, transpose=False)
        output = output.reshape(*weights.shape[:4], -1)
        total = weights.sum(axis=-1, keepdims=True)
        return _Sums(self.output * before + output, self.total * before + total, top)

    def with_rows(self, asked: mx.array, rows: Rows | None) -> _Sums:
        """With rows by position, -1 for none; None: as they are."""
        if rows is None:
            return self
        tile = Tile(rows.keys, rows.values, rows.positions >= 0)
        return self.with_tile(_logits(asked, tile), tile)

    def cut(self, start: int, stop: int | None) -> _Sums:
        """Return those of queries start to stop."""
        if not self.top.ndim:
            return self
        return _Sums(*(a[..., start:stop, :] for a in self))

    def recalled(self) -> Recalled:
        # There is nothing in a batch row that has evicted nothing.
        output = self.output / mx.where(self.total == 0, 1, self.total)
        lse = self.top + mx.log(self.total)
        return Recalled(output.flatten(1, 2), lse.flatten(1, 2))


_NOTHING = _Sums(mx.array(0.0), mx.array(0.0), mx.array(_LOWEST))


def _logits(queries: mx.array, tile: Tile) -> mx.array:
    """[B, n_kv_heads, G, L, n], -inf where there is no row."""
    logits = product(queries.flatten(2, 3), tile.keys, transpose=True)
    logits = logits.reshape(*queries.shape[:4], -1)
    return mx.where(tile.there[:, :, None, None], logits, -mx.inf)


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
