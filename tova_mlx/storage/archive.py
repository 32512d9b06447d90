"""Rows that a layer evicted, to be brought back: all of them, in memory.

A row lies at its token's position, so that neighbours are found without an index.
Shapes: entries [B, n_kv_heads, C, head_dim], C positions of which some hold a row; H'
is 1 or n_kv_heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from .entries import (
    Entries,
    after,
    arrays_of,
    dequantized,
    each,
    gather,
    is_plain,
    pad,
    write,
)
from .formats import Storage

# Positions for which room is made at least, and by which it grows.
ROOM = 1024
# Positions whose keys are compared with queries at once.
TILE = 4096
# Neighbours whose mean value stands for those that are not read.
MEAN_OF = 4


class Tile(NamedTuple):
    """What is read of n positions by whoever chooses among them.

    there: which hold a row, bool [B, H', n]; means: of every 4 positions, the mean of
    their rows' values [B, n_kv_heads, n / 4, head_dim].
    """

    keys: Entries
    there: mx.array
    means: Entries


class Rows(NamedTuple):
    """Keys, values and positions of tokens [B, n_kv_heads or H', n]; -1: no row."""

    keys: Entries
    values: Entries
    positions: mx.array

    @property
    def length(self) -> int:
        return self.positions.shape[2]

    def cut(self, start: int, stop: int) -> Rows:
        """Return those from start to stop."""
        return Rows(*(each(lambda a: a[:, :, start:stop], part) for part in self))


@dataclass(frozen=True)
class Archive:
    """Rows evicted, of one layer. Never changed in place.

    storage: their format; count: how many each batch row and head was given, lost ones
    too; there: bool [B, H', C], which positions hold one; means: of every 4 positions,
    the mean of their rows' values [B, n_kv_heads, C / 4, head_dim], in their format.
    """

    storage: Storage
    count: int = 0
    lost: int = 0
    keys: Any = None
    values: Any = None
    there: mx.array | None = None
    means: Any = None

    def __deepcopy__(self, memo: Any) -> Archive:
        # What is never changed need not be doubled.
        return self

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        there = () if self.there is None else (self.there,)
        entries = (self.keys, self.values, self.means)
        return (*(a for e in entries for a in arrays_of(e)), *there)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    @property
    def held(self) -> int:
        """Rows that are there, of each batch row and head."""
        return self.count - self.lost

    def empty(self) -> Archive:
        """Return one that holds nothing."""
        return Archive(self.storage)

    def add(self, rows: Rows, seen: int) -> Archive:
        """Return an archive that holds these too; seen: above all positions."""
        if not rows.length:
            return self
        keys, values, positions = stored_as(self.storage, rows)
        grown = self._with_room(keys, values, positions, seen)
        new = replace(
            grown,
            count=self.count + rows.length,
            keys=write(grown.keys, keys, positions),
            values=write(grown.values, values, positions),
            there=_put(grown.there, positions, True),
        )
        return new.with_means(positions)

    def without(self, rows: Rows) -> Archive:
        """Return the archive before rows were added."""
        if not rows.length:
            return self
        if rows.length == self.count:
            return self.empty()
        there = _put(self.there, rows.positions, False)
        old = replace(self, count=self.count - rows.length, there=there)
        return old.with_means(rows.positions)

    def with_means(self, positions: mx.array | None = None) -> Archive:
        """Return the archive with all means anew, or those that positions are part of.

        Each is computed of all its rows, so that it does not depend on when they came,
        or on rows that were taken back.
        """
        assert self.there is not None
        n = self.room // MEAN_OF
        if positions is None or positions.shape[2] >= n:
            groups = mx.broadcast_to(mx.arange(n), (*self.there.shape[:2], n))
        else:
            groups = positions // MEAN_OF
        means = self.means
        for start in range(0, groups.shape[2], TILE):
            some = groups[..., start : start + TILE]
            columns = rows_of(some, MEAN_OF)
            there = mx.broadcast_to(self.there, (*columns.shape[:2], self.room))
            values = gather(self.values, columns)
            new = means_of(self.storage, values, gather(there, columns))
            if means is None:
                means = pad(each(lambda a: a[:, :, :0], new), 0, n)
            means = write(means, new, some)
        # They are in no state, so that who evaluates one evaluates them with it.
        there = after(self.there, list(arrays_of(means)))
        return replace(self, means=means, there=there)

    @property
    def n_kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def start(self) -> int:
        """Below it no position has a row; a multiple of 16."""
        return 0

    @property
    def room(self) -> int:
        """Positions from `start` on for which there is room, C: a multiple of 16."""
        return 0 if self.there is None else self.there.shape[2]

    def tiles(self) -> Iterator[Tile]:
        """Yield what is read of all positions, in order."""
        assert self.there is not None
        for start, stop in tiles(self.room):
            first, last = start // MEAN_OF, stop // MEAN_OF
            yield Tile(
                each(lambda a, i=start, j=stop: a[:, :, i:j], self.keys),
                self.there[..., start:stop],
                each(lambda a, i=first, j=last: a[:, :, i:j], self.means),
            )

    def values_of_tiles(self) -> Iterator[Entries]:
        """Yield values, of the same positions."""
        for start, stop in tiles(self.room):
            yield each(lambda a, i=start, j=stop: a[:, :, i:j], self.values)

    def take(self, columns: mx.array) -> Rows:
        """Return the rows at positions [B, n_kv_heads, n]."""
        keys, values = (gather(e, columns) for e in (self.keys, self.values))
        return Rows(keys, values, self.positions(columns))

    def positions(self, columns: mx.array) -> mx.array:
        """Return the positions [B, n_kv_heads, n] themselves, -1 where no row is."""
        assert self.there is not None
        there = mx.broadcast_to(self.there, (*columns.shape[:2], self.room))
        return mx.where(gather(there, columns), columns, -1)

    def rows(self) -> Rows:
        """Return all rows, in order of position."""
        assert self.there is not None
        # Those that are not there come last.
        last = mx.where(self.there, mx.arange(self.room), self.room)
        positions = mx.sort(last, axis=2)[..., : self.held]
        positions = positions.astype(mx.int32)
        keys, values = (gather(e, positions) for e in (self.keys, self.values))
        return Rows(keys, values, positions)

    def in_memory(self, seen: int) -> Archive:
        """Return the archive itself."""
        return self

    def synced(self) -> Archive:
        """Return the archive, ready to be asked for rows."""
        return self

    def _with_room(
        self, keys: Entries, values: Entries, positions: mx.array, seen: int
    ) -> Archive:
        there = self.room
        if seen <= there:
            return self
        # By a quarter at least, so that all that is copied is a few times the whole.
        room = -(-max(seen, there + there // 4) // ROOM) * ROOM
        if self.there is None:
            none = [each(lambda a: a[:, :, :0], e) for e in (keys, values)]
            empty = mx.zeros((*positions.shape[:2], 0), mx.bool_)
            self = replace(self, keys=none[0], values=none[1], there=empty)
        more = room - there
        means = self.means
        return replace(
            self,
            keys=pad(self.keys, 0, more),
            values=pad(self.values, 0, more),
            there=pad(self.there, 0, more),
            means=None if means is None else pad(means, 0, more // MEAN_OF),
        )


def tiles(room: int) -> Iterator[tuple[int, int]]:
    """Yield where each tile begins and ends."""
    for start in range(0, room, TILE):
        yield start, min(start + TILE, room)


def rows_of(blocks: mx.array, size: int) -> mx.array:
    """Return the positions [..., size n] of blocks [..., n] of so many, int32."""
    columns = blocks[..., None] * size + mx.arange(size)
    return columns.flatten(-2, -1).astype(mx.int32)


def means_of(storage: Storage, values: Entries, there: mx.array) -> Entries:
    """Return means of every 4 values [B, n_kv_heads, 4 n, head_dim].

    there: bool [B, H', 4 n], which of the values count.
    """
    shape = (*values.shape[:2], -1, MEAN_OF, values.shape[3])
    kept = mx.where(there[..., None], dequantized(values), 0).reshape(shape)
    counts = there.reshape(*there.shape[:2], -1, MEAN_OF).sum(axis=3)
    means = kept.sum(axis=3) / mx.maximum(counts, 1)[..., None]
    if is_plain(values):
        return means.astype(values.dtype)
    assert storage.values is not None
    return storage.values.quantize(means)


def stored_as(storage: Storage, rows: Rows) -> Rows:
    """Return rows in an archive's formats; quantised ones are in them already."""
    if is_plain(rows.keys) and is_plain(rows.values):
        return Rows(*storage.store(rows.keys, rows.values), rows.positions)
    return rows


def _put(there: Any, positions: mx.array, value: bool) -> mx.array:
    new = mx.full(positions.shape, value)
    return mx.put_along_axis(there, positions, new, axis=2)
