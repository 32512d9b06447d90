"""Small kernels, one rule each, and what the checker must say of them.

They have an input `a` and an output `out`, float32 [64], one thread per element: `i`,
`lane` in simdgroups of 32.
"""

from .findings import Kind

COMMON = """
  const uint i = thread_position_in_grid.x;
  const uint lane = thread_index_in_simdgroup;
"""
DEVICE = "threadgroup_barrier(mem_flags::mem_device);"
SHARED = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD = "simdgroup_barrier(mem_flags::mem_threadgroup);"
RELAXED = "memory_order_relaxed"
HELPER = "METAL_FUNC float at(threadgroup float* p, int k) { return p[k]; }"

# Name: source, then the kinds of finding that it may lead to; without, to none.
RULES: dict[str, tuple[str | Kind, ...]] = {
    # Device memory.
    "a barrier for device memory": (
        f"out[i] = a[i]; {DEVICE} float x = out[63 - i]; {DEVICE} out[i] = x;",
    ),
    "a barrier for threadgroup memory does not do for device memory": (
        f"out[i] = a[i]; {SHARED} float x = out[63 - i]; {DEVICE} out[i] = x;",
        Kind.RACE,
    ),
    # Threadgroup memory.
    "a simdgroup barrier in a simdgroup": (
        f"threadgroup float s[64]; s[i] = a[i]; {SIMD} out[i] = s[i ^ 1];",
    ),
    "a simdgroup barrier between simdgroups": (
        f"threadgroup float s[64]; s[i] = a[i]; {SIMD} out[i] = s[i ^ 32];",
        Kind.RACE,
        Kind.UNINITIALISED,
    ),
    "a shuffle orders nothing": (
        "threadgroup float s[64]; s[i] = a[i];"
        "out[i] = simd_shuffle_xor(a[i], 1); out[i] += s[i ^ 1];",
        Kind.RACE,
    ),
    "several read, one of the same simdgroup writes": (
        f"threadgroup float s[2]; if (lane == 0) s[i / 32] = 1; {SIMD}"
        f"out[i] = s[i / 32]; {SIMD} if (lane == 5) s[i / 32] = 2;",
    ),
    "bytes beside each other": (
        f"threadgroup uchar s[64]; s[i] = i; {SHARED} out[i] = s[63 - i];",
    ),
    "one byte of a word": (
        "threadgroup uint s[64]; s[i] = 0; ((threadgroup uchar*)s)[4 * (i ^ 1)] = 1;"
        f"{SHARED} out[i] = s[i];",
        Kind.RACE,
    ),
    # Atomics.
    "atomics on atomics": (
        "threadgroup atomic_int n;"
        f"if (i == 0) atomic_store_explicit(&n, 0, {RELAXED}); {SHARED}"
        f"atomic_fetch_add_explicit(&n, 1, {RELAXED}); {SHARED}"
        f"out[i] = atomic_load_explicit(&n, {RELAXED});",
    ),
    "a plain read beside an atomic addition": (
        "threadgroup atomic_int n;"
        f"if (i == 0) atomic_store_explicit(&n, 0, {RELAXED}); {SHARED}"
        f"atomic_fetch_add_explicit(&n, 1, {RELAXED});"
        "out[i] = *(threadgroup int*)&n;",
        Kind.RACE,
    ),
    "a plain write beside an atomic load": (
        f"threadgroup atomic_int n; atomic_store_explicit(&n, 0, {RELAXED}); {SHARED}"
        f"out[i] = atomic_load_explicit(&n, {RELAXED});"
        "if (i == 63) *(threadgroup int*)&n = 1;",
        Kind.RACE,
    ),
    "an atomic addition to what was never set": (
        "threadgroup atomic_int n;"
        f"out[i] = 0; atomic_fetch_add_explicit(&n, 1, {RELAXED});",
        Kind.UNINITIALISED,
    ),
    # Order.
    "the last to write wins": (
        "threadgroup atomic_uint n;"
        f"atomic_store_explicit(&n, i, {RELAXED}); {SHARED}"
        f"out[i] = atomic_load_explicit(&n, {RELAXED});",
        Kind.ORDER,
    ),
    "the least of what has NaN in it": (
        "out[i] = simd_min(lane == 3 ? NAN : a[i]);",
        Kind.ORDER,
    ),
    # Bounds.
    "an index below": ("out[i] = a[int(i) - 1];", Kind.OUT_OF_BOUNDS),
    "an index far beyond": ("out[i] = a[i + (1 << 30)];", Kind.OUT_OF_BOUNDS),
    "a private array": (
        "float p[4]; for (uint k = 0; k <= 4; ++k) p[k] = a[i]; out[i] = p[0];",
        Kind.OUT_OF_BOUNDS,
    ),
    "from one threadgroup array into the next": (
        "threadgroup float s[64]; threadgroup float t[64]; s[i] = t[i] = 0;"
        f"{SHARED} out[i] = at(s, 64) + at(t, 64);",
        Kind.OUT_OF_BOUNDS,
    ),
    "a shape that the array does not have": (
        "out[i] = a_shape[1];",
        Kind.OUT_OF_BOUNDS,
    ),
    # Values.
    "adds to threadgroup memory that was never set": (
        "threadgroup float s[64]; s[i] += a[i]; out[i] = s[i];",
        Kind.UNINITIALISED,
    ),
    "adds to an output that was never set": ("out[i] += a[i];", Kind.UNINITIALISED),
    "writes half of the output": ("if (i < 32) out[i] = 0;", Kind.NOT_WRITTEN),
    # Control flow.
    "barriers in two branches on one line": (
        f"if (i < 32) {{ {SHARED} }} else {{ {SHARED} }} out[i] = 0;",
        Kind.BARRIER,
    ),
    "simdgroup operations in two branches on one line": (
        "out[i] = i % 2 ? simd_sum(a[i]) : simd_max(a[i]);",
        Kind.SIMDGROUP,
    ),
    "one simdgroup alone": ("out[i] = a[i]; if (i < 32) simd_sum(a[i]);",),
    "a simdgroup that returns before no barrier": (
        "out[i] = a[i]; if (i < 32) return; out[i] = simd_sum(a[i]);",
    ),
    "a shuffle from beyond the simdgroup": (
        "out[i] = simd_shuffle(a[i], 40);",
        Kind.INACTIVE_LANE,
    ),
}

# Found in whatever order the threads run.
RACES = {
    "the last reader writes": f"""
      threadgroup float s[2];
      if (lane == 0) s[i / 32] = 1;
      {SHARED}
      out[i] = s[i / 32];
      if (lane == 31) s[i / 32] = 2;
    """,
    "both simdgroups read, one writes": f"""
      threadgroup float s[1];
      if (i == 0) s[0] = 1;
      {SHARED}
      out[i] = s[0];
      {SIMD}
      if (i == 33) s[0] = 2;
    """,
    "a simdgroup barrier on either side": f"""
      threadgroup float s[64];
      s[i] = 0;
      {SHARED}
      if (i < 32) s[i] = 1;
      {SIMD}
      out[i] = i < 32 ? 0 : s[i - 32];
      {SIMD}
    """,
    "threadgroups that read, and one writes": """
      if (lane == 31) {
        float x = out[0];
        if (i == 63) out[0] = x + 1;
      }
    """,
}
