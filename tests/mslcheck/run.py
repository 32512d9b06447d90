"""Runs a compiled kernel on arrays: NumPy in, NumPy out, and what was found."""

import ctypes
import functools
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .build import build_runtime
from .findings import Finding, Kind
from .record import Triple

_MAX_FINDINGS = 20
_CODE = re.compile(r"<([0-9a-f]+)>")


# The structs of runtime/interface.h, field by field.


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("element_bytes", ctypes.c_uint32),
        ("is_output", ctypes.c_uint32),
        ("is_filled", ctypes.c_uint32),
        ("reads", ctypes.c_uint64),
    )


class _Finding(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char * 24),
        ("code", ctypes.c_uint64),
        ("message", ctypes.c_char * 232),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("variables", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("findings", ctypes.POINTER(_Finding)),
        ("n_buffers", ctypes.c_uint32),
        ("max_findings", ctypes.c_uint32),
        ("n_findings", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("width", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("seconds", ctypes.c_uint32),
        ("checked", ctypes.c_uint32),
        ("flush", ctypes.c_uint32),
        ("exponentials", ctypes.c_uint64),
    )


class _Variable(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
    )


@dataclass
class Argument:
    """A buffer of a kernel: contiguous; an output is written in place."""

    name: str
    array: np.ndarray[Any, Any]
    is_output: bool = False
    is_filled: bool = False


@dataclass(frozen=True)
class Setting:
    """How a kernel is launched; see `Options` and `Launch` in runtime/interface.h."""

    grid: Triple
    threadgroup: Triple
    width: int
    seed: int
    seconds: int
    checked: bool
    flush: bool


@dataclass(frozen=True)
class Counts:
    """What one run of a kernel did, all threads together.

    reads: elements read of each buffer, by its name, in the checked build; a read that
    several threads share counts for each. exponentials: calls of `exp`.
    """

    reads: Mapping[str, int]
    exponentials: int


def run(
    library: Path, arguments: Sequence[Argument], setting: Setting
) -> tuple[list[Finding], Counts]:
    """Run the kernel in a library that `build` made."""
    kernel = _load(library)
    buffers = (_Buffer * max(1, len(arguments)))(*map(_buffer, arguments))
    findings = (_Finding * _MAX_FINDINGS)()
    launch = _Launch(
        kernel=ctypes.cast(kernel.msl_kernel, ctypes.c_void_p),
        variables=ctypes.addressof(_Variable.in_dll(kernel, "msl_variables")),
        buffers=buffers,
        findings=findings,
        n_buffers=len(arguments),
        max_findings=_MAX_FINDINGS,
        grid=setting.grid,
        threadgroup=setting.threadgroup,
        width=setting.width,
        seed=setting.seed,
        seconds=setting.seconds,
        checked=setting.checked,
        flush=setting.flush,
    )
    _load(build_runtime()).msl_launch(ctypes.byref(launch))
    found = findings[: launch.n_findings]
    reads = {a.name: b.reads for a, b in zip(arguments, buffers, strict=False)}
    counts = Counts(reads, launch.exponentials)
    return [_finding(library, raw) for raw in found], counts


def threadgroup_bytes(library: Path) -> int:
    """Threadgroup memory that the kernel declares."""
    kernel = _load(library)
    address = ctypes.addressof(_Variable.in_dll(kernel, "msl_variables"))
    total = 0
    while (variable := _Variable.from_address(address)).address:
        total += -(-variable.bytes // 16) * 16
        address += ctypes.sizeof(_Variable)
    return total


@functools.cache
def _load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _buffer(argument: Argument) -> _Buffer:
    array = argument.array
    assert array.flags.c_contiguous
    return _Buffer(
        name=argument.name.encode(),
        data=array.ctypes.data,
        bytes=array.nbytes,
        element_bytes=array.itemsize,
        is_output=argument.is_output,
        is_filled=argument.is_filled,
    )


def _finding(library: Path, raw: _Finding) -> Finding:
    def line(match: re.Match[str]) -> str:
        return _line(library, int(match[1], 16))

    message = _CODE.sub(line, raw.message.decode())
    where = _line(library, raw.code) if raw.code else ""
    return Finding(Kind(raw.kind.decode()), message, where)


@functools.cache
def _line(library: Path, code: int) -> str:
    """`source:12` for an address, as seen from outside of the shim's inlined functions.

    A line of the header is followed by the line of the source that called it.
    """
    command = ["addr2line", "-i", "-e", str(library), hex(code)]
    frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [frame.rsplit("/", 1)[-1].split(" ")[0] for frame in frames.split("\n")]
    ours = [name for name in names if name.split(":")[0] in ("header", "source")]
    return " from ".join(ours) or names[0]
