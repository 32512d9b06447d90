"""Rows that a layer evicted and attends to all the same: on disk.

Rows are appended to a log in the order in which they were evicted; an index knows where
each position's row is. What an archive is given waits in memory until it is asked for
rows, so that nothing waits for the device but that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CacheStateError
from .archive import TILE, Archive, Rows, Tile, stored_as, tiles
from .disk_index import DiskIndex
from .entries import Entries, arrays_of, each, pad, to_mlx, with_arrays
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
        self._like: dict[str, Any] = {}

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
        return 0 if self._log is None else self._log.nbytes + self.index.nbytes

    def append(self, storage: Storage, rows: Rows, seen: int) -> None:
        """Write rows, which are in these formats. Raises CacheStateError."""
        if self._log is None:
            self._begin(storage, rows)
        assert self._log is not None
        first, n, oldest = self._log.count, rows.length, self._log.first
        arrays = {"positions": rows.positions, **_named(rows.keys, rows.values)}
        parts = {
            name: np.ascontiguousarray(np.moveaxis(np.array(array), 2, 0))
            for name, array in arrays.items()
        }
        if not self.failed:
            try:
                self.index.make_room(parts["positions"], seen, oldest)
                self._log.append(parts)
            except CacheStateError as error:
                if not self.forgets:
                    raise
                self.failed = str(error)
        written = self._log.count - first
        self.lost_after += n - written
        if written:
            positions = np.moveaxis(parts["positions"][:written], 0, 2)
            self.index.put(positions, first)

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
        self.index.cut(kept)

    @property
    def n_kv_heads(self) -> int:
        return self._shape[1]

    @property
    def room(self) -> int:
        return 0 if self._log is None else self.index.room

    def tiles(self, seen: int, most: int) -> Iterator[Tile]:
        """As `Archive.tiles`; seen: above all positions."""
        if self._log is None:
            return
        for start, stop in tiles(min(self.room, seen - self.index.start), most):
            places = np.asarray(self.index.places[..., start:stop])
            numbers = np.broadcast_to(places, (*self._shape, stop - start))
            keys, values = self._take(numbers)
            yield Tile(keys, values, to_mlx(places >= self._log.first))

    def rows(self) -> Rows:
        """Return all rows that are there, in order of eviction."""
        assert self._log is not None
        # Rows go where their positions say: not by what has changed since.
        self._log.check_again()
        numbers = np.arange(self._log.first, self._log.count)
        wanted = np.broadcast_to(numbers, (*self._shape, len(numbers)))
        keys, values = self._take(wanted)
        positions = self._log.take(numbers)["positions"].transpose(1, 2, 0)
        return Rows(keys, values, mx.array(np.ascontiguousarray(positions)))

    def _begin(self, storage: Storage, rows: Rows) -> None:
        arrays = _named(rows.keys, rows.values)
        batch, heads = rows.keys.shape[:2]
        parts: dict[str, tuple[Any, tuple[int, ...]]] = {
            n: (np.array(a[:, :, :0]).dtype, (batch, heads, a.shape[3]))
            for n, a in arrays.items()
        }
        choosers = rows.positions.shape[1]
        parts["positions"] = (np.dtype(np.int32), (batch, choosers))
        sizes = {
            n: np.dtype(t).itemsize * int(np.prod(s)) for n, (t, s) in parts.items()
        }
        # With its place, which takes what its position does.
        per_row = sum(sizes.values()) + sizes["positions"]
        limit_rows = None if self.limit is None else max(1, self.limit // per_row)
        entries = {"keys": rows.keys, "values": rows.values}
        self._like = {n: each(lambda a: a[:, :, :0], e) for n, e in entries.items()}
        self._log = self.directory.log(self.name, parts, limit_rows)
        self._shape = batch, heads
        self.index = DiskIndex(self.directory, self.name, (batch, choosers))

    def _take(self, numbers: np.ndarray) -> list[Entries]:
        """Keys and values of rows by number [B, n_kv_heads, n]; any for those gone."""
        assert self._log is not None
        if not self._log.count:
            # Not one could be written.
            return [pad(like, 0, numbers.shape[2]) for like in self._like.values()]
        numbers = np.maximum(numbers, self._log.first)
        some, index = np.unique(numbers, return_inverse=True)
        index = index.reshape(numbers.shape)
        taken = self._log.take(some)
        b, h, _ = np.ogrid[tuple(map(slice, numbers.shape))]
        found = []
        for part, like in self._like.items():
            arrays = (
                mx.array(taken[f"{part}{i}"][index, b, h])
                for i in range(len(arrays_of(like)))
            )
            found.append(with_arrays(like, arrays))
        return found


def _named(keys: Any, values: Any) -> dict[str, mx.array]:
    """The arrays that keys and values consist of, by the names that a log has."""
    return {
        f"{name}{i}": array
        for name, entries in (("keys", keys), ("values", values))
        for i, array in enumerate(arrays_of(entries))
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
    seen: int = 0
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

    def add(self, rows: Rows, seen: int) -> DiskArchive:
        """As `Archive.add`."""
        if not rows.length:
            return self
        rows = stored_as(self.storage, rows)
        count = self.count + rows.length
        return replace(self, count=count, given=(*self.given, rows), seen=seen)

    def without(self, rows: Rows) -> DiskArchive:
        """As `Archive.without`: the rows added last."""
        count = self.count - rows.length
        given = self.given[:-1] if self.given else ()
        return replace(self, count=count, given=given)

    @property
    def start(self) -> int:
        return self.disk.index.start

    @property
    def room(self) -> int:
        return self.disk.room

    @property
    def n_kv_heads(self) -> int:
        return self.disk.n_kv_heads

    @property
    def lost(self) -> int:
        """How many of the rows that are written are not there."""
        return self.disk.lost

    def tiles(self, most: int = TILE) -> Iterator[Tile]:
        """As `Archive.tiles`. Raises CacheStateError: rows that cannot be had."""
        return self.disk.tiles(self.seen, most)

    def in_memory(self, seen: int) -> Archive:
        """Return the same rows in memory; seen: above all positions."""
        here = self.synced()
        if not here.count:
            return Archive(self.storage)
        rows = self.disk.rows()
        archive = Archive(self.storage).add(rows, seen)
        return replace(archive, count=here.count, lost=here.count - rows.length)

    @classmethod
    def of(cls, archive: Archive, disk: Disk, seen: int) -> DiskArchive:
        """Return an archive's rows on a disk that has none."""
        new = cls(archive.storage, disk)
        if not archive.count:
            return new
        disk.lost_before = archive.lost
        return replace(new, count=archive.lost).add(archive.rows(), seen)

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
            disk.append(self.storage, rows, self.seen)
        return replace(self, given=(), cuts=len(disk.cuts))
