"""A directory of logs of rows: locked while it is in use, and gone afterwards.

What is in it: `lock`, and the files of the logs. For one process, and not for several
threads at once. Knows neither MLX nor caches, nor how a log is written.
"""

from __future__ import annotations

import fcntl
import os
import re
import resource
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path

from ..errors import OptionError, TovaError
from .row_log import FILE_NAME, FLAGS, MAGIC, Parts, RowLog, write_all

# Files that may be ours, and one that macOS puts everywhere.
_KNOWN = re.compile(rf"lock|{FILE_NAME.pattern}|\.DS_Store", re.ASCII)
# A part takes two file descriptors, and macOS gives a process 256 unless it asks.
_FILES = 4096


class LogDirectory:
    """A directory of the logs of one model's layers, for one process.

    Closes when it is collected, whoever still has its logs: hold it as long as them.
    Allows the process more open files, if it may have less than 4,096.

    path: made if it is not there. What a run that was killed left there is deleted; a
        directory with anything else in it is refused.

    Raises OptionError: the directory is in use, holds something, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._logs: list[RowLog] = []
        # What closing does, last first; also when this is collected or the run ends.
        self._undo = ExitStack()
        self._close = weakref.finalize(self, _close, self._undo, os.getpid())
        try:
            self.path = self.path.expanduser()
            self._sweep(self._lock())
        except BaseException as error:
            self.close()
            unusable = isinstance(error, (OSError, RuntimeError, ValueError))
            if unusable and not isinstance(error, TovaError):
                raise self._unusable(error) from error
            raise
        self._undo.callback(_close_logs, self._logs)
        allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 < allowed < _FILES:
            with suppress(OSError, ValueError):
                more = _FILES if most < 0 else min(_FILES, most)
                resource.setrlimit(resource.RLIMIT_NOFILE, (more, most))

    @property
    def nbytes(self) -> int:
        """Bytes on disk of all logs."""
        return sum(log.nbytes for log in self._logs)

    def log(self, name: str, parts: Parts, limit_rows: int | None = None) -> RowLog:
        """Return a new log; its name is free again when it is closed.

        parts: NumPy dtype and shape of a row of each.
        limit_rows: rows to hold, rounded up to blocks, and two of them at least.

        Raises OptionError: it cannot be written, or there is one of this name.
        """
        if not self._close.alive:
            raise self._refused("is closed", "Make another LogDirectory")
        try:
            log = RowLog(self.path, name, parts, limit_rows)
        except OSError as error:
            raise self._unusable(error) from error
        self._logs[:] = [*(log for log in self._logs if not log.closed), log]
        return log

    def close(self) -> None:
        """Delete the logs; the second time does nothing."""
        self._close()

    def _refused(self, why: str, do: str = "Use another directory") -> OptionError:
        return OptionError(f"archive={str(self.path)!r} {why}. {do}.")

    def _foreign(self, name: str) -> OptionError:
        return self._refused(f"holds {name!r}, which is not of an archive")

    def _unusable(self, error: Exception) -> OptionError:
        reason = getattr(error, "strerror", None) or error
        return self._refused(f"cannot be used ({reason})")

    def _lock(self) -> bytes | None:
        """Take the lock; return what was in it, None if there was none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
            # Fails, and nothing happens, if others have put something there.
            self._undo.callback(os.rmdir, self.path)
        # Before anything is put into a directory that is not for us.
        for name in os.listdir(self.path):
            if not _KNOWN.fullmatch(name):
                raise self._foreign(name)
        lock, made = self.path / "lock", True
        try:
            fd = os.open(lock, FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            fd, made = os.open(lock, FLAGS), False
        self._undo.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it may have deleted it since it was opened.
            if not os.path.samestat(os.lstat(lock), os.fstat(fd)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError) as error:
            why = "is in use by another process or another cache"
            raise self._refused(why) from error
        if made:
            self._undo.callback(os.unlink, lock)
            write_all(fd, MAGIC, 0)
            return None
        content = os.pread(fd, 99, 0)
        if not MAGIC.startswith(content):
            raise self._foreign("lock")
        return content

    def _sweep(self, found_lock: bytes | None) -> None:
        """Delete what a killed run left. Raises OptionError if anything is not ours."""
        stale = []
        for path in self.path.iterdir():
            if path.name in ("lock", ".DS_Store"):
                continue
            if path.is_symlink() or not path.is_file():
                raise self._foreign(path.name)
            with open(path, "rb") as file:
                head = file.read(len(MAGIC))
            # A run that was killed early leaves less of a file; but its lock too.
            early = found_lock is not None and MAGIC.startswith(head)
            if head != MAGIC and not early:
                raise self._foreign(path.name)
            stale.append(path)
        # An empty one may be of others, and stays.
        if found_lock:
            self._undo.callback(os.unlink, self.path / "lock")
        for path in stale:
            path.unlink()


def _close(undo: ExitStack, pid: int) -> None:
    # A fork has it too, but not its files.
    if pid == os.getpid():
        with suppress(OSError):
            undo.close()


def _close_logs(logs: list[RowLog]) -> None:
    for log in logs:
        log.close()
