"""Reads the kernels in a metallib, as LLVM's llvm-dis shows them.

A metallib is a header, a list of functions and their bitcode. Apple documents none of
it; the offsets are those that the library in MLX's wheel bears out: as many functions
as the list says, each one's bitcode where the list puts it. llvm-dis of LLVM 17 to 19
reads that bitcode; it has types without pointees and says effects in its own words,
`memory(none)` for Apple's `readnone`.
"""

import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

# Where the header says where the functions' names and the bitcode begin.
_NAMES_AT, _BITCODE_AT = 24, 72
_CHUNK = 100
_DISASSEMBLERS = ("llvm-dis-19", "llvm-dis-18", "llvm-dis-17", "llvm-dis")

_CALL = re.compile(r"\bcall\b([^@\n]*)@((?:air|llvm\.fmuladd)\.[\w.]+)\(")
_DECLARED = re.compile(r"^declare [^@\n]*@(air\.[\w.]+)\([^\n]*\) .*?(#\d+)$", re.M)
_ATTRIBUTES = re.compile(r"^attributes (#\d+) = \{ (.*) \}$", re.M)
_BARRIER = re.compile(r"@air\.(wg|simdgroup)\.barrier\(i32 (\d+), i32 (\d+)\)")
_FLOATING = re.compile(r" = (f(?:add|sub|mul|div|neg|rem|cmp)) ([^%\n]*)")
_FAST = re.compile(r"\b(?:fast|nnan|ninf|nsz|arcp|contract|afn|reassoc)\b")
_BITCAST = re.compile(r" = bitcast (\w+) %\S+ to (\w+)")
_OPTION = re.compile(r'!"air\.compile\.(\w+)"')
# An argument that is a thread's place, not a buffer.
_PLACE = re.compile(
    r'!"air\.(\w+_in_(?:grid|threadgroup|simdgroup|quadgroup)|\w+_per_\w+)"'
)
_COMPILER = re.compile(r'!"(Apple metal version [^"]*)"')
_LANGUAGE = re.compile(r'!\{!"Metal", i32 (\d+), i32 (\d+), i32 \d+\}')
_TARGET = re.compile(r'^target triple = "(.*)"$', re.M)


class Kernel(NamedTuple):
    """What the bitcode of one kernel says; each thing once."""

    name: str
    compiler: str
    language: str
    target: str
    options: frozenset[str]
    # The built-ins that it calls, as Apple names them, and LLVM's fused products.
    calls: frozenset[str]
    # Of each built-in that it declares, the attributes in LLVM's words.
    effects: dict[str, str]
    # Which barrier, its flags, its scope.
    barriers: frozenset[tuple[str, int, int]]
    # Arguments such as thread_position_in_grid.
    places: frozenset[str]
    bitcasts: frozenset[tuple[str, str]]
    # Instructions on floats, and those of them, or calls, with a fast-math flag.
    floating: frozenset[str]
    fast: frozenset[str]


def functions(library: bytes) -> Iterator[tuple[str, bytes]]:
    """The name and the bitcode of each function."""
    if library[:4] != b"MTLB":
        raise SystemExit("That is not a metallib: it does not begin with MTLB.")
    (at,) = struct.unpack_from("<Q", library, _NAMES_AT)
    (bitcode,) = struct.unpack_from("<Q", library, _BITCODE_AT)
    (count,) = struct.unpack_from("<I", library, at)
    at += 4
    for _ in range(count):
        (length,) = struct.unpack_from("<I", library, at)
        tags = dict(_tags(library[at + 4 : at + length]))
        at += length
        (offset,) = struct.unpack_from("<Q", tags["OFFT"], 16)
        (size,) = struct.unpack("<Q", tags["MDSZ"])
        start = bitcode + offset
        yield tags["NAME"].rstrip(b"\0").decode(), library[start : start + size]


def _tags(entry: bytes) -> Iterator[tuple[str, bytes]]:
    """A function's entry: four letters, a length, that many bytes; ENDT at its end."""
    at = 0
    while (tag := entry[at : at + 4]) != b"ENDT":
        (length,) = struct.unpack_from("<H", entry, at + 4)
        yield tag.decode(), entry[at + 6 : at + 6 + length]
        at += 6 + length


def disassembler(given: str | None = None) -> str:
    """The llvm-dis to use. Raises SystemExit if there is none."""
    found = next(filter(shutil.which, [given] if given else _DISASSEMBLERS), None)
    if found is None:
        raise SystemExit("llvm-dis is missing: install llvm-19, or name --llvm-dis.")
    return found


def read_kernels(
    library: bytes, llvm_dis: str, jobs: int, every: int
) -> Iterator[Kernel | str]:
    """Every so many-th kernel, or the name of one that llvm-dis does not read."""
    chosen = list(functions(library))[::every]
    chunks = [chosen[i : i + _CHUNK] for i in range(0, len(chosen), _CHUNK)]
    with Pool(jobs) as pool:
        for kernels in pool.imap(_Disassembly(llvm_dis), chunks):
            yield from kernels


class _Disassembly:
    """Reads a few kernels in one process of llvm-dis; a class, so that it pickles."""

    def __init__(self, llvm_dis: str):
        self.llvm_dis = llvm_dis

    def __call__(self, chunk: Sequence[tuple[str, bytes]]) -> list[Kernel | str]:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{i}.bc" for i in range(len(chunk))]
            for path, (_, bitcode) in zip(paths, chunk, strict=True):
                path.write_bytes(bitcode)
            # It stops at the first that it does not read; the rest are tried alone.
            self._run(paths)
            for path in paths:
                if not path.with_suffix(".ll").exists():
                    self._run([path])
            return [
                facts(name, path.with_suffix(".ll").read_text(encoding="utf-8"))
                if path.with_suffix(".ll").exists()
                else name
                for path, (name, _) in zip(paths, chunk, strict=True)
            ]

    def _run(self, paths: list[Path]) -> None:
        subprocess.run([self.llvm_dis, *map(str, paths)], capture_output=True)


def facts(name: str, text: str) -> Kernel:
    """What a disassembled kernel says."""
    attributes = dict(_ATTRIBUTES.findall(text))
    calls = _CALL.findall(text)
    floating = _FLOATING.findall(text)
    flagged = [(what, how) for how, what in calls] + floating
    (compiler,) = _COMPILER.findall(text)
    ((major, minor),) = _LANGUAGE.findall(text)
    (target,) = _TARGET.findall(text)
    return Kernel(
        name=name,
        compiler=compiler,
        language=f"Metal {major}.{minor}",
        target=target,
        options=frozenset(_OPTION.findall(text)),
        calls=frozenset(what for _, what in calls),
        effects={what: attributes[n] for what, n in _DECLARED.findall(text)},
        barriers=frozenset((k, int(f), int(s)) for k, f, s in _BARRIER.findall(text)),
        places=frozenset(_PLACE.findall(text)),
        bitcasts=frozenset(_BITCAST.findall(text)),
        floating=frozenset(what for what, _ in floating),
        fast=frozenset(what for what, how in flagged if _FAST.search(how)),
    )
