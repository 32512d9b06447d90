"""Rows that a layer evicted, to be brought back: all of them, in memory.

A row lies at its token's position, so that neighbours are found without an index. A
query chooses blocks of neighbours by the one key in each that it attends to most: a
summary of a block (its mean key, or its least and greatest numbers) misses the one
token in it that is asked for, see docs/results.md. Shapes: entries [B, n_kv_heads, C,
head_dim], C positions of which some hold a row; H' is 1 or n_kv_heads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

from ..policies import RECALL_BLOCK
from .entries import (
    Entries,
    arrays_of,
    dequantized,
    each,
    gather,
    is_plain,
    pad,
    product,
    write,
)
from .formats import Storage

# Neighbours that come back together.
BLOCK = RECALL_BLOCK
# Positions for which room is made at least, and by which it grows.
ROOM = 1024
# Positions whose keys are compared with queries at once.
TILE = 4096

# Keys of some positions, and which of them are there: bool [B, H', n].
Tile: TypeAlias = tuple[Entries, mx.array]


class Rows(NamedTuple):
    """Keys, values and positions of tokens [B, n_kv_heads or H', n]; -1: no row."""

    keys: Entries
    values: Entries
    positions: mx.array

    @property
    def length(self) -> int:
        return self.positions.shape[2]

    @property
    def plain(self) -> tuple[mx.array, mx.array, mx.array]:
        """Those of a window, which are not quantised."""
        assert is_plain(self.keys)
        assert is_plain(self.values)
        return self.keys, self.values, self.positions

    def cut(self, start: int, stop: int) -> Rows:
        """Return those from start to stop."""
        return Rows(*(each(lambda a: a[:, :, start:stop], part) for part in self))


class Chosen(NamedTuple):
    """Rows for some tokens [B, n_kv_heads, L * n, ·], for one after the other.

    total: the logsumexp of the logits of all rows, chosen or not, float32 [B,
    n_kv_heads, G, L].
    """

    rows: Rows
    total: mx.array


@dataclass(frozen=True)
class Archive:
    """Rows evicted, of one layer. Never changed in place.

    storage: their format; count: how many each batch row and head was given, lost ones
    too; there: bool [B, H', C], which positions hold one.
    """

    storage: Storage
    count: int = 0
    lost: int = 0
    keys: Any = None
    values: Any = None
    there: mx.array | None = None

    def __deepcopy__(self, memo: Any) -> Archive:
        # What is never changed need not be doubled.
        return self

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        there = () if self.there is None else (self.there,)
        return (*arrays_of(self.keys), *arrays_of(self.values), *there)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def empty(self) -> Archive:
        """Return one that holds nothing."""
        return Archive(self.storage)

    def add(self, rows: Rows, seen: int) -> Archive:
        """Return an archive that holds these too; seen: above all positions."""
        if not rows.length:
            return self
        keys, values, positions = stored_as(self.storage, rows)
        grown = self._with_room(keys, values, positions, seen)
        return replace(
            grown,
            count=self.count + rows.length,
            keys=write(grown.keys, keys, positions),
            values=write(grown.values, values, positions),
            there=_put(grown.there, positions, True),
        )

    def without(self, rows: Rows) -> Archive:
        """Return the archive before rows were added."""
        if not rows.length:
            return self
        if rows.length == self.count:
            return self.empty()
        there = _put(self.there, rows.positions, False)
        return replace(self, count=self.count - rows.length, there=there)

    def choose(self, queries: mx.array, n: int) -> Chosen:
        """Return the n rows that each query attends to most, in blocks of neighbours.

        queries: float32 [B, n_kv_heads, G, L, head_dim], those of one token in the
        heads of a KV head together; n: a multiple of 16.
        """
        assert self.there is not None
        columns, total = best_positions(queries, self._tiles(), n)
        there = mx.broadcast_to(self.there, (*columns.shape[:2], self.there.shape[2]))
        positions = mx.where(gather(there, columns), columns, -1)
        keys, values = (gather(e, columns) for e in (self.keys, self.values))
        return Chosen(Rows(keys, values, positions), total)

    def rows(self) -> Rows:
        """Return all rows, in order of position."""
        assert self.there is not None
        room = self.there.shape[2]
        # Those that are not there come last.
        last = mx.where(self.there, mx.arange(room), room)
        positions = mx.sort(last, axis=2)[..., : self.count - self.lost]
        positions = positions.astype(mx.int32)
        keys, values = (gather(e, positions) for e in (self.keys, self.values))
        return Rows(keys, values, positions)

    def in_memory(self, seen: int) -> Archive:
        """Return the archive itself."""
        return self

    def synced(self) -> Archive:
        """Return the archive, ready to be asked for rows."""
        return self

    def _tiles(self) -> Iterator[Tile]:
        assert self.there is not None
        for start in range(0, self.there.shape[2], TILE):
            stop = start + TILE
            keys = each(lambda a, i=start, j=stop: a[:, :, i:j], self.keys)
            yield keys, self.there[..., start:stop]

    def _with_room(
        self, keys: Entries, values: Entries, positions: mx.array, seen: int
    ) -> Archive:
        there = 0 if self.there is None else self.there.shape[2]
        if seen <= there:
            return self
        # By a quarter at least, so that all that is copied is a few times the whole.
        room = -(-max(seen, there + there // 4) // ROOM) * ROOM
        if self.there is None:
            none = [each(lambda a: a[:, :, :0], e) for e in (keys, values)]
            empty = mx.zeros((*positions.shape[:2], 0), mx.bool_)
            self = replace(self, keys=none[0], values=none[1], there=empty)
        return replace(
            self,
            keys=pad(self.keys, 0, room - there),
            values=pad(self.values, 0, room - there),
            there=pad(self.there, 0, room - there),
        )


def best_positions(
    queries: mx.array, tiles: Iterable[Tile], n: int
) -> tuple[mx.array, mx.array]:
    """Return the n positions of each token's best blocks, int32 [B, n_kv_heads, L * n].

    And the logsumexp of all logits, as `Chosen` has it.

    tiles: keys and which of them are there, of all positions in order; the others as
    in `Archive.choose`.
    """
    batch, heads = queries.shape[:2]
    found = [_scores(queries, *tile) for tile in tiles]
    scores = mx.concatenate([best for best, _ in found], axis=-1)
    best = mx.argpartition(-scores, n // BLOCK - 1, axis=-1)[..., : n // BLOCK]
    # In order of position: what is added up is the same for any order.
    columns = mx.sort(best, axis=-1)[..., None] * BLOCK + mx.arange(BLOCK)
    total = functools.reduce(mx.logaddexp, (total for _, total in found))
    return columns.reshape(batch, heads, -1).astype(mx.int32), total


def _scores(
    queries: mx.array, keys: Entries, there: mx.array
) -> tuple[mx.array, mx.array]:
    """The greatest logit in each block, [B, n_kv_heads, L, blocks], and their sum."""
    batch, heads, group, length, width = queries.shape
    flat = queries.reshape(batch, heads, group * length, width)
    logits = product(flat, keys, transpose=True)
    logits = mx.where(there[:, :, None], logits, -mx.inf)
    logits = logits.reshape(batch, heads, group, length, -1)
    blocks = logits.reshape(*logits.shape[:4], -1, BLOCK)
    return blocks.max(axis=(2, 5)), mx.logsumexp(logits, axis=-1)


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
