"""Rows that a layer evicted and attends to all the same: in memory.

A row lies at its token's position, so that neighbours are found without an index.
Shapes: entries [B, n_kv_heads, C, head_dim], C positions of which some hold a row; H'
is 1 or n_kv_heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from ..policies import RECALL_BLOCK
from .entries import (
    Entries,
    arrays_of,
    each,
    gather,
    is_plain,
    pad,
    write,
)
from .formats import Storage

# Positions for which room is made at least, and by which it grows.
ROOM = 1024
# Positions that are attended to at once, at most and at least.
TILE, LEAST_TILE = 4096, 128


class Tile(NamedTuple):
    """Keys and values of n positions; there: which hold a row, bool [B, H', n]."""

    keys: Entries
    values: Entries
    there: mx.array


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
        # A slice of everything is still work for the device.
        if (start, stop) == (0, self.length):
            return self
        return Rows(*(each(lambda a: a[:, :, start:stop], part) for part in self))


@dataclass(frozen=True)
class Archive:
    """Rows evicted, of one layer. Never changed in place.

    storage: their format; count: how many each batch row and head was given, `lost`
    ones too; seen: above all positions that do; there: bool [B, H', C], which do.
    """

    storage: Storage
    count: int = 0
    lost: int = 0
    seen: int = 0
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
            seen=seen,
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

    def tiles(self, most: int = TILE) -> Iterator[Tile]:
        """Yield all positions that have been seen, in order, about so many at once."""
        for start, stop in tiles(min(self.room, self.seen), most):
            keys, values = (
                each(lambda a, i=start, j=stop: a[:, :, i:j], entries)
                for entries in (self.keys, self.values)
            )
            assert self.there is not None
            yield Tile(keys, values, self.there[..., start:stop])

    def rows(self) -> Rows:
        """Return all rows, in order of position."""
        assert self.there is not None
        # Those that are not there come last.
        last = mx.where(self.there, mx.arange(self.room), self.room)
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
        return replace(
            self,
            keys=pad(self.keys, 0, more),
            values=pad(self.values, 0, more),
            there=pad(self.there, 0, more),
        )


def tiles(n: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield where each tile of n positions begins and ends, at multiples of 16."""
    size = min(max(most, LEAST_TILE), TILE) // RECALL_BLOCK * RECALL_BLOCK
    n = -(-n // RECALL_BLOCK) * RECALL_BLOCK
    for start in range(0, n, size):
        yield start, min(start + size, n)


def stored_as(storage: Storage, rows: Rows) -> Rows:
    """Return rows in an archive's formats; quantised ones are in them already."""
    if is_plain(rows.keys) and is_plain(rows.values):
        return Rows(*storage.store(rows.keys, rows.values), rows.positions)
    return rows


def _put(there: Any, positions: mx.array, value: bool) -> mx.array:
    new = mx.full(positions.shape, value)
    return mx.put_along_axis(there, positions, new, axis=2)
