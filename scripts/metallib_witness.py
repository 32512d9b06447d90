"""What Apple's compiler made of MLX's own kernels, and whether ours use the same.

    python scripts/metallib_witness.py [--metallib FILE] [--out results/metallib.json]

MLX's wheel for macOS carries a library of its kernels, compiled by Apple. It is fetched
with pip (45 MB, kept in the user's cache directory) unless --metallib names one, and
llvm-dis of LLVM 17 to 19 shows what is in it: the options, the built-ins and their
effects, the barriers. A built-in of Metal is *seen* if a header of MLX calls it and the
library has what it becomes. That list goes to --out; every built-in that the kernels in
tova_mlx use must be in it (tests/test_metallib.py holds them to the file, without a
download). Takes one or two minutes of two cores. The last line is JSON; exit 1 if one
is not there.
"""

import argparse
import ast
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import ROOT, finish, provenance
from metallib import Kernel, disassembler, read_kernels

PACKAGE = ROOT / "tova_mlx"
# What Apple's bitcode calls otherwise than Metal does; else `air.NAME` is NAME and
# `air.fast_NAME` is NAME of metal::fast.
_RENAMED = {
    "air.wg.barrier": ["threadgroup_barrier"],
    "air.simdgroup.barrier": ["simdgroup_barrier"],
    "air.atomic.global.add": ["atomic_fetch_add_explicit"],
    "air.fabs": ["abs", "fabs"],
    "air.fmax": ["max", "fmax"],
    "air.fmin": ["min", "fmin"],
}
_FLAGS = {0: "mem_none", 1: "mem_device", 2: "mem_threadgroup"}
_TYPE = re.compile(r"\.(?:[usf]\.)?(?:v\d+)?(?:[if]|bf)\d+$")

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_CALLED = re.compile(r"\b([A-Za-z_]\w*)\s*(?:<[\w\s,:*]*>)?\s*\(")
_PLACE = re.compile(
    r"\b(?:\w+_in_(?:grid|threadgroup|simdgroup|quadgroup)|threads?\w*_per_\w+|"
    r"simdgroups_per_threadgroup)\b"
)
_MEMORY = re.compile(r"\bmem_flags::(\w+)")
_MADE = re.compile(
    r"#define[ \t]+(\w+)|\b(?:METAL_FUNC|inline)\b[^;{}()]*?\b(\w+)\s*\("
    r"|\bauto\s+(\w+)\s*=\s*\["
)
_WORDS = re.compile(
    r"(?:if|for|while|switch|return|sizeof|static_cast|defined|size_t"
    r"|(?:bool|half|float|bfloat16_t|u?(?:char|short|int|long))[234]?"
    r"|u?int(?:8|16|32|64)_t)"
)


def names(air: str) -> list[str]:
    """What Metal calls a built-in of Apple's bitcode."""
    plain = _TYPE.sub("", air)
    return _RENAMED.get(plain, [plain.split(".")[1].removeprefix("fast_")])


def metal_texts(package: Path = PACKAGE) -> dict[str, list[str]]:
    """The Metal in a package, by file: strings in which a line ends with a semicolon.

    Not those that are docstrings.
    """
    found = {}
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts = [t for t in _strings(tree) if re.search(r";[ \t]*\n|#define", t)]
        if texts:
            found[str(file.relative_to(package.parent))] = texts
    return found


def _strings(tree: ast.AST) -> Iterator[str]:
    nodes = list(ast.walk(tree))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if not isinstance(node, ast.Constant) or node in docstrings:
            continue
        if isinstance(node.value, str):
            yield node.value


def used(texts: Iterable[str], beside: Iterable[str] = ()) -> set[str]:
    """The built-ins, places of threads and kinds of memory that Metal texts name.

    beside: texts whose functions and macros are no built-ins either.
    """
    code = _code(texts)
    made = _MADE.findall(code + _code(beside))
    called = {name for name in _CALLED.findall(code) if not _WORDS.fullmatch(name)}
    called -= {name for match in made for name in match}
    return called | set(_PLACE.findall(code)) | set(_MEMORY.findall(code))


def _code(texts: Iterable[str]) -> str:
    return "\n".join(_COMMENT.sub(" ", text) for text in texts)


def headers() -> Counter[str]:
    """In how many of MLX's headers of kernels each name is called, or names a place."""
    import mlx.core as mx

    folder = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
    found = Counter()
    for file in folder.rglob("*.h"):
        code = _COMMENT.sub(" ", file.read_text(encoding="utf-8"))
        words = _CALLED.findall(code) + _PLACE.findall(code) + _MEMORY.findall(code)
        found.update(set(words))
    return found


def seen(kernels: list[Kernel]) -> dict[str, dict[str, int]]:
    """Of each name in Metal that MLX's headers use, what it became in how many."""
    became: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for kernel in kernels:
        for air in kernel.calls:
            if air.startswith("air."):
                for name in names(air):
                    became[name][air] += 1
        for place in kernel.places:
            became[place][f"air.{place}"] += 1
        for flags in {flags for _, flags, _ in kernel.barriers}:
            became[_FLAGS[flags]][f"barrier {flags}"] += 1
        for old, new in kernel.bitcasts - {("ptr", "ptr")}:
            became["as_type"][f"bitcast {old} {new}"] += 1
    written = headers()
    return {n: dict(sorted(became[n].items())) for n in sorted(became) if written[n]}


def effects(kernels: list[Kernel]) -> dict[str, list[str]]:
    """The built-ins by their attributes, those of all types in one."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for kernel in kernels:
        for air, attributes in kernel.effects.items():
            found[attributes].add(_TYPE.sub("", air))
    return {how: sorted(names) for how, names in sorted(found.items())}


def counted(things: Iterable[Any]) -> dict[str, int]:
    """How often each is there, the most frequent first."""
    return {str(thing): n for thing, n in Counter(things).most_common()}


def report(kernels: list[Kernel]) -> dict[str, Any]:
    """All that the file is to say of a library's kernels; figures count kernels."""
    return {
        "compilers": counted(k.compiler for k in kernels),
        "languages": counted(k.language for k in kernels),
        "targets": counted(k.target for k in kernels),
        "options": counted(o for k in kernels for o in k.options),
        "floating": counted(f for k in kernels for f in k.floating),
        "fast_math_flags": counted(f for k in kernels for f in k.fast),
        "fused": counted(c for k in kernels for c in k.calls if c.startswith("llvm.")),
        "barriers": counted(f"{b} {f} {s}" for k in kernels for b, f, s in k.barriers),
        "effects": effects(kernels),
        "seen": seen(kernels),
    }


def fetched(version: str) -> Path:
    """The library in MLX's wheel of that version. Raises SystemExit without pip."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "tova_mlx" / "metallib"
    library = folder / f"mlx-{version}.metallib"
    if not library.exists():
        what = ["--platform", "macosx_14_0_arm64", "--only-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *what]
        command = [*pip, "--dest", str(folder), f"mlx-metal=={version}"]
        if subprocess.run(command).returncode:
            raise SystemExit(
                f"pip cannot fetch mlx-metal {version}. Name another --mlx, or a "
                "--metallib."
            )
        (wheel,) = folder.glob(f"mlx_metal-{version}-*.whl")
        with zipfile.ZipFile(wheel) as files:
            part = library.with_suffix(".part")
            part.write_bytes(files.read("mlx/lib/mlx.metallib"))
        part.replace(library)
        wheel.unlink()
    return library


def main() -> int:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--metallib", type=Path, help="a library that is here")
    parser.add_argument("--mlx", default=version("mlx"), help="version of the wheel")
    parser.add_argument("--llvm-dis", help="default: that of LLVM 19, 18 or 17")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--every", type=int, default=1, help="read one kernel in N")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    llvm_dis = disassembler(args.llvm_dis)
    path = args.metallib or fetched(args.mlx)
    library = path.read_bytes()
    read = list(read_kernels(library, llvm_dis, args.jobs, args.every))
    kernels = [kernel for kernel in read if isinstance(kernel, Kernel)]
    found = report(kernels)
    ours = used(text for texts in metal_texts().values() for text in texts)
    unseen = sorted(ours - found["seen"].keys())
    for name in sorted(ours):
        became = found["seen"].get(name)
        print(f"{name:32} {'NOT SEEN' if became is None else became}")
    result = {
        **provenance(),
        "library": f"mlx-metal {args.mlx}" if not args.metallib else path.name,
        "sha256": hashlib.sha256(library).hexdigest(),
        "kernels": len(read),
        "not_read": [kernel for kernel in read if isinstance(kernel, str)],
        **found,
        "ours": sorted(ours),
        "not_seen": unseen,
    }
    finish(result, args.out)
    return int(bool(unseen))


if __name__ == "__main__":
    sys.exit(main())
