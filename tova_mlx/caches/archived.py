"""What a layer evicted and attends to all the same: that part of its cache."""

from dataclasses import replace

import numpy as np

from ..attention.recalled import attended_most
from ..errors import CacheStateError
from ..storage.disk_archive import Disk, DiskArchive
from ..storage.slots import Slots


class Archived:
    """The archive of a cache with `recall`."""

    _slots: Slots

    @property
    def archives_on_disk(self) -> bool:
        """Whether what is evicted is kept on a disk."""
        recall = self._slots.recall
        return recall is not None and isinstance(recall.archive, DiskArchive)

    def archive_on(self, disk: Disk | None) -> None:
        """Keep what is evicted, and was so far, on a disk, or in memory.

        Raises CacheStateError: what is on disk cannot be had.
        """
        recall = self._slots.recall
        assert recall is not None
        archive = recall.archive.in_memory()
        slots = self._slots.twin()
        if disk is not None:
            archive = DiskArchive.of(archive, disk)
        # Where some are lost, those that are taken back cannot be told from them.
        flushes = () if archive.lost else recall.flushes
        slots.recall = replace(recall, archive=archive, flushes=flushes)
        self._slots = slots

    @property
    def recalled_positions(self) -> list[int]:
        """The indices of the evicted that the newest attended to most, ascending."""
        recall = self._slots.recall
        if recall is None or recall.asked is None:
            return []
        queries, count = recall.asked
        try:
            read = attended_most(queries, recall.archive, count, recall.slots)
        except CacheStateError:
            # Of a damaged disk; the next token says so.
            return []
        return [] if read is None else np.unique(read[read >= 0]).tolist()

    @property
    def recalled(self) -> int:
        """How many evicted tokens are attended to: archived, or on the way there."""
        recall = self._slots.recall
        if recall is None:
            return 0
        waiting = 0 if recall.waiting is None else recall.waiting.length
        return recall.archive.count - recall.archive.lost + waiting

    @property
    def archived(self) -> int:
        """How many evicted tokens went to the archive."""
        recall = self._slots.recall
        return 0 if recall is None else recall.archive.count

    @property
    def archive_failed(self) -> str:
        """Why an archive on disk takes no more; empty: it does."""
        recall = self._slots.recall
        disk = getattr(recall and recall.archive, "disk", None)
        return "" if disk is None else disk.failed

    @property
    def archive_nbytes(self) -> int:
        """Bytes of the archive, in memory or on disk."""
        recall = self._slots.recall
        return 0 if recall is None else recall.archive.nbytes
