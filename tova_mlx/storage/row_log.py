"""A log on disk of what one layer of a model evicted: appended, read by number.

A row is here what one evicted token has in one part of a log, say in its keys. A log is
one file per part: a magic word, then blocks of 64 rows, each followed by a CRC32 of its
rows, its number and its file, so that a block torn or changed is an error, never wrong
rows. No file is opened by a later run. Not for threads. Knows neither MLX nor caches.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
import sys
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheStateError

BLOCK = 64
# How each file begins, by which those of a killed run are known.
MAGIC = b"TOVAROWS"
FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
# Names of a log and of its part.
FILE_NAME = re.compile(r"[\w-]+\.[\w-]+\.rows", re.ASCII)

Parts = Mapping[str, tuple[Any, tuple[int, ...]]]


class RowLog:
    """Rows of one layer, numbered from 0 in the order of appending.

    Made by `LogDirectory.log`. Up to a block of rows is in memory, the rest on disk.

    first: number of the oldest row held; rises if there is a limit.
    closed: whether its files are gone.

    Raises OSError: a file cannot be made, or there is one of its name.
    """

    def __init__(
        self, directory: Path, name: str, parts: Parts, limit_rows: int | None
    ):
        self.name, self.first, self.closed = name, 0, False
        # Places for blocks in a file, where they go round.
        self._places = max(2, limit_rows // BLOCK) if limit_rows else sys.maxsize
        self._failed = ""
        self._blocks = self._buffered = 0
        # Whether the block at a place was read since it was written, and was whole.
        self._checked = np.zeros(BLOCK, bool)
        self._parts: dict[str, _Part] = {}
        for part, (dtype, shape) in parts.items():
            path = directory / f"{name}.{part}.rows"
            assert FILE_NAME.fullmatch(path.name), path
            self._parts[part] = _Part(path, np.dtype(dtype), shape)
        try:
            for part in self._parts.values():
                part.fd = os.open(part.path, FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
                write_all(part.fd, MAGIC, 0)
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """Rows appended in all, those that a limit dropped too."""
        return self._blocks * BLOCK + self._buffered

    @property
    def nbytes(self) -> int:
        """Bytes on disk. A file does not shrink when the log is truncated."""
        return sum(os.fstat(p.fd).st_size for p in self._parts.values() if p.fd >= 0)

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append n rows: [n, *shape] of each part.

        Raises CacheStateError if they cannot be written: now and from then on. `count`
        says how many rows can be read, and may have risen by some of these.
        """
        expected = {n: (p.dtype, p.shape) for n, p in self._parts.items()}
        got = {n: (a.dtype, a.shape[1:]) for n, a in rows.items()}
        lengths = {len(a) for a in rows.values()}
        if got != expected or len(lengths) != 1:
            raise ValueError(f"expected rows {expected}, got {got} of {lengths}")
        done, n = 0, lengths.pop()
        while done < n:
            if self._failed:
                raise CacheStateError(self._failed)
            end = min(BLOCK, self._buffered + n - done)
            stop = done + end - self._buffered
            for name, part in self._parts.items():
                part.buffer[self._buffered : end] = rows[name][done:stop]
            # Before anything goes to its place: what is torn is not held.
            self.first = max(self.first, (self._blocks + 1 - self._places) * BLOCK)
            if end == BLOCK:
                self._write()
                self._blocks, end = self._blocks + 1, 0
            self._buffered, done = end, stop

    def take(self, numbers: Any) -> dict[str, np.ndarray]:
        """Return copies of k rows, [k, *shape] of each part; numbers: int [k].

        Raises IndexError for a row that is not held, CacheStateError for a damaged one.
        """
        numbers = np.asarray(numbers, np.int64)
        if ((numbers < self.first) | (numbers >= self.count)).any():
            raise IndexError(
                f"log {self.name} holds rows from {self.first} and below {self.count}, "
                f"but of {numbers.min()} to {numbers.max()} some were asked for"
            )
        blocks, rows = np.divmod(numbers, BLOCK)
        on_disk = blocks < self._blocks
        blocks, disk_rows = blocks[on_disk], rows[on_disk]
        places = blocks % self._places
        for block in np.unique(blocks[~self._checked[places]]).tolist():
            self._read(block)
            self._checked[block % self._places] = True
        taken = {}
        for name, part in self._parts.items():
            found = part.gather(places, disk_rows)
            if len(found) < len(numbers):
                stored, found = found, part.buffer.reshape(-1).view(part.row)[rows]
                found[on_disk] = stored
            taken[name] = found.view(part.dtype).reshape(len(numbers), *part.shape)
        return taken

    def check_again(self) -> None:
        """Have each block checked when it is read next, whether it was whole or not."""
        self._checked[:] = False

    def truncate(self, count: int) -> None:
        """Forget the rows from `count` on. Writes nothing.

        Raises CacheStateError, and changes nothing, if the cut block is damaged.
        """
        if count < 0:
            raise IndexError(f"log {self.name} cannot be cut to {count} rows")
        if count >= self.count:
            return
        blocks, rest = divmod(count, BLOCK)
        if rest and blocks < self._blocks and count > self.first:
            for part, rows in self._read(blocks):
                part.buffer[:] = rows
        self.first, self._blocks, self._buffered = min(self.first, count), blocks, rest

    def close(self) -> None:
        """Delete the files; no row is held any more. The second time does nothing."""
        self._failed = f"log {self.name} is closed. Hold its LogDirectory meanwhile."
        self.closed, self.first, self._blocks, self._buffered = True, 0, 0, 0
        for part in self._parts.values():
            part.close()

    def _read(self, block: int) -> list[tuple[_Part, np.ndarray]]:
        """Return a block's rows of all parts. Raises CacheStateError."""
        place = block % self._places
        return [(part, part.read(block, place)) for part in self._parts.values()]

    def _write(self) -> None:
        """Write the buffer as the next block. Raises CacheStateError."""
        if (place := self._blocks % self._places) >= len(self._checked):
            self._checked = np.append(self._checked, np.zeros_like(self._checked))
        self._checked[place] = False
        for part in self._parts.values():
            try:
                part.write(self._blocks, place)
            except OSError as error:
                what = f"cannot write block {self._blocks} ({error.strerror})"
                failed = part.error(f"{what}. Make room on the disk")
                self._failed = str(failed)
                raise failed from error


class _Part:
    """One file of a log, and the rows for it that are in memory."""

    def __init__(self, path: Path, dtype: np.dtype, shape: Any):
        self.path, self.dtype, self.shape = path, dtype, tuple(shape)
        size = dtype.itemsize * math.prod(self.shape)
        assert size, f"rows of {dtype} {shape}"
        # A row as one thing of so many bytes: NumPy copies it at once, aligned or not.
        self.row = np.dtype(f"V{size}")
        self.stored = np.dtype([("rows", self.row, (BLOCK,)), ("crc", "<u4")])
        self.buffer = np.zeros((BLOCK, *self.shape), dtype)
        # So that a block of another file is not taken for one of this.
        self.salt = int.from_bytes(os.urandom(8), "little")
        self.fd, self.map = -1, np.empty(0, self.stored)

    def _offset(self, place: int) -> int:
        return len(MAGIC) + place * self.stored.itemsize

    def write(self, block: int, place: int) -> None:
        """Write the buffer. Raises OSError."""
        rows = self.buffer.tobytes()
        write_all(self.fd, rows + self._crc(rows, block), self._offset(place))

    def read(self, block: int, place: int) -> np.ndarray:
        """Return a block's rows. Raises CacheStateError if they are not as written.

        Not by the map: there a disk that cannot be read ends the process.
        """
        data, why = b"", "its checksum is wrong"
        try:
            data = os.pread(self.fd, self.stored.itemsize, self._offset(place))
        except OSError as error:
            why = error.strerror
        rows, crc = data[:-4], data[-4:]
        if len(data) != self.stored.itemsize or crc != self._crc(rows, block):
            raise self.error(f"block {block} is damaged ({why})")
        return np.frombuffer(rows, self.dtype).reshape(BLOCK, *self.shape)

    def _crc(self, rows: bytes, block: int) -> bytes:
        number = (self.salt ^ block).to_bytes(8, "little")
        return zlib.crc32(number, zlib.crc32(rows)).to_bytes(4, "little")

    def gather(self, places: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return rows of the blocks at these places, from the map."""
        if not places.size:
            return np.empty(0, self.row)
        there = (os.fstat(self.fd).st_size - len(MAGIC)) // self.stored.itemsize
        if (needed := int(places.max()) + 1) > there:
            # Reading behind the end of a file in a map ends the process.
            raise self.error(f"the block at place {needed - 1} was cut off")
        if needed > len(self.map):
            mapped = mmap.mmap(self.fd, self._offset(there), access=mmap.ACCESS_READ)
            self.map = np.frombuffer(mapped, self.stored, offset=len(MAGIC))
        return self.map["rows"][places, rows]

    def error(self, what: str) -> CacheStateError:
        return CacheStateError(f"{self.path}: {what}. Begin again with a new archive.")

    def close(self) -> None:
        """Delete the file, if it was made."""
        self.map = np.empty(0, self.stored)
        if self.fd >= 0:
            with suppress(OSError):
                os.close(self.fd)
                os.unlink(self.path)
            self.fd = -1


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write everything, which a system call may not. Raises OSError."""
    view = memoryview(data)
    while view:
        if not (n := os.pwrite(fd, view, offset)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view, offset = view[n:], offset + n
