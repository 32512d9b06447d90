"""Rows that a layer evicted and attends to all the same: on disk.

Rows are appended to a log in the order in which they were evicted. What an archive is
given waits in memory until it is asked for rows, so that nothing waits for the device
but that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CacheStateError
from .archive import Archive, Rows, stored_as, tiles
from .entries import arrays_of, with_arrays
from .formats import Storage
from .log_directory import LogDirectory
from .row_log import RowLog


class Disk:
    """What of one layer is on disk; changed by every archive that is made of it.

    directory, name: of the layer's log; limit: bytes that it may take, or None;
    forgets: whether it goes on, without what is evicted, when nothing can be written.
    """

    def __init__(
        self,
        directory: LogDirectory,
        name: str,
        *,
        limit: int | None = None,
        forgets: bool = False,
    ):
        self.directory, self.name = directory, name
        self.limit, self.forgets = limit, forgets
        # Why nothing is written any more; rows that are not in the log, before those
        # that are and after.
        self.failed, self.lost_before, self.lost_after = "", 0, 0
        # How often rows were taken back, and at how many each time.
        self.cuts: list[int] = []
        self._log: RowLog | None = None

    def __deepcopy__(self, memo: Any) -> Disk:
        return self

    @property
    def count(self) -> int:
        """Rows given so far, those that could not be written too."""
        logged = 0 if self._log is None else self._log.count
        return self.lost_before + logged + self.lost_after

    @property
    def lost(self) -> int:
        """How many of them are not there."""
        gone = 0 if self._log is None else self._log.first
        return self.lost_before + gone + self.lost_after

    @property
    def nbytes(self) -> int:
        return 0 if self._log is None else self._log.nbytes

    def append(self, rows: Rows) -> None:
        """Write rows, which are in their formats. Raises CacheStateError."""
        if self._log is None:
            self._begin(rows)
        assert self._log is not None
        first = self._log.count
        if not self.failed:
            try:
                self._log.append(
                    {
                        name: np.ascontiguousarray(np.moveaxis(np.array(array), 2, 0))
                        for name, array in _named(rows).items()
                    }
                )
            except CacheStateError as error:
                if not self.forgets:
                    raise
                self.failed = str(error)
        self.lost_after += rows.length - (self._log.count - first)

    def truncate(self, count: int) -> None:
        """Forget rows from `count` on."""
        if count >= self.count:
            return
        self.cuts.append(count)
        self.lost_before = min(self.lost_before, count)
        if self._log is None:
            return
        kept = min(count - self.lost_before, self._log.count)
        self.lost_after = count - self.lost_before - kept
        self._log.truncate(kept)

    @property
    def n_kv_heads(self) -> int:
        return self._like.keys.shape[1]

    def tiles(self, most: int, first: int) -> Iterator[Rows]:
        """As `Archive.tiles`."""
        if self._log is None:
            return
        for start, stop in tiles(self._log.first + first, self._log.count, most):
            yield self._take(start, stop)

    def rows(self) -> Rows:
        """Return all rows that are there, in order of eviction."""
        assert self._log is not None
        # Rows go where their positions say: not by what has changed since.
        self._log.check_again()
        return self._take(self._log.first, self._log.count)

    def _begin(self, rows: Rows) -> None:
        self._like = rows.cut(0, 0)
        parts: dict[str, tuple[Any, tuple[int, ...]]] = {
            name: (np.array(a).dtype, (*a.shape[:2], *a.shape[3:]))
            for name, a in _named(self._like).items()
        }
        per_row = sum(
            np.dtype(dtype).itemsize * int(np.prod(shape))
            for dtype, shape in parts.values()
        )
        limit_rows = None if self.limit is None else max(1, self.limit // per_row)
        self._log = self.directory.log(self.name, parts, limit_rows)

    def _take(self, start: int, stop: int) -> Rows:
        """Rows from number `start` on."""
        assert self._log is not None
        taken = self._log.take(np.arange(start, stop))
        arrays = {
            name: mx.array(np.ascontiguousarray(np.moveaxis(array, 0, 2)))
            for name, array in taken.items()
        }
        return Rows(
            *(
                with_arrays(like, (arrays[name] for name in names))
                for like, names in zip(self._like, _names(self._like), strict=True)
            )
        )


def _names(rows: Rows) -> list[list[str]]:
    """What a log calls the arrays that keys, values and positions consist of."""
    return [
        [f"{name}{i}" for i in range(len(arrays_of(part)))]
        for name, part in zip(("keys", "values", "positions"), rows, strict=True)
    ]


def _named(rows: Rows) -> dict[str, mx.array]:
    """The arrays of rows by these names."""
    return {
        name: array
        for names, part in zip(_names(rows), rows, strict=True)
        for name, array in zip(names, arrays_of(part), strict=True)
    }


@dataclass(frozen=True)
class DiskArchive:
    """Rows evicted, of one layer, as an `Archive`; those of a `Disk` up to `count`.

    given: rows that are not written yet; cuts: how many of the disk's this has seen.
    """

    storage: Storage
    disk: Disk
    count: int = 0
    given: tuple[Rows, ...] = ()
    cuts: int = 0

    def __deepcopy__(self, memo: Any) -> DiskArchive:
        return self

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What is in memory."""
        return tuple(a for rows in self.given for part in rows for a in arrays_of(part))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.disk.nbytes

    def empty(self) -> DiskArchive:
        return DiskArchive(self.storage, self.disk, cuts=len(self.disk.cuts))

    def add(self, rows: Rows) -> DiskArchive:
        """As `Archive.add`."""
        if not rows.length:
            return self
        rows = stored_as(self.storage, rows)
        return replace(self, count=self.count + rows.length, given=(*self.given, rows))

    def without(self, n: int) -> DiskArchive:
        """As `Archive.without`, of rows that were added together."""
        return replace(self, count=self.count - n, given=self.given[:-1])

    @property
    def held(self) -> int:
        """How many of the rows that are written are there."""
        return self.disk.count - self.lost

    @property
    def lost(self) -> int:
        """How many of them are not."""
        return self.disk.lost

    @property
    def n_kv_heads(self) -> int:
        return self.disk.n_kv_heads

    def tiles(self, most: int, first: int = 0) -> Iterator[Rows]:
        """As `Archive.tiles`. Raises CacheStateError: rows that cannot be had."""
        return self.disk.tiles(most, first)

    def in_memory(self) -> Archive:
        """Return the same rows in memory."""
        here = self.synced()
        if not here.count:
            return Archive(self.storage)
        rows = self.disk.rows()
        archive = Archive(self.storage).add(rows)
        return replace(archive, count=here.count, lost=here.count - rows.length)

    @classmethod
    def of(cls, archive: Archive, disk: Disk) -> DiskArchive:
        """Return an archive's rows on a disk that has none."""
        new = cls(archive.storage, disk)
        if not archive.count:
            return new
        disk.lost_before = archive.lost
        return replace(new, count=archive.lost).add(archive.rows())

    def synced(self) -> DiskArchive:
        """Return the archive with all that it was given written.

        Raises CacheStateError: a copy of it has gone on, or nothing can be written.
        """
        disk = self.disk
        written = self.count - sum(rows.length for rows in self.given)
        if any(cut < written for cut in disk.cuts[self.cuts :]):
            raise CacheStateError(
                "A copy of this cache has gone on with what it had archived on disk. "
                "Use one of the two only, or an archive in memory."
            )
        disk.truncate(written)
        for rows in self.given:
            disk.append(rows)
        return replace(self, given=(), cuts=len(disk.cuts))
