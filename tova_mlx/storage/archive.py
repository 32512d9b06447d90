"""Rows that a layer evicted and attends to all the same: in memory.

They lie in the order in which they were evicted. Shapes: entries [B, n_kv_heads, C,
head_dim], with room for C rows; H' is 1 or n_kv_heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from .entries import Entries, arrays_of, each, is_plain, pad, write
from .formats import Storage

# Rows for which room is made at least, and by which it grows.
ROOM = 1024
# Rows that are attended to at once, at most and at least.
TILE, LEAST_TILE = 4096, 128


class Rows(NamedTuple):
    """Keys, values and positions of tokens [B, n_kv_heads or H', n]."""

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

    storage: their format; count: how many each batch row and head was given; lost: how
    many of these, the first, are not there.
    """

    storage: Storage
    count: int = 0
    lost: int = 0
    keys: Any = None
    values: Any = None
    positions: mx.array | None = None

    def __deepcopy__(self, memo: Any) -> Archive:
        # What is never changed need not be doubled.
        return self

    @property
    def held(self) -> int:
        """How many rows there are."""
        return self.count - self.lost

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return tuple(
            a for e in (self.keys, self.values, self.positions) for a in arrays_of(e)
        )

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def empty(self) -> Archive:
        """Return one that holds nothing."""
        return Archive(self.storage)

    def add(self, rows: Rows) -> Archive:
        """Return an archive that holds these too."""
        if not rows.length:
            return self
        rows = stored_as(self.storage, rows)
        there = rows.cut(0, 0) if self.positions is None else self._there()
        more = _more_room(there.length, self.held + rows.length)
        keys, values, positions = (
            write(pad(part, 0, more), new, self.held)
            for part, new in zip(there, rows, strict=True)
        )
        return replace(
            self,
            count=self.count + rows.length,
            keys=keys,
            values=values,
            positions=positions,
        )

    def without(self, n: int) -> Archive:
        """Return the archive before the last n rows were added."""
        if n == self.count:
            return self.empty()
        count = self.count - n
        return replace(self, count=count, lost=min(self.lost, count))

    @property
    def n_kv_heads(self) -> int:
        return self.keys.shape[1]

    def tiles(self, most: int, first: int = 0) -> Iterator[Rows]:
        """Yield rows from `first` on in order of eviction, about so many at once."""
        for start, stop in tiles(first, self.held, most):
            yield self._there().cut(start, stop)

    def rows(self) -> Rows:
        """Return all rows, in order of eviction."""
        return self._there().cut(0, self.held)

    def _there(self) -> Rows:
        """The rows, and those for which there is room."""
        assert self.positions is not None
        return Rows(self.keys, self.values, self.positions)

    def in_memory(self) -> Archive:
        """Return the archive itself."""
        return self

    def synced(self) -> Archive:
        """Return the archive, ready to be asked for rows."""
        return self


def tiles(first: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield where each tile of these rows begins and ends."""
    size = min(max(most, LEAST_TILE), TILE)
    for start in range(first, stop, size):
        yield start, min(start + size, stop)


def _more_room(room: int, n: int) -> int:
    """For how many more rows room is made, if there is to be some for n."""
    if n <= room:
        return 0
    # By a quarter at least, so that all that is copied is a few times the whole.
    return -(-max(n, room + room // 4) // ROOM) * ROOM - room


def stored_as(storage: Storage, rows: Rows) -> Rows:
    """Return rows in an archive's formats; quantised ones are in them already."""
    if is_plain(rows.keys) and is_plain(rows.values):
        return Rows(*storage.store(rows.keys, rows.values), rows.positions)
    return rows
