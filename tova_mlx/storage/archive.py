"""Rows that a layer evicted, to be brought back: all of them, in memory.

A row lies at its token's position, so that blocks of neighbours are found without an
index. For each block there is the mean of its keys, by which queries choose blocks.
Shapes: entries [B, n_kv_heads, C, head_dim], C positions of which some hold a row; H'
is 1 or n_kv_heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from ..policies import RECALL_BLOCK
from .entries import (
    Entries,
    arrays_of,
    dequantized,
    each,
    gather,
    is_plain,
    nbytes,
    pad,
    write,
)
from .formats import Storage

# Neighbours that come back together.
BLOCK = RECALL_BLOCK
# Positions for which room is made at least, and by which it grows.
ROOM = 1024


class Rows(NamedTuple):
    """Keys, values and positions of tokens [B, n_kv_heads or H', n]; -1: no row."""

    keys: Entries
    values: Entries
    positions: mx.array

    @property
    def length(self) -> int:
        return self.positions.shape[2]

    @property
    def nbytes(self) -> int:
        return nbytes(self.keys) + nbytes(self.values) + self.positions.nbytes

    @property
    def plain(self) -> tuple[mx.array, mx.array, mx.array]:
        """Those of a window, which are not quantised."""
        assert is_plain(self.keys)
        assert is_plain(self.values)
        return self.keys, self.values, self.positions

    def cut(self, start: int, stop: int) -> Rows:
        """Return those from start to stop."""
        return Rows(*(each(lambda a: a[:, :, start:stop], part) for part in self))


@dataclass(frozen=True)
class Archive:
    """Rows evicted, of one layer. Never changed in place.

    storage: their format; count: how many each batch row and head was given, lost ones
    too; there: bool [B, H', C], which positions hold one; means: float32 [B,
    n_kv_heads, C / 16, head_dim], of the keys of each block.
    """

    storage: Storage
    count: int = 0
    lost: int = 0
    keys: Any = None
    values: Any = None
    there: mx.array | None = None
    means: mx.array | None = None

    def __deepcopy__(self, memo: Any) -> Archive:
        # What is never changed need not be doubled.
        return self

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        others = [a for a in (self.there, self.means) if a is not None]
        return (*arrays_of(self.keys), *arrays_of(self.values), *others)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def add(self, rows: Rows, seen: int) -> Archive:
        """Return an archive that holds these too; seen: above all positions."""
        if not rows.length:
            return self
        keys, values, positions = stored_as(self.storage, rows)
        grown = self._with_room(keys, values, positions, seen)
        added = replace(
            grown,
            count=self.count + rows.length,
            keys=write(grown.keys, keys, positions),
            values=write(grown.values, values, positions),
            there=_put(grown.there, positions, True),
        )
        return added._summarised(positions)

    def without(self, rows: Rows) -> Archive:
        """Return the archive before rows were added."""
        if not rows.length:
            return self
        there = _put(self.there, rows.positions, False)
        fewer = replace(self, count=self.count - rows.length, there=there)
        return fewer._summarised(rows.positions)

    def choose(self, queries: mx.array, n: int) -> Rows:
        """Return the n rows that queries attend to most, in blocks of neighbours.

        queries: float32 [B, n_kv_heads, W, N, head_dim], W sets of N; n: a multiple of
        16. Returns [B, n_kv_heads, W * n, ·], chosen for each set and KV head.
        """
        assert self.there is not None
        assert self.means is not None
        batch, heads = queries.shape[:2]
        columns = best_positions(queries, self.means, self.there, n)
        there = mx.broadcast_to(self.there, (batch, heads, self.there.shape[2]))
        positions = mx.where(gather(there, columns), columns, -1)
        return Rows(gather(self.keys, columns), gather(self.values, columns), positions)

    def empty(self) -> Archive:
        """Return one that holds nothing."""
        return Archive(self.storage)

    def in_memory(self, seen: int) -> Archive:
        """Return the archive itself."""
        return self

    def synced(self) -> Archive:
        """Return the archive, ready to be asked for rows."""
        return self

    def rows(self) -> Rows:
        """Return all rows, in order of position."""
        assert self.there is not None
        room = self.there.shape[2]
        # Those that are not there come last.
        last = mx.where(self.there, mx.arange(room), room)
        positions = mx.sort(last, axis=2)[..., : self.count - self.lost]
        positions = positions.astype(mx.int32)
        return Rows(
            gather(self.keys, positions), gather(self.values, positions), positions
        )

    def _with_room(
        self, keys: Entries, values: Entries, positions: mx.array, seen: int
    ) -> Archive:
        there = 0 if self.there is None else self.there.shape[2]
        if seen <= there:
            return self
        # By a quarter at least, so that all that is copied is a few times the whole.
        room = -(-max(seen, there + there // 4) // ROOM) * ROOM
        if self.there is None:
            batch, heads = positions.shape[:2]
            none = [each(lambda a: a[:, :, :0], e) for e in (keys, values)]
            means = mx.zeros((*keys.shape[:2], 0, keys.shape[3]))
            empty = mx.zeros((batch, heads, 0), mx.bool_)
            self = replace(self, keys=none[0], values=none[1], there=empty, means=means)
        return replace(
            self,
            keys=pad(self.keys, 0, room - there),
            values=pad(self.values, 0, room - there),
            there=pad(self.there, 0, room - there),
            means=pad(self.means, 0, (room - there) // BLOCK),
        )

    def summarised(self) -> Archive:
        """Return the archive with the means of all its blocks made again."""
        batch, heads, room, _ = self.keys.shape
        means = mx.zeros((batch, heads, room // BLOCK, self.keys.shape[3]))
        each_block = mx.arange(0, room, BLOCK, dtype=mx.int32)
        shape = (batch, 1, room // BLOCK)
        each_block = mx.broadcast_to(each_block, shape)
        return replace(self, means=means)._summarised(each_block)

    def _summarised(self, positions: mx.array) -> Archive:
        """Return the archive with the means of these positions' blocks made again."""
        blocks = positions // BLOCK
        columns = (blocks[..., None] * BLOCK + mx.arange(BLOCK)).flatten(2)
        batch, heads, width = (self.keys.shape[i] for i in (0, 1, 3))
        shape = (batch, heads, blocks.shape[2], BLOCK)
        keys = dequantized(gather(self.keys, columns)).reshape(*shape, width)
        there: Any = gather(self.there, columns)
        there = mx.broadcast_to(there, (batch, heads, columns.shape[2]))
        weights = there.reshape(shape)[..., None]
        count = mx.maximum(weights.sum(axis=3), 1)
        means = mx.where(weights, keys, 0).sum(axis=3) / count
        return replace(self, means=write(self.means, means, blocks))


def best_positions(
    queries: mx.array, means: mx.array, there: mx.array, n: int
) -> mx.array:
    """Return the n positions of the best blocks, int32 [B, n_kv_heads, W * n].

    queries: float32 [B, n_kv_heads, W, N, head_dim]; means: float32 [B, n_kv_heads,
    C / 16, head_dim]; there: bool [B, H', C].
    """
    batch, heads, sets, each_n, width = queries.shape
    logits = queries.reshape(batch, heads, -1, width) @ means.swapaxes(2, 3)
    scores = block_scores(logits.reshape(batch, heads, sets, each_n, -1))
    any_there = there.reshape(*there.shape[:2], -1, BLOCK).any(axis=-1)
    scores = mx.where(any_there[:, :, None], scores, -mx.inf)
    best = mx.argpartition(-scores, n // BLOCK - 1, axis=-1)[..., : n // BLOCK]
    # In order of position: what is added up is the same for any order.
    best = mx.sort(best, axis=-1).reshape(batch, heads, -1)
    columns = best[..., None] * BLOCK + mx.arange(BLOCK)
    return columns.reshape(batch, heads, -1).astype(mx.int32)


def block_scores(logits: mx.array) -> mx.array:
    """Rank blocks by the logits of N queries, float32 [B, n_kv_heads, W, N, blocks]."""
    return logits.max(axis=3)


def stored_as(storage: Storage, rows: Rows) -> Rows:
    """Return rows in an archive's formats; quantised ones are in them already."""
    if is_plain(rows.keys) and is_plain(rows.values):
        return Rows(*storage.store(rows.keys, rows.values), rows.positions)
    return rows


def _put(there: Any, positions: mx.array, value: bool) -> mx.array:
    new = mx.full(positions.shape, value)
    return mx.put_along_axis(there, positions, new, axis=2)


def as_plain(rows: Rows, dtype: mx.Dtype) -> Rows:
    """Return rows with keys and values as one array each."""
    keys, values = (
        e if is_plain(e) else dequantized(e) for e in (rows.keys, rows.values)
    )
    return Rows(keys.astype(dtype), values.astype(dtype), rows.positions)
