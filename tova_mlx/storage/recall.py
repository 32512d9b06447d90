"""A layer's recall window: rows that were evicted, brought back for one token.

What a layer evicts waits a little and goes to an archive, at fixed numbers of tokens
seen. Each token reads the archived rows that its own query attends to most. So chunks
of any size see the same.

Nothing here is changed in place: a cache can go back to the recall that it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from .archive import Archive, Rows
from .disk_archive import DiskArchive
from .entries import Entries, arrays_of, join

# Tokens after which evicted rows go to the archive.
_PERIOD = 128
# Evicted rows that wait one by one before they are joined.
_JOINED = 32


class Flush(NamedTuple):
    """Rows that went to the archive when `offset` tokens were seen."""

    offset: int
    rows: Rows


@dataclass(frozen=True)
class Recall:
    """What of a layer's evicted tokens is known.

    slots: rows that a token reads at least; first: how many tokens are held before one
    is evicted; period: tokens after which evicted rows go to the archive; waiting: rows
    evicted that are not archived yet, in order of step; read: int32 [B, n_kv_heads,
    slots], the positions that the newest token attended to most (-1: none).
    """

    slots: int
    first: int
    archive: Archive | DiskArchive
    journal: int = 0
    period: int = _PERIOD
    waiting: tuple[Rows, ...] = ()
    read: mx.array | None = None
    flushes: tuple[Flush, ...] = ()

    def empty(self) -> Recall:
        """Return one that knows of nothing."""
        new = self.archive.empty()
        return Recall(self.slots, self.first, new, self.journal, self.period)

    @property
    def arrays(self) -> list[mx.array]:
        """All but those of the archive."""
        rows = [*self.waiting, *(f.rows for f in self.flushes)]
        arrays = [a for r in rows for part in r for a in arrays_of(part)]
        return [*arrays, *self.tied_to]

    @property
    def tied_to(self) -> list[mx.array]:
        """What nobody may read for long, to be evaluated with every step."""
        return [] if self.read is None else [self.read]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays but those of the archive."""
        return sum(a.nbytes for a in self.arrays)

    def max_nbytes(self, per_token: int, keys: Entries) -> int:
        """Bytes that the arrays but the archive's can reach.

        per_token: bytes of a token's keys, values and positions in the slots.
        """
        read = 4 * keys.shape[0] * keys.shape[1] * self.slots
        flushes = 1 + self.journal // self.period if self.journal else 0
        return read + per_token * (self.period + 1) * (1 + flushes)

    def joined(self) -> Rows | None:
        """Return the rows that wait, or None if there are none."""
        return _joined(self.waiting) if self.waiting else None

    def next_cut(self, offset: int) -> int:
        """Return how many tokens are seen when rows go to the archive next."""
        return (offset // self.period + 1) * self.period

    def with_evicted(self, rows: Rows) -> Recall:
        """Return the recall when rows were evicted, in order of step."""
        waiting = (*self.waiting, rows)
        if len(waiting) > _JOINED:
            waiting = (_joined(waiting),)
        return replace(self, waiting=waiting)

    def flushed(self, offset: int) -> Recall:
        """Return the recall when `offset` tokens were seen and have attended."""
        # A decode step's victim is still in its slot.
        n = offset - 1 - self.first - self.archive.count
        if offset % self.period or n <= 0:
            return self
        waiting = _joined(self.waiting)
        rows, rest = waiting.cut(0, n), waiting.cut(n, waiting.length)
        flushes = tuple(f for f in self.flushes if f.offset > offset - self.journal)
        return replace(
            self,
            archive=self.archive.add(rows, offset),
            waiting=(rest,) if rest.length else (),
            flushes=(*flushes, Flush(offset, rows)) if self.journal else (),
        )

    def can_go_back(self, to: int, seen: int) -> bool:
        """Whether what went to the archive after `to` tokens, of `seen`, is known."""
        first = self.next_cut(max(to, self.first + 1))
        return first > seen or any(f.offset == first for f in self.flushes)

    def until(self, to: int) -> Recall:
        """Return the recall before the tokens from `to` on came."""
        if to <= 0:
            return self.empty()
        archive, waiting = self.archive, self.waiting
        undone = [f for f in self.flushes if f.offset > to]
        for flush in reversed(undone):
            archive, waiting = archive.without(flush.rows), (flush.rows, *waiting)
        n = max(0, to - self.first - archive.count)
        waiting = (_joined(waiting).cut(0, n),) if n else ()
        kept = tuple(f for f in self.flushes if f.offset <= to)
        return replace(
            self,
            archive=archive,
            waiting=waiting,
            read=None,
            flushes=kept,
        )


def _joined(rows: Sequence[Rows]) -> Rows:
    return rows[0] if len(rows) == 1 else Rows(*map(join, zip(*rows, strict=True)))
