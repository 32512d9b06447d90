"""A layer's recall window: rows that were evicted, brought back for a while.

What a layer evicts waits a little and goes to an archive. Every few tokens the window
is filled again with the archived rows that the last queries attend to most. Both
happen at fixed numbers of tokens seen, so chunks of any size see the same.

Nothing here is changed in place: a cache can go back to the recall that it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from .archive import Archive, Rows, as_plain
from .disk_archive import DiskArchive
from .entries import Entries, arrays_of, join

# Tokens between two fillings of the window, and queries by which it is filled.
REFILL, LAST = 8, 6
# Tokens after which evicted rows go to the archive; a multiple of REFILL.
PERIOD = 128
# Evicted rows that wait one by one before they are joined.
_JOINED = 32


class Windows(NamedTuple):
    """What the queries of a chunk may read of the archive.

    rows: [B, n_kv_heads, W * m, head_dim], W windows one after the other; first: which
    query of the first window the chunk begins with.
    """

    rows: Rows
    slots: int
    first: int


class Flush(NamedTuple):
    """Rows that went to the archive when `offset` tokens were seen."""

    offset: int
    rows: Rows


@dataclass(frozen=True)
class Recall:
    """What of a layer's evicted tokens is known.

    slots: rows of the window; first: how many tokens are held before one is evicted;
    waiting: rows evicted that are not archived yet, in order of step; queries: the last
    ones [B, n_heads, n, head_dim], scaled; window: the rows that are read now.
    """

    slots: int
    first: int
    archive: Archive | DiskArchive
    journal: int = 0
    waiting: tuple[Rows, ...] = ()
    queries: mx.array | None = None
    window: Rows | None = None
    flushes: tuple[Flush, ...] = ()

    def empty(self) -> Recall:
        """Return one that knows of nothing."""
        return Recall(self.slots, self.first, self.archive.empty(), self.journal)

    @property
    def arrays(self) -> list[mx.array]:
        """All but those of the archive."""
        rows = [*self.waiting, *(f.rows for f in self.flushes)]
        rows += [] if self.window is None else [self.window]
        arrays = [a for r in rows for part in r for a in arrays_of(part)]
        return arrays if self.queries is None else [*arrays, self.queries]

    @property
    def tied_to(self) -> list[mx.array]:
        """What nobody may read for long, to be evaluated with every step."""
        return [] if self.queries is None else [self.queries]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays but those of the archive."""
        return sum(a.nbytes for a in self.arrays)

    def max_nbytes(self, per_token: int, keys: Entries, values: Entries) -> int | None:
        """Bytes that the arrays but the archive's can reach; None before any query.

        per_token: bytes of a token's keys, values and positions in the slots.
        """
        if self.queries is None:
            return None
        size = self.queries.dtype.size
        batch, n_heads, _, width = self.queries.shape
        queries = batch * n_heads * self._kept_queries * width * size
        per_row = size * (keys.shape[3] + values.shape[3]) + 4
        window = batch * keys.shape[1] * self.slots * per_row
        flushes = 1 + self.journal // PERIOD if self.journal else 0
        return queries + window + per_token * (PERIOD + 1) * (1 + flushes)

    def joined(self) -> Rows | None:
        """Return the rows that wait, or None if there are none."""
        return _joined(self.waiting) if self.waiting else None

    def next_cut(self, offset: int) -> int:
        """Return how many tokens are seen when rows go to the archive next."""
        return (offset // PERIOD + 1) * PERIOD

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
        if offset % PERIOD or n <= 0:
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

    def read_by(
        self, queries: mx.array, offset: int, heads: int
    ) -> tuple[Windows | None, Recall]:
        """Return what queries read, and the recall after them.

        queries: [B, n_heads, L, head_dim], scaled, the first of which is that of the
        token at `offset`; heads: n_kv_heads.
        """
        length = queries.shape[2]
        known = queries
        if self.queries is not None:
            known = mx.concatenate([self.queries, queries], axis=2)
        start = offset + length - known.shape[2]
        refills = range(-(-offset // REFILL) * REFILL, offset + length, REFILL)
        windows, window = None, self.window
        if self.archive.count:
            parts = []
            if offset % REFILL:
                assert window is not None
                parts.append(window)
            if refills:
                # Kept: what was written is not written again.
                self = replace(self, archive=self.archive.synced())
                chosen = self._chosen(known, [t - start for t in refills], heads)
                parts.append(chosen)
                window = chosen.cut(chosen.length - self.slots, chosen.length)
            windows = Windows(_joined(parts), self.slots, offset % REFILL)
        keep = min(known.shape[2], self._kept_queries)
        last = known[:, :, known.shape[2] - keep :]
        return windows, replace(self, queries=last, window=window)

    def until(self, to: int, seen: int, heads: int) -> Recall:
        """Return the recall before the tokens from `to` on, of `seen`, came."""
        if to <= 0:
            return self.empty()
        archive, waiting = self.archive, self.waiting
        undone = [f for f in self.flushes if f.offset > to]
        for flush in reversed(undone):
            archive, waiting = archive.without(flush.rows), (flush.rows, *waiting)
        n = max(0, to - self.first - archive.count)
        waiting = (_joined(waiting).cut(0, n),) if n else ()
        queries = self.queries
        if queries is not None:
            queries = queries[:, :, : queries.shape[2] - (seen - to)]
        kept = tuple(f for f in self.flushes if f.offset <= to)
        then = replace(
            self, archive=archive, waiting=waiting, queries=queries, flushes=kept
        )
        return then._with_window(to, heads)

    def _with_window(self, offset: int, heads: int) -> Recall:
        """Fill the window as it was last filled when `offset` tokens were seen."""
        if not self.archive.count or not offset % REFILL:
            return replace(self, window=None)
        assert self.queries is not None
        at = self.queries.shape[2] - offset % REFILL
        synced = replace(self, archive=self.archive.synced())
        return replace(synced, window=synced._chosen(self.queries, [at], heads))

    @property
    def _kept_queries(self) -> int:
        # Those by which the window was filled when the last of the journal was read.
        return LAST + (REFILL - 1 + self.journal if self.journal else 0)

    def _chosen(self, queries: mx.array, last: Sequence[int], heads: int) -> Rows:
        """Fill windows by the queries up to each of some numbers."""
        batch, n_heads, n, width = queries.shape
        at = mx.array([[t - LAST + 1 + i for i in range(LAST)] for t in last])
        asked = mx.take(queries, mx.clip(at, 0, n - 1).reshape(-1), axis=2)
        shape = (batch, heads, n_heads // heads, len(last), LAST, width)
        asked = asked.reshape(shape).swapaxes(2, 3)
        asked = asked.reshape(batch, heads, len(last), -1, width)
        rows = self.archive.choose(asked.astype(mx.float32), self.slots)
        return as_plain(rows, queries.dtype)


def _joined(rows: Sequence[Rows]) -> Rows:
    return rows[0] if len(rows) == 1 else Rows(*map(join, zip(*rows, strict=True)))
