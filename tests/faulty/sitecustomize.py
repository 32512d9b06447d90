"""Faults in a process, at a step of its work on files; for tests/faults.py.

Python imports this at its start where PYTHONPATH names this folder. TOVA_FAULT says
what happens, as JSON; nothing does without it:

    under: the directory whose files count
    log: a file that gets a line for every step, from all processes that share it
    kind: "none", "kill", "full" (no space on the disk), "interrupt" (Ctrl-C)
    at: the number of the step at which it happens, from 0; "full" stays

A step is what changes a file or a directory: opening to write, writing, having it on
the disk, renaming, deleting, making a directory. What is written then is cut in the
middle, inside a character of several bytes if there is one.
"""

import builtins
import errno
import importlib.abc
import importlib.util
import io
import json
import os
import signal
import sys

_FAULT = json.loads(os.environ.get("TOVA_FAULT", "{}"))
_UNDER = os.path.realpath(_FAULT.get("under", ""))
_LOG = os.open(
    _FAULT.get("log", os.devnull),
    os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC,
)
_WIDTH = 200
_NEEDS_SPACE = ("open", "write", "mkdir", "mlx")
_REAL = {name: getattr(os, name) for name in ("write", "pwrite", "fsync")}


def _path_of(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        import fcntl

        return fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()


def _watched(path, dir_fd=None):
    """The path of a file or descriptor below the directory, else None."""
    if isinstance(path, int):
        path = _path_of(path)
    try:
        path = os.fsdecode(path)
    except TypeError:
        return None
    if isinstance(dir_fd, int) and dir_fd >= 0:
        path = os.path.join(_path_of(dir_fd), path)
    path = os.path.abspath(path)
    # The directory's own names, and not a link's target.
    place = os.path.realpath(os.path.dirname(path))
    inside = place == _UNDER or place.startswith(_UNDER + os.sep)
    return path if inside or path == _UNDER else None


def _cut(data):
    """A part of what is written that ends inside a character, if it can."""
    data = bytes(data)
    half = len(data) // 2
    for i in [*range(half, len(data)), *range(half)]:
        if data[i] & 0xC0 == 0x80:
            return data[:i]
    return data[:half]


def _step(what, path, half=lambda: None):
    """Count a step, and let the fault happen if it is its turn.

    half: does a part of the step, before the process is killed or there is no space.
    """
    line = f"{what} {path}".encode()[: _WIDTH - 1].ljust(_WIDTH - 1) + b"\n"
    _REAL["write"](_LOG, line)
    # Of all processes: a log that is appended to stands where this line ends.
    n = os.lseek(_LOG, 0, os.SEEK_CUR) // _WIDTH - 1
    kind, at = _FAULT["kind"], _FAULT["at"]
    if kind == "full" and n >= at and what in _NEEDS_SPACE:
        if n == at:
            half()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    if n != at or kind not in ("kill", "interrupt"):
        return
    if kind == "kill":
        half()
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGINT)


def _audit(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR) and (path := _watched(path)):
            made = flags & os.O_CREAT and not os.path.exists(path)
            _step("open" if made else "reopen", path)
    elif event == "os.mkdir":
        if path := _watched(arguments[0], arguments[2]):
            _step("mkdir", path)
    elif event in ("os.remove", "os.rmdir"):
        if path := _watched(arguments[0], arguments[-1]):
            _step(event[3:], path)
    elif event == "os.rename" and (path := _watched(arguments[1], arguments[3])):
        _step("rename", path)


class _Raw(io.FileIO):
    """A file whose writes are steps."""

    def write(self, data):
        if path := _watched(self.fileno()):
            _step("write", path, lambda: super(_Raw, self).write(_cut(data)))
        return super().write(data)


def _open(
    file,
    mode="r",
    buffering=-1,
    encoding=None,
    errors=None,
    newline=None,
    closefd=True,
    opener=None,
):
    if not set(mode) & set("wax+") or isinstance(file, int) or not _watched(file):
        how = (buffering, encoding, errors, newline, closefd, opener)
        return _REAL_OPEN(file, mode, *how)
    raw = _Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
    if buffering == 0:
        return raw
    whole = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return whole if "b" in mode else io.TextIOWrapper(whole, encoding, errors, newline)


def _fd_writer(name):
    def write(fd, data, *where):
        if path := _watched(fd):
            _step("write", path, lambda: _REAL[name](fd, _cut(data), *where))
        return _REAL[name](fd, data, *where)

    return write


def _fsync(fd):
    if path := _watched(fd):
        _step("fsync", path)
    _REAL["fsync"](fd)


def _patch_mlx(mx):
    """MLX writes without Python: its file is cut afterwards."""
    save = mx.save_safetensors

    def save_safetensors(file, arrays, metadata=None):
        path = _watched(file) if isinstance(file, str) else None
        if not path:
            return save(file, arrays, metadata)

        def half():
            save(file, arrays, metadata)
            os.truncate(file, os.path.getsize(file) // 2)

        try:
            _step("mlx", path, half)
        except OSError as error:
            # What MLX says.
            raise RuntimeError(f"[write] Unable to write ({error.strerror})") from None
        return save(file, arrays, metadata)

    mx.save_safetensors = save_safetensors


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "mlx.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _patch_mlx(module)

        spec.loader.exec_module = exec_module
        return spec


_REAL_OPEN = io.open
if _FAULT:
    builtins.open = io.open = _open
    os.write, os.pwrite, os.fsync = _fd_writer("write"), _fd_writer("pwrite"), _fsync
    sys.meta_path.insert(0, _Finder())
    sys.addaudithook(_audit)
