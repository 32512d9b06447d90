"""Compiles kernels with clang's C++ for OpenCL, which has Metal's address spaces.

The checked build calls a hook at every access to memory (`-fsanitize=thread`) and at
every index outside of an array (`-fsanitize=bounds`); our runtime answers them, the
sanitizers' libraries are not linked. Libraries are kept by the hash of all that went
into them in `MSLCHECK_CACHE`, by default the user's cache directory.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from .findings import Finding, Kind
from .preamble import preamble
from .translate import translate

_HERE = Path(__file__).parent
_SHIM = _HERE / "shim"
_RUNTIME = _HERE / "runtime"
_GUARD = 1 << 16  # as in runtime/memory.h

_RUNTIME_FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-fwrapv", "-fvisibility=default"),
    *("-shared", "-Wl,-Bsymbolic", "-Wl,-z,now"),
)
_EXTENSIONS = ("+cl_khr_fp16", "+__cl_clang_non_portable_kernel_param_types")
_KERNEL_FLAGS = (
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-target"),
    *("x86_64-linux-gnu", "-mf16c", "-mfma", "-fPIC", "-gline-tables-only"),
    # No generic address space: a pointer without one does not compile.
    *("-Xclang", f"-cl-ext=-all,{','.join(_EXTENSIONS)}"),
    # A local variable that is read before it is set is NaN or far out of range.
    "-ftrivial-auto-var-init=pattern",
    *("-Werror=uninitialized", "-Werror=sometimes-uninitialized"),
    *("-Wimplicit-float-conversion", "-Wimplicit-int-float-conversion"),
    *("-Wno-unknown-attributes", "-Wno-main", "-fno-builtin"),
    *(f"-I{_SHIM}", f"-I{_RUNTIME}"),
)
_CHECKED_FLAGS = (
    *("-O0", "-fsanitize=thread", "-fsanitize=bounds"),
    # `a[i] += 1` reads, too.
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
    *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
)
# Tail calls would hide where a thread waits.
_FAST_FLAGS = ("-O2", "-fno-optimize-sibling-calls")

_TO_BFLOAT = re.compile(
    r"implicit conversion.* to '[^']*\b(bfloat|bfloat16_t|__bf16)\b"
)
_DIAGNOSTIC = re.compile(
    r"^(?P<file>[^:\n]+):(?P<line>\d+):\d+: (?P<type>(?:fatal )?error|warning): "
    r"(?P<text>.*)$",
    re.M,
)
# clang puts threadgroup variables last, as local common symbols: `threadgroup float
# a[8]` in the function k is _ZZ1kE1a.
_VARIABLE = re.compile(
    r"^\t\.local\t(?P<symbol>\w+)\n\t\.comm\t\w+,(?P<bytes>\d+),\d+$", re.M
)


def compiler() -> str:
    """clang++ of LLVM 19."""
    return os.environ.get("MSLCHECK_CLANG", "clang++-19")


def missing() -> str | None:
    """Why kernels cannot be compiled and run here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "mslcheck runs kernels on x86-64 Linux only"
    for tool in (compiler(), "addr2line"):
        if shutil.which(tool) is None:
            return f"mslcheck needs {tool}: install clang-19 and binutils"
    return None


def skip_reason() -> str | None:
    """Why tests of checked kernels are skipped here, or None.

    In CI on Linux there is no reason: a missing compiler must fail, not skip.
    """
    if mx.metal.is_available():
        return "there is Metal, where kernels run on the GPU"
    if sys.platform == "linux" and os.environ.get("CI"):
        return None
    return missing()


class CompileError(Exception):
    """What the compiler says is wrong with a kernel."""

    def __init__(self, findings: list[Finding]):
        self.findings = findings
        super().__init__("\n".join(map(str, findings)))


@functools.cache
def build(source: str, checked: bool, fused: bool) -> Path:
    """The library of a kernel, given as generated Metal source.

    fused: whether a product and a sum in one expression are rounded once, as Metal may.
    Raises CompileError.
    """
    if reason := missing():
        raise RuntimeError(reason)
    contract = "-ffp-contract=on" if fused else "-ffp-contract=off"
    mode = _CHECKED_FLAGS if checked else _FAST_FLAGS
    flags = (*_KERNEL_FLAGS, *mode, contract)
    code = preamble() + translate(source)
    runtime = build_runtime()
    library = _cache() / f"{_hash(code, *flags, runtime.name, _texts(_SHIM))}.so"
    if not library.exists():
        with _new(library) as path:
            assembly = _with_variables(_compile(code, flags))
            command = (compiler(), "-x", "assembler", "-", "-x", "none", str(runtime))
            link = ("-shared", "-lm", "-Wl,-z,now", "-Wl,-rpath,$ORIGIN")
            _run([*command, *link, "-o", str(path)], assembly)
    return library


@functools.cache
def build_runtime() -> Path:
    """The library that runs kernels."""
    name = f"runtime-{_hash(_texts(_RUNTIME), *_RUNTIME_FLAGS, _version())}.so"
    library = _cache() / name
    if not library.exists():
        with _new(library) as path:
            source = str(_RUNTIME / "runtime.cpp")
            soname = f"-Wl,-soname,{name}"
            _run([compiler(), *_RUNTIME_FLAGS, soname, source, "-o", str(path)])
    return library


def _compile(code: str, flags: tuple[str, ...]) -> str:
    """Assembly."""
    command = [compiler(), *flags, "-S", "-o", "-", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    findings = [
        Finding(Kind.COMPILE, match["text"], f"{match['file']}:{match['line']}")
        for match in _DIAGNOSTIC.finditer(done.stderr)
        if match["type"] != "warning" or _TO_BFLOAT.search(match["text"])
    ]
    if done.returncode and not findings:
        findings = [Finding(Kind.COMPILE, done.stderr)]
    if findings:
        raise CompileError(findings)
    return done.stdout


def _with_variables(assembly: str) -> str:
    """Free space after every threadgroup variable, and a table of them."""
    entries: list[str] = []
    names: list[str] = []

    def guarded(match: re.Match[str]) -> str:
        symbol, size = match["symbol"], int(match["bytes"])
        names.append(f'.Lmsl{len(names)}:\n\t.asciz\t"{_name(symbol)}"\n')
        entries.append(f"\t.quad\t{symbol}, {size}, .Lmsl{len(entries)}\n")
        return f"\t.local\t{symbol}\n\t.comm\t{symbol},{size + _GUARD},4096"

    assembly = _VARIABLE.sub(guarded, assembly)
    table = '\n\t.section\t.data.rel.ro,"aw"\n\t.p2align\t3\n\t.globl\tmsl_variables\n'
    table += "msl_variables:\n" + "".join(entries) + "\t.quad\t0, 0, 0\n"
    return assembly + table + "\t.section\t.rodata\n" + "".join(names)


def _name(symbol: str) -> str:
    """The variable of a mangled `_ZZ<length><function>...E<length><variable>`."""
    match = re.match(r"_ZZ(\d+)", symbol)
    assert match, symbol
    rest = symbol[match.end() + int(match[1]) :]
    variable = re.search(r"E(\d+)", rest)
    assert variable, symbol
    return rest[variable.end() :][: int(variable[1])]


def _cache() -> Path:
    """Never inside of the repository."""
    path = os.environ.get("MSLCHECK_CACHE")
    if path is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "mslcheck"
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextlib.contextmanager
def _new(library: Path) -> Iterator[Path]:
    """A temporary path that becomes `library`, whoever else builds it meanwhile."""
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        path = Path(directory) / library.name
        yield path
        os.replace(path, library)


def _run(command: list[str], text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _texts(directory: Path) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return "\0".join(path.read_text(encoding="utf-8") for path in files)


@functools.cache
def _version() -> str:
    command = [compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout
