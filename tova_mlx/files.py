"""Files that are written whole or not at all, whatever ends the process.

What is not done yet is in a directory beside the file, which is locked meanwhile: one
that is not was left by a process that was killed, and the next to write there deletes
it.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".tova_mlx-"


@contextmanager
def working_directory(parent: Path) -> Iterator[Path]:
    """Make a directory in `parent` that is deleted at the end of the block.

    Those that killed processes left there are deleted too. Raises OSError.
    """
    place, lock = _made(parent)
    try:
        for stale in parent.glob(f"{_PREFIX}*"):
            _delete_unless_locked(stale)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give the block a name to write to; what is there at its end becomes `path`.

    It is on the disk before. If the block raises, what was at `path` stays.

    Raises OSError.
    """
    with working_directory(path.parent) as place:
        # As short as a name can be with this suffix: that may be long.
        written = place / f"f{path.suffix}"
        yield written
        to_disk(written)
        os.replace(written, path)
        # So that the name is there too after the machine lost its power.
        with suppress(OSError):
            to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Have a file on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _made(parent: Path) -> tuple[Path, int]:
    """A new directory and a descriptor that locks it."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        with suppress(OSError):
            # Not all file systems have locks; there, nothing is ever deleted.
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have deleted it before it was locked.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(place), os.fstat(lock)):
                return place, lock
        os.close(lock)


def _delete_unless_locked(place: Path) -> None:
    with suppress(OSError):
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)
        finally:
            os.close(lock)
