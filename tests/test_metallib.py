"""Our Metal calls only what Apple's compiler is seen to take: results/metallib.json.

scripts/metallib_witness.py made that file from the library in MLX's wheel for macOS;
nothing is fetched here.
"""

import json
import struct
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import metallib  # noqa: E402
from metallib_witness import metal_texts, names, used  # noqa: E402

FOUND = json.loads((ROOT / "results/metallib.json").read_text(encoding="utf-8"))
OURS = metal_texts()
EVERY = [text for texts in OURS.values() for text in texts]
# Of what a kernel of ours needs and MLX's library has not: why it is right.
UNSEEN: dict[str, str] = {}


@pytest.mark.parametrize(("file", "texts"), OURS.items())
def test_our_metal_uses_only_what_apples_compiler_is_seen_to_take(file, texts):
    assert used(texts, EVERY) - FOUND["seen"].keys() - UNSEEN.keys() == set(), (
        f"{file}: results/metallib.json has no such built-in. Use another, or say in "
        "UNSEEN why it is right."
    )


def test_what_is_said_of_what_is_not_seen_is_needed():
    assert UNSEEN.keys() <= used(EVERY) - FOUND["seen"].keys()


def test_no_metal_is_overlooked():
    for file in (ROOT / "tova_mlx").rglob("*.py"):
        if "metal_kernel(" in file.read_text(encoding="utf-8"):
            # Its own, or that of a file beside it.
            files = [file, *file.parent.glob("*_sources.py")]
            assert any(used(OURS.get(str(f.relative_to(ROOT)), [])) for f in files)
    some = {"exp", "simd_max", "as_type", "thread_index_in_simdgroup"}
    assert used(EVERY) >= some | {"threadgroup_barrier", "mem_threadgroup"}


def test_the_library_was_read_and_compiled_as_we_say():
    n = FOUND["kernels"]
    assert (FOUND["not_read"], FOUND["not_seen"]) == ([], [])
    assert n > 17_000
    assert FOUND["options"]["denorms_disable"] == n
    assert FOUND["options"]["fast_math_disable"] == n
    assert FOUND["fast_math_flags"] == {}
    assert FOUND["fused"]["llvm.fmuladd.f32"] > 4000
    page = (ROOT / "docs/metal.md").read_text(encoding="utf-8")
    assert f"{n:,}" in page
    assert all(compiler in page for compiler in FOUND["compilers"])


def test_names_in_a_text_of_metal():
    text = """
      #define TOVA_HELD(c) true  // not(this)
      METAL_FUNC float tova_at(threadgroup float* p, int k) { return p[k]; }
      template <typename T>
      METAL_FUNC T tova_two(T x) { return x + T(1); }
      /* nor(that) */
      for (uint i = thread_position_in_grid.x; i < uint(n); i += threads_per_grid.x) {
        if (TOVA_HELD(i)) out[i] = metal::fast::exp2(tova_at(s, 1)) + float4(1).x;
        bits = as_type<uint>(simd_min (tova_two<float>(x)));
        simdgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
      }
    """
    assert used([text]) == {
        *("thread_position_in_grid", "threads_per_grid", "exp2", "as_type", "simd_min"),
        *("simdgroup_barrier", "mem_device", "mem_threadgroup"),
        # Of a template parameter nobody says that it is a type.
        "T",
    }
    assert used(["x = tova_at(s, 1);"], [text]) == set()
    assert used(["x = tova_at(s, 1);"]) == {"tova_at"}


@pytest.mark.parametrize(
    ("air", "metal"),
    [
        ("air.exp.f32", ["exp"]),
        ("air.fast_exp.f16", ["exp"]),
        ("air.simd_shuffle_down.u.v2i32", ["simd_shuffle_down"]),
        ("air.simd_any", ["simd_any"]),
        ("air.wg.barrier", ["threadgroup_barrier"]),
        ("air.atomic.global.add.f32", ["atomic_fetch_add_explicit"]),
        ("air.fmin.f32", ["min", "fmin"]),
        ("air.min.s.i16", ["min"]),
        ("air.convert.f.bf16.u.i8", ["convert"]),
    ],
)
def test_what_metal_calls_a_built_in(air, metal):
    assert names(air) == metal


def container(*named):
    """A metallib of these functions, as far as we know what is in one."""

    def tag(name, data):
        return name + struct.pack("<H", len(data)) + data

    entries, bitcode = b"", b""
    for name, code in named:
        place = tag(b"OFFT", struct.pack("<QQQ", 8, 8, len(bitcode)))
        size = tag(b"MDSZ", struct.pack("<Q", len(code)))
        entry = tag(b"NAME", name.encode() + b"\0") + place + size + b"ENDT"
        entries += struct.pack("<I", 4 + len(entry)) + entry
        bitcode += code
    listed = struct.pack("<I", len(named)) + entries
    head = bytearray(88)
    head[:4] = b"MTLB"
    struct.pack_into("<Q", head, 24, len(head))
    struct.pack_into("<Q", head, 72, len(head) + len(listed))
    return bytes(head) + listed + bitcode


def test_functions_of_a_library():
    # The letters that end an entry may also stand in it.
    named = [("first", b"BC one"), ("ENDT", b"BC the second"), ("c", b"")]
    assert list(metallib.functions(container(*named))) == named
    with pytest.raises(SystemExit, match="not a metallib"):
        list(metallib.functions(b"ELF"))


KERNEL = """
target triple = "air64_v26-apple-macosx14.0.0"
define void @k(ptr addrspace(1) %0, i32 %1) local_unnamed_addr #0 {
  %3 = bitcast float %2 to i32
  %4 = fmul FLAGS float %2, %2
  %5 = tail call CALLED float @air.simd_max.f32(float %4) #1
  tail call void @air.wg.barrier(i32 2, i32 1) #1
  %6 = call float @llvm.fmuladd.f32(float %4, float %5, float %4)
}
declare float @air.simd_max.f32(float) local_unnamed_addr #1
attributes #0 = { nounwind }
attributes #1 = { convergent nounwind }
!9 = !{!"Apple metal version 1.2 (metalfe-1.2)"}
!11 = !{!"Metal", i32 3, i32 1, i32 0}
!12 = !{!"air.compile.denorms_disable"}
!21 = !{i32 1, !"air.thread_position_in_grid", !"air.arg_type_name", !"uint"}
"""


@pytest.mark.parametrize(
    ("flags", "called", "fast"),
    [
        ("", "fastcc", set()),
        ("contract", "fast", {"fmul", "air.simd_max.f32"}),
    ],
)
def test_facts_of_a_kernel(flags, called, fast):
    text = KERNEL.replace("FLAGS ", flags and f"{flags} ").replace("CALLED", called)
    kernel = metallib.facts("k", text)
    assert kernel == metallib.Kernel(
        name="k",
        compiler="Apple metal version 1.2 (metalfe-1.2)",
        language="Metal 3.1",
        target="air64_v26-apple-macosx14.0.0",
        options=frozenset({"denorms_disable"}),
        calls=frozenset({"air.simd_max.f32", "air.wg.barrier", "llvm.fmuladd.f32"}),
        effects={"air.simd_max.f32": "convergent nounwind"},
        barriers=frozenset({("wg", 2, 1)}),
        places=frozenset({"thread_position_in_grid"}),
        bitcasts=frozenset({("float", "i32")}),
        floating=frozenset({"fmul"}),
        fast=frozenset(fast),
    )
