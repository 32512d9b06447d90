"""A log on disk of what one layer of a model evicted: appended, read by number.

A row is here what one evicted token has in one part of a log, say in its keys. A log is
one file per part: a header, then blocks of 64 rows, each followed by a CRC32 of its
rows and its number, so that a block torn or changed is an error and never wrong rows.
Not for several threads at once. Knows neither MLX nor caches, and of the directory only
where it is and that it notes what is cut.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
import struct
import weakref
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CacheStateError

if TYPE_CHECKING:
    # It imports this file.
    from .log_directory import LogDirectory

BLOCK = 64
# Magic, version, rows of a block, bytes of a row, places for blocks (0: no limit).
HEADER = struct.Struct("<8sIIQQ32x")
MAGIC, _VERSION = b"TOVAROWS", 1
FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
# Names of a log and of its part.
FILE_NAME = re.compile(r"[\w-]+\.[\w-]+\.rows", re.ASCII)

Parts = Mapping[str, tuple[Any, tuple[int, ...]]]


class RowLog:
    """Rows of one layer, numbered from 0 in the order of appending.

    Made by `LogDirectory.log`. Up to a block of rows is in memory, the rest on disk.

    first: number of the oldest row held; rises if there is a limit.
    files: their names, one per part.
    lost: how many rows at the end were damaged when the log was opened.
    """

    def __init__(
        self, directory: LogDirectory, name: str, parts: Parts, limit_rows: int | None
    ):
        self.name, self.first, self.lost = name, 0, 0
        # Places for blocks in a file, where they go round; 0 for as many as there are.
        self._places = max(2, -(-limit_rows // BLOCK)) if limit_rows else 0
        # No cycle, so that the directory closes when its last user drops it.
        self._directory = weakref.proxy(directory)
        self._failed = ""
        self._blocks = self._buffered = 0
        # Whether the block at a place was read since it was written, and was whole.
        self._checked = np.zeros(self._places or BLOCK, bool)
        self._parts: dict[str, _Part] = {}
        for part, (dtype, shape) in parts.items():
            if not FILE_NAME.fullmatch(file := f"{name}.{part}.rows"):
                raise ValueError(f"no name of a file of rows: {file}")
            path = directory.path / file
            self._parts[part] = _Part(path, np.dtype(dtype), shape, self._places)
        self.files = {part.path.name for part in self._parts.values()}

    @property
    def count(self) -> int:
        """Rows appended in all, those that a limit dropped too."""
        return self._blocks * BLOCK + self._buffered

    @property
    def nbytes(self) -> int:
        """Bytes on disk. A file does not shrink when the log is truncated."""
        return sum(os.fstat(p.fd).st_size for p in self._parts.values() if p.fd >= 0)

    @property
    def bytes_per_row(self) -> float:
        """Bytes on disk of a row of all parts, with its share of the checksums."""
        return sum(p.stored.itemsize for p in self._parts.values()) / BLOCK

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
            if self._places:
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
        places = self._place(blocks)
        for block in np.unique(blocks[~self._checked[places]]).tolist():
            self._read(block)
            self._checked[self._place(block)] = True
        taken = {}
        for name, part in self._parts.items():
            found = part.gather(places, disk_rows)
            if len(found) < len(numbers):
                stored, found = found, part.buffer.reshape(-1).view(part.row)[rows]
                found[on_disk] = stored
            taken[name] = found.view(part.dtype).reshape(len(numbers), *part.shape)
        return taken

    def truncate(self, count: int) -> None:
        """Forget the rows from `count` on. Writes nothing, unless they were kept.

        Raises CacheStateError, and changes nothing, if the cut block is damaged.
        """
        if count < 0:
            raise IndexError(f"log {self.name} cannot be cut to {count} rows")
        if count >= self.count:
            return
        blocks, rest = divmod(count, BLOCK)
        first = min(self.first, count)
        cut = blocks < self._blocks and rest and count > first
        read = self._read(blocks) if cut else []
        self._directory.lower(self.name, first, count)
        for part, rows in read:
            part.buffer[:] = rows
        self.first, self._blocks, self._buffered = first, blocks, rest

    def flush(self) -> None:
        """Write the unfinished block too, and have the system save everything.

        Raises CacheStateError like `append`.
        """
        if self._buffered:
            for part in self._parts.values():
                part.buffer[self._buffered :] = 0
            self._write()
        self._each(lambda part: os.fsync(part.fd))

    def _read(self, block: int) -> list[tuple[_Part, np.ndarray]]:
        """Return a block's rows of all parts. Raises CacheStateError."""
        place = self._place(block)
        return [(part, part.read(block, place)) for part in self._parts.values()]

    def _write(self) -> None:
        """Write the buffer as the next block. Raises CacheStateError."""
        if (place := self._place(self._blocks)) >= len(self._checked):
            self._checked = np.append(self._checked, np.zeros_like(self._checked))
        self._checked[place] = False
        self._each(lambda part: part.write(self._blocks, place))

    def _each(self, do: Callable[[_Part], None]) -> None:
        for part in self._parts.values():
            try:
                do(part)
            except OSError as error:
                self._failed = (
                    f"{part.path}: cannot write block {self._blocks} "
                    f"({error.strerror}). Make room on the disk, and begin again with "
                    "a new archive."
                )
                raise CacheStateError(self._failed) from error

    def _place(self, block: Any) -> Any:
        return block % self._places if self._places else block

    def describe(self) -> dict[str, Any]:
        parts = {n: [p.dtype.str, list(p.shape)] for n, p in self._parts.items()}
        return {"parts": parts, "limit_rows": self._places * BLOCK}

    def create(self) -> None:
        """Make the files. Raises OSError."""
        for part in self._parts.values():
            part.fd = os.open(part.path, FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
            write_all(part.fd, part.header, 0)

    def reopen(self, first: int, count: int) -> None:
        """Open the files, and leave out damaged blocks at the end.

        Raises OSError, or ValueError for files of something else.
        """
        for part in self._parts.values():
            part.fd = os.open(part.path, FLAGS)
            if os.pread(part.fd, HEADER.size, 0) != part.header:
                raise ValueError(f"{part.path.name} is another file")
        blocks = -(-count // BLOCK)
        while blocks > first // BLOCK:
            with suppress(CacheStateError):
                for part, rows in self._read(blocks - 1):
                    part.buffer[:] = rows
                break
            blocks -= 1
        readable = max(first, min(count, blocks * BLOCK))
        self.first, self.lost = first, count - readable
        self._blocks, self._buffered = divmod(readable, BLOCK)
        self._checked = np.zeros(self._places or max(BLOCK, self._blocks), bool)

    def close(self, delete: bool) -> None:
        """Close the files, and delete them if asked; no row is held any more."""
        self._failed = f"log {self.name} is closed. Hold its LogDirectory meanwhile."
        self.first = self._blocks = self._buffered = 0
        for part in self._parts.values():
            part.close(delete)


class _Part:
    """One file of a log, and the rows for it that are in memory."""

    def __init__(self, path: Path, dtype: np.dtype, shape: Any, places: int):
        self.path, self.dtype, self.shape = path, dtype, tuple(shape)
        size = dtype.itemsize * math.prod(self.shape)
        if dtype.kind not in "biufc" or not size:
            raise ValueError(f"rows of {dtype} {shape}")
        # A row as one thing of so many bytes: NumPy copies it at once, aligned or not.
        self.row = np.dtype(f"V{size}")
        self.stored = np.dtype([("rows", self.row, (BLOCK,)), ("crc", "<u4")])
        self.header = HEADER.pack(MAGIC, _VERSION, BLOCK, size, places)
        self.buffer = np.zeros((BLOCK, *self.shape), dtype)
        self.fd, self.map = -1, np.empty(0, self.stored)

    def _offset(self, place: int) -> int:
        return HEADER.size + place * self.stored.itemsize

    def write(self, block: int, place: int) -> None:
        """Write the buffer. Raises OSError."""
        if not os.fstat(self.fd).st_nlink:
            # It would still work, in a file that nobody finds.
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        rows = self.buffer.tobytes()
        write_all(self.fd, rows + _crc(rows, block), self._offset(place))

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
        if len(data) != self.stored.itemsize or crc != _crc(rows, block):
            raise self._damaged(f"block {block} is damaged ({why})")
        return np.frombuffer(rows, self.dtype).reshape(BLOCK, *self.shape)

    def gather(self, places: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return rows of the blocks at these places, from the map."""
        there = (os.fstat(self.fd).st_size - HEADER.size) // self.stored.itemsize
        if (needed := int(places.max(initial=-1)) + 1) > there:
            # Reading behind the end of a file in a map ends the process.
            raise self._damaged(f"the block at place {needed - 1} was cut off")
        if needed > len(self.map):
            mapped = mmap.mmap(self.fd, self._offset(there), access=mmap.ACCESS_READ)
            self.map = np.frombuffer(mapped, self.stored, offset=HEADER.size)
        return self.map["rows"][places, rows]

    def _damaged(self, what: str) -> CacheStateError:
        return CacheStateError(f"{self.path}: {what}. Begin again with a new archive.")

    def close(self, delete: bool) -> None:
        self.map = np.empty(0, self.stored)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            with suppress(OSError):
                if delete:
                    os.unlink(self.path)


def _crc(rows: bytes, block: int) -> bytes:
    crc = zlib.crc32(block.to_bytes(8, "little"), zlib.crc32(rows))
    return crc.to_bytes(4, "little")


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write everything, which a system call may not. Raises OSError."""
    view = memoryview(data)
    while view:
        if not (n := os.pwrite(fd, view, offset)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view, offset = view[n:], offset + n
