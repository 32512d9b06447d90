"""A layer's recall: rows that were evicted, and are attended to all the same.

What a layer evicts waits in slots of its own, as it was, and goes from there to an
archive, at fixed numbers of tokens seen. So chunks of any size see the same.

Nothing here is changed in place: a cache can go back to the recall that it had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from .archive import Archive, Rows
from .disk_archive import DiskArchive
from .entries import Entries, arrays_of, join


class Flush(NamedTuple):
    """Rows that went to the archive when `offset` tokens were seen."""

    offset: int
    rows: Rows


class Asked(NamedTuple):
    """The newest token's queries [B, n_heads, 1, head_dim], scaled.

    archived: how many rows the archive had been given then.
    """

    queries: mx.array
    archived: int


@dataclass(frozen=True)
class Recall:
    """What of a layer's evicted tokens is known.

    slots: of rows that wait; first: how many tokens are held before one is evicted;
    period: tokens after which evicted rows go to the archive; waiting: those that are
    not archived yet, in order of step; asked: what the newest token attended with.
    """

    slots: int
    first: int
    archive: Archive | DiskArchive
    journal: int
    period: int
    waiting: Rows | None = None
    asked: Asked | None = None
    flushes: tuple[Flush, ...] = ()

    def empty(self) -> Recall:
        """Return one that knows of nothing."""
        new = self.archive.empty()
        return Recall(self.slots, self.first, new, self.journal, self.period)

    @property
    def arrays(self) -> list[mx.array]:
        """All but those of the archive."""
        rows = [r for r in (self.waiting, *(f.rows for f in self.flushes)) if r]
        arrays = [a for r in rows for part in r for a in arrays_of(part)]
        return [*arrays, *self.tied_to]

    @property
    def tied_to(self) -> list[mx.array]:
        """What nobody may read for long, to be evaluated with every step."""
        return [] if self.asked is None else [self.asked.queries]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays but those of the archive."""
        return sum(a.nbytes for a in self.arrays)

    def max_nbytes(self, per_token: int, keys: Entries) -> int:
        """Bytes that the arrays but the archive's can reach.

        per_token: bytes of a token's keys, values and positions in the slots.
        """
        asked = 0 if self.asked is None else self.asked.queries.nbytes
        flushes = 1 + self.journal // self.period if self.journal else 0
        return asked + per_token * (self.period + 1) * (1 + flushes)

    def next_cut(self, offset: int) -> int:
        """Return how many tokens are seen when rows go to the archive next."""
        return (offset // self.period + 1) * self.period

    def with_evicted(self, rows: Rows) -> Recall:
        """Return the recall when rows were evicted, in order of step."""
        return replace(self, waiting=_joined(self.waiting, rows))

    def evicted_before(self, offset: int) -> tuple[int, Rows | None]:
        """How many rows were evicted before `offset` tokens came, and those that wait.

        offset: since when none has gone to the archive.
        """
        n = max(0, offset - self.first)
        waiting = n - self.archive.count
        if not waiting or self.waiting is None:
            return n, None
        return n, self.waiting.cut(0, waiting)

    def flushed(self, offset: int) -> Recall:
        """Return the recall when `offset` tokens were seen and have attended."""
        # A decode step's victim is still in its slot.
        n = offset - 1 - self.first - self.archive.count
        if offset % self.period or n <= 0:
            return self
        assert self.waiting is not None
        rows, rest = self.waiting.cut(0, n), self.waiting.cut(n, self.waiting.length)
        flushes = tuple(f for f in self.flushes if f.offset > offset - self.journal)
        return replace(
            self,
            archive=self.archive.add(rows),
            waiting=rest if rest.length else None,
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
            archive = archive.without(flush.rows.length)
            waiting = _joined(flush.rows, waiting)
        n = max(0, to - self.first - archive.count)
        waiting = waiting.cut(0, n) if n and waiting is not None else None
        kept = tuple(f for f in self.flushes if f.offset <= to)
        return replace(
            self,
            archive=archive,
            waiting=waiting,
            asked=None,
            flushes=kept,
        )


def _joined(first: Rows | None, last: Rows | None) -> Rows | None:
    if first is None or last is None:
        return last if first is None else first
    return Rows(*map(join, zip(first, last, strict=True)))
