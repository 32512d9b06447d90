"""Bugs for the kernels of examples.py, of every kind that the checker knows."""

from .examples import BARRIER, STORE
from .findings import Kind
from .seeded import Bug

_LINT, _COMPILE = (Kind.LINT,), (Kind.COMPILE,)
_RACE, _BOUNDS = (Kind.RACE,), (Kind.OUT_OF_BOUNDS,)
# Who reads too early, reads what another thread has or has not written yet.
_EARLY = (Kind.RACE, Kind.UNINITIALISED)

_START = "float m = INFINITY;"
_IN_RANGE = "slot < n && slot < cap"
_MERGE = "if (sg == 0) {"
_ARRAY = "threadgroup float sm[TG / 32];"
_FIRST_ARGMIN = "simd_argmin(m, idx);\n  threadgroup"

VICTIM_BUGS = [
    Bug("no barrier", BARRIER, "", _EARLY),
    Bug(
        "barrier for no memory",
        BARRIER,
        "threadgroup_barrier(mem_flags::mem_none);",
        _RACE,
    ),
    Bug(
        "barrier for device memory only",
        BARRIER,
        "threadgroup_barrier(mem_flags::mem_device);",
        _RACE,
    ),
    Bug(
        "simdgroup_barrier for threadgroup_barrier",
        BARRIER,
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        _EARLY,
    ),
    Bug(
        "barrier in a branch",
        f"{STORE}\n  {BARRIER}",
        f"if (lane == 0) {{ sm[sg] = m; si[sg] = idx; {BARRIER} }}",
        (*_EARLY, Kind.BARRIER),
    ),
    Bug(
        "return before the barrier",
        _START,
        f"if (slot >= n) return; {_START}",
        (Kind.BARRIER, Kind.INACTIVE_LANE),
    ),
    Bug("one slot too many", _IN_RANGE, "slot <= cap", _BOUNDS),
    Bug("no bound on the slot", f"if ({_IN_RANGE}) {{", "{", _BOUNDS),
    Bug("transposed index", "[size_t(h) * cap + slot]", "[slot * cap + h]", _BOUNDS),
    Bug("free slots take part", _IN_RANGE, "slot < cap", (Kind.WRONG,)),
    Bug(
        "simdgroups of 64 assumed",
        "thread_index_in_simdgroup",
        "tid % 64",
        (Kind.WRONG,),
        more=(
            ("simdgroup_index_in_threadgroup", "tid / 64"),
            (_ARRAY, "threadgroup float sm[TG / 64];"),
            ("threadgroup int si[TG / 32];", "threadgroup int si[TG / 64];"),
            ("lane < TG / 32 ? sm", "lane < TG / 64 ? sm"),
            ("lane < TG / 32 ? si", "lane < TG / 64 ? si"),
            ("off = 16", "off = 32"),
        ),
    ),
    Bug("simdgroups of 16 assumed", "off = 16", "off = 8", (Kind.WRONG,)),
    Bug("array too small", _ARRAY, "threadgroup float sm[TG / 32 - 1];", _BOUNDS),
    Bug(
        "reads array elements that no thread wrote",
        _ARRAY,
        "threadgroup float sm[32];",
        (Kind.UNINITIALISED,),
        more=(("lane < TG / 32 ? sm[lane] : INFINITY", "sm[lane]"),),
    ),
    Bug("reads into the next array", "lane < TG / 32 ? sm", "true ? sm", _BOUNDS),
    Bug("ties to any slot", "(om == m && oi < i)", "om == m", (Kind.WRONG,)),
    Bug(
        "all threadgroups write one element",
        "pm[threadgroup_position_in_grid.x]",
        "pm[0]",
        (Kind.RACE, Kind.NOT_WRITTEN),
    ),
    Bug("all simdgroups write the result", "if (lane == 0) victims", "victims", _RACE),
    Bug(
        "an output is never written",
        "pi[threadgroup_position_in_grid.x] = idx;",
        "",
        (Kind.NOT_WRITTEN,),
    ),
    Bug(
        "writes to an input",
        "const int H =",
        "((device float*)w)[0] = 0; const int H =",
        (Kind.WRITE_TO_INPUT,),
    ),
    Bug(
        "simdgroup operation in a branch",
        _FIRST_ARGMIN,
        f"if (slot < n) {_FIRST_ARGMIN}",
        (Kind.SIMDGROUP, Kind.INACTIVE_LANE),
    ),
    Bug("variable that is not set", "float acc = 0.0f;", "float acc;", _COMPILE),
    Bug("double", "float acc = 0.0f", "double acc = 0.0", _LINT),
    Bug("float from 0.0 (harmless)", "float acc = 0.0f", "float acc = 0.0", ()),
    Bug("comment outside of ASCII", "// (m, i) <-", "// (m, i) \u2190", _LINT),
    Bug(
        "variable with an attribute's name",
        "const int H =",
        "uint threads_per_grid = 3; const int H =",
        _LINT,
    ),
    Bug("reference without address space", "thread float& m", "float& m", _LINT),
    Bug(
        "pointer without address space",
        "const uint tid",
        "threadgroup float sm0[4]; float first = load(sm0); const uint tid",
        _LINT,
        more=(
            (
                "METAL_FUNC void take_min",
                "METAL_FUNC float load(const float* p) { return p[0]; }\n"
                "METAL_FUNC void take_min",
            ),
        ),
    ),
    Bug(
        "threadgroup memory as device memory",
        _MERGE,
        f"{_MERGE} float first = load(sm);",
        _COMPILE,
        more=(
            (
                "METAL_FUNC void take_min",
                "METAL_FUNC float load(const device float* p) { return p[0]; }\n"
                "METAL_FUNC void take_min",
            ),
        ),
    ),
    Bug(
        "threadgroup memory as a thread's",
        _MERGE,
        f"take_min(sm[0], si[0], m, idx); {_MERGE}",
        _COMPILE,
    ),
    Bug(
        "threadgroup array in a branch",
        _MERGE,
        f"{_MERGE} threadgroup float z[4]; z[lane & 3] = 1;",
        _COMPILE,
    ),
    Bug(
        "simdgroup operation on 64 bits",
        _START,
        f"ulong lowest = simd_min(ulong(slot)); {_START}",
        _COMPILE,
    ),
    Bug(
        "attribute that does not exist",
        "thread_index_in_simdgroup",
        "thread_index_in_simd_group",
        _COMPILE,
    ),
    Bug(
        "40 KB of threadgroup memory",
        _ARRAY,
        f"threadgroup float big[10240]; big[tid] = m; {_ARRAY}",
        (Kind.THREADGROUP_MEMORY,),
    ),
    Bug("std::min", _START, "float m = std::min(INFINITY, INFINITY);", _LINT),
    Bug("lambda", _START, f"auto f = [&](int x) {{ return x; }}; {_START}", _LINT),
    Bug(
        "table outside of constant memory",
        "METAL_FUNC void take_min",
        "static const float TABLE[2] = {1.0f, 2.0f};\nMETAL_FUNC void take_min",
        _COMPILE,
    ),
    Bug(
        "grid that ends inside of a simdgroup",
        _START,
        _START,
        (Kind.INACTIVE_LANE,),
        settings={"grid": 700},
    ),
]

_ROW_ENDS = f"{BARRIER}  // before the next row"
_SHARED_IS_FREE = f"{BARRIER}  // shared is free again"
_CLEAR = "for (int c = tid; c < end; c += TG) mean[c] = 0.0f;"

REPLAY_BUGS = [
    Bug("no barrier before memory is used again", _SHARED_IS_FREE, "", _RACE),
    Bug("no barrier at the end of the loop", _ROW_ENDS, "", _RACE),
    Bug("adds to what was never set", _CLEAR, "", (Kind.UNINITIALISED,)),
    Bug("one column too many", "held + r + 1", "held + r + 2", _BOUNDS),
    Bug("the victim stays", "alive[first] = false;", "", (Kind.WRONG,)),
    Bug("a thread per simdgroup kills", "if (tid == 0)", "if (lane == 0)", _RACE),
    Bug(
        "barrier in a loop of unequal length",
        _CLEAR,
        _CLEAR.replace("mean[c] = 0.0f;", f"{{ mean[c] = 0.0f; {BARRIER} }}"),
        (Kind.BARRIER, Kind.SIMDGROUP),
    ),
    Bug(
        "not all threads reach simd_max",
        "top = simd_max(top);",
        "if (tid < 40) top = simd_max(top);",
        (Kind.SIMDGROUP,),
    ),
    Bug(
        "the sum before it is complete",
        "sum = simd_sum(lane < TG / 32 ? shared[lane] : 0.0f);",
        "sum = simd_sum(lane < TG / 32 ? shared[lane] : 0.0f) + shared[TG / 32];",
        _BOUNDS,
    ),
]
