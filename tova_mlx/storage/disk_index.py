"""Where on a disk the row of each position is.

It is in a file that nobody else sees, for positions from `start` on. A row is known by
its number in a log.
"""

from __future__ import annotations

import numpy as np

from ..errors import CacheStateError
from .archive import ROOM
from .log_directory import LogDirectory


class DiskIndex:
    """What there is of every position of one layer.

    directory, name: of the layer's log; shape: (B, H').

    start: below it no position has a row; places: int32 [B, H', C], the number of each
    position's row, -1 for none.
    """

    def __init__(self, directory: LogDirectory, name: str, shape: tuple[int, int]):
        self.directory, self.name, self.start = directory, name, 0
        self.places = np.zeros((*shape, 0), np.int32)

    @property
    def nbytes(self) -> int:
        return self.places.nbytes

    @property
    def room(self) -> int:
        """Positions from `start` on for which there is room, rows or not."""
        return self.places.shape[2]

    def put(self, positions: np.ndarray, first: int) -> None:
        """Note that rows from number `first` on have positions [B, H', n]."""
        numbers = np.arange(first, first + positions.shape[2], dtype=np.int32)
        numbers = np.broadcast_to(numbers, positions.shape)
        np.put_along_axis(self.places, positions - self.start, numbers, axis=2)

    def cut(self, count: int) -> None:
        """Forget the rows from number `count` on."""
        self.places[self.places >= count] = -1

    def make_room(self, positions: np.ndarray, seen: int, oldest: int) -> None:
        """Have places for these positions and all others up to `seen`.

        oldest: number of the oldest row held; where others were, there is no room any
        more. Raises CacheStateError.
        """
        lowest = int(positions.min())
        if self.start <= lowest and seen <= self.start + self.room:
            return
        held = (self.places >= oldest).any(axis=(0, 1))
        if held.any():
            lowest = min(lowest, self.start + int(held.argmax()))
        start = lowest // ROOM * ROOM
        # A quarter more than that, so that all that is copied is a few times the whole.
        room = -(-5 * (seen - start) // (4 * ROOM)) * ROOM
        try:
            places = self._moved(start, room)
        except OSError as error:
            raise CacheStateError(
                f"archive {self.directory.path}: cannot be written ({error.strerror}). "
                "Make room on the disk, or archive in memory."
            ) from error
        self.places, self.start = places, start

    def _moved(self, start: int, room: int) -> np.ndarray:
        """The places of other positions, in a file. Raises OSError."""
        new = np.full((*self.places.shape[:2], room), -1, np.int32)
        # What is left over on either side has no rows.
        there = new[..., max(0, self.start - start) :]
        here = self.places[..., max(0, start - self.start) :]
        n = min(there.shape[2], here.shape[2])
        there[..., :n] = here[..., :n]
        # Written before it is mapped: a page that a full disk has no room for would
        # end the process.
        with self.directory.nameless(self.name) as file:
            file.write(new.tobytes())
            file.flush()
            return np.memmap(file, new.dtype, "r+", shape=new.shape)
