"""A directory of logs of rows: locked, kept or deleted, opened again, closed.

What is in it: `lock`; the files of the logs; and `kept.json`, which says what they hold
if they were kept. For one process, and not for several threads at once. Knows neither
MLX nor caches, nor how a log is written.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import re
import resource
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ..errors import CacheStateError, OptionError, TovaError
from .row_log import BLOCK, FILE_NAME, FLAGS, MAGIC, Parts, RowLog, write_all

# Files that may be ours, and one that macOS puts everywhere.
_KNOWN = re.compile(
    rf"lock|kept\.json(\.tmp)?|{FILE_NAME.pattern}|\.DS_Store", re.ASCII
)
# A part takes two file descriptors, and macOS gives a process 256 unless it asks.
_FILES = 4096


class LogDirectory:
    """A directory of the logs of one model's layers, for one process.

    Closes when it is collected, whoever still has its logs: hold it as long as them.
    Allows the process more open files, if it may have less than 4,096.

    path: made if it is not there. What a run that was killed left there is deleted; a
        directory with anything else in it is refused.
    keep: whether closing leaves the logs there, for `open`; may be set later too.
    logs: by name.

    Raises OptionError: the directory is in use, holds something, or cannot be written.
    """

    _fd = -1

    def __init__(
        self, path: str | os.PathLike[str], keep: bool = False, *, _open: bool = False
    ):
        self.path, self.keep, self._pid = Path(path), keep, os.getpid()
        self.logs: dict[str, RowLog] = {}
        # What is in kept.json, which may never say more than what is held.
        self._kept: dict[str, Any] = {}
        self._made = self._made_lock = self._own_lock = False
        try:
            self.path = self.path.expanduser()
            self._lock(make=not _open)
            self._sweep({"lock", ".DS_Store", *(self._load() if _open else ())})
            for name, log in self.logs.items():
                self.lower(name, log.first, log.count)
        except BaseException as error:
            self._release(False, self._made_lock, self._made)
            unusable = isinstance(error, (OSError, RuntimeError, ValueError))
            if unusable and not isinstance(error, TovaError):
                raise self._unusable(error) from error
            raise
        _OPEN.add(self)
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 < allowed < _FILES:
            with suppress(OSError, ValueError):
                more = _FILES if most < 0 else min(_FILES, most)
                resource.setrlimit(resource.RLIMIT_NOFILE, (more, most))

    @classmethod
    def open(cls, path: str | os.PathLike[str], keep: bool = True) -> LogDirectory:
        """Open the logs that were kept; if this process is killed, they still are.

        Raises OptionError as for a new one, or if nothing was kept; CacheStateError if
        more is damaged than the last blocks.
        """
        return cls(path, keep, _open=True)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of all logs."""
        return sum(log.nbytes for log in self.logs.values())

    def log(self, name: str, parts: Parts, limit_rows: int | None = None) -> RowLog:
        """Return the log of this name, a new one if there is none.

        parts: NumPy dtype and shape of a row of each.
        limit_rows: rows to hold, rounded up to blocks, and two of them at least.

        Raises OptionError if it cannot be written, CacheStateError if the log that is
        there has other parts or another limit.
        """
        log = RowLog(self, name, parts, limit_rows)
        if found := self.logs.get(name):
            if (got := found.describe()) != (want := log.describe()):
                raise CacheStateError(
                    f"archive={str(self.path)!r}: log {name} is of {got}, not {want}. "
                    "Use the options that it was kept with."
                )
            return found
        try:
            log.create()
        except OSError as error:
            log.close(delete=True)
            raise self._unusable(error) from error
        self.logs[name] = log
        return log

    def close(self) -> None:
        """Delete the logs, or keep them; the second time does nothing.

        Raises CacheStateError if not all could be kept; then what could be is.
        """
        # A fork has it too.
        if self._fd < 0 or self._pid != os.getpid():
            return
        failures, entries, delete = [], {}, not self.keep
        if delete:
            with suppress(OSError):
                os.unlink(self.path / "kept.json")
        else:
            for name, log in self.logs.items():
                count = log.count
                try:
                    log.flush()
                except CacheStateError as error:
                    failures.append(error)
                    count = count // BLOCK * BLOCK
                entries[name] = _entry(log, log.first, count)
            try:
                self._write_kept(entries)
            except CacheStateError as error:
                failures.append(error)
        self._release(delete, delete and self._own_lock, delete and self._made)
        if failures:
            raise failures[-1]

    __del__ = close

    def _release(self, logs: bool, lock: bool, directory: bool) -> None:
        """Close everything, and delete these."""
        for log in self.logs.values():
            log.close(delete=logs)
        with suppress(OSError):
            if lock:
                os.unlink(self.path / "lock")
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with suppress(OSError):
            if directory:
                os.rmdir(self.path)

    def _refused(self, why: str, do: str = "Use another directory") -> OptionError:
        return OptionError(f"archive={str(self.path)!r} {why}. {do}.")

    def _foreign(self, name: str) -> OptionError:
        return self._refused(f"holds {name!r}, which is not of an archive")

    def _unusable(self, error: Exception) -> OptionError:
        reason = getattr(error, "strerror", None) or error
        return self._refused(f"cannot be used ({reason})")

    def _lock(self, make: bool) -> None:
        if make:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
                self._made = True
        # Before anything is put into a directory that is not for us.
        for name in os.listdir(self.path):
            if not _KNOWN.fullmatch(name):
                raise self._foreign(name)
        lock = self.path / "lock"
        try:
            self._fd = os.open(lock, FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
            self._made_lock = True
        except FileExistsError:
            self._fd = os.open(lock, FLAGS)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it may have deleted it since it was opened.
            if not os.path.samestat(os.lstat(lock), os.fstat(self._fd)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError) as error:
            self._made = self._made_lock = False
            why = "is in use by another process or another cache"
            raise self._refused(why) from error
        if self._made_lock:
            write_all(self._fd, MAGIC, 0)
        if (content := os.pread(self._fd, 99, 0)) not in (b"", MAGIC):
            raise self._foreign("lock")
        self._own_lock = content == MAGIC

    def _sweep(self, known: set[str]) -> None:
        """Delete what a killed run left. Raises OptionError if anything is not ours."""
        stale = []
        for path in self.path.iterdir():
            if path.name in known:
                continue
            if path.name == "kept.json":
                do = "Open them with LogDirectory.open, or use another directory"
                raise self._refused("holds rows that were kept", do)
            if path.is_symlink() or not path.is_file():
                raise self._foreign(path.name)
            with open(path, "rb") as file:
                head = file.read(len(MAGIC))
            # A run that was killed early leaves less of a file; but its lock too.
            begun = MAGIC.startswith(head) or path.name == "kept.json.tmp"
            found_lock = self._own_lock and not self._made_lock
            if head != MAGIC and not (begun and found_lock):
                raise self._foreign(path.name)
            stale.append(path)
        for path in stale:
            path.unlink()

    def _load(self) -> set[str]:
        """Open what was kept, and return the names of its files."""
        path, names = self.path / "kept.json", {"kept.json"}
        if not path.exists():
            raise self._refused("holds nothing that was kept")
        try:
            self._kept = json.loads(path.read_bytes())
            for name, entry in self._kept.items():
                log = RowLog(self, name, entry["parts"], entry["limit_rows"])
                self.logs[name] = log
                log.reopen(entry["first"], entry["count"])
                names |= log.files
        except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
            raise CacheStateError(
                f"{path}: not all that was kept is there ({error}). Delete the "
                "directory, and begin again with a new archive."
            ) from error
        return names

    def lower(self, name: str, first: int, count: int) -> None:
        """Note that less of what was kept is held. Raises CacheStateError."""
        if name in self._kept and count < self._kept[name]["count"]:
            entry = _entry(self.logs[name], first, count)
            self._write_kept({**self._kept, name: entry})

    def _write_kept(self, entries: dict[str, Any]) -> None:
        path, written = self.path / "kept.json", self.path / "kept.json.tmp"
        try:
            with open(written, "w") as file:
                json.dump(entries, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(written, path)
        except OSError as error:
            raise CacheStateError(
                f"{path}: cannot write it ({error.strerror}). Make room on the disk."
            ) from error
        self._kept = entries


def _entry(log: RowLog, first: int, count: int) -> dict[str, Any]:
    """Return what kept.json says of a log if it holds these rows."""
    return {**log.describe(), "first": min(first, count), "count": count}


# Those that are open when the process ends.
_OPEN: weakref.WeakSet[LogDirectory] = weakref.WeakSet()


def _close_all() -> None:
    # All of them, whichever raises.
    with ExitStack() as stack:
        for directory in list(_OPEN):
            stack.callback(directory.close)
