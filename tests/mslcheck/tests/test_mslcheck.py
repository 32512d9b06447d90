"""The checker of Metal kernels checked: what it must find and what it must not."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mslcheck
import numpy as np
import pytest
from mslcheck import Kind, MSLError, checked_kernels, example_bugs, examples, lint
from mslcheck.rules import COMMON, HELPER, RACES, RULES, SHARED
from mslcheck.seeded import Bug, Case, outcomes, table

pytestmark = pytest.mark.skipif(
    mslcheck.skip_reason() is not None, reason=mslcheck.skip_reason() or ""
)

N = 64


def run(source, *, a=None, threads=N, group=N, dtype=mx.float32, init=None, **kernel):
    """A kernel with an input `a` and an output `out` of 64 elements each."""
    options = kernel.pop("options", {})
    a = mx.arange(N).astype(mx.float32) if a is None else a
    with checked_kernels(**options):
        made = mx.fast.metal_kernel(
            name="small",
            input_names=["a"],
            output_names=["out"],
            source=COMMON + source,
            **kernel,
        )
        (out,) = made(
            inputs=[a],
            output_shapes=[(N,)],
            output_dtypes=[dtype],
            grid=(threads, 1, 1),
            threadgroup=(group, 1, 1),
            init_value=init,
        )
    return np.array(out.astype(mx.float32))


def kinds(source, **keywords):
    """The kinds of finding."""
    try:
        run(source, **keywords)
    except MSLError as error:
        return {finding.kind for finding in error.findings}
    return set()


def test_the_tools_are_here():
    assert mslcheck.missing() is None


# The examples against NumPy.


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_victims_are_numpys_and_nothing_is_found(dtype):
    rng = np.random.default_rng(0)
    sizes = [1, 31, 32, 33, 255, 256, 257, 1000, *rng.integers(1, 1500, 8).tolist()]
    with checked_kernels() as launched:
        kernels = [examples.make_victim(threads=t) for t in (32, 64, 256, 1024)]
        for i, slots in enumerate(sizes):
            n = int(rng.integers(1, slots + 1))
            weights = rng.random((int(rng.integers(1, 65)), slots)).astype(np.float32)
            if i % 3 == 0:
                weights = np.round(weights * 3) / 3
            given = mx.array(weights).astype(dtype)
            expected = examples.victim_reference(np.array(given.astype(mx.float32)), n)
            assert np.array_equal(kernels[i % 4](given, n), expected), (slots, n)
    assert launched == ["partial", "final"] * len(sizes)


def test_reads_and_exponentials_are_counted():
    counts = []
    source = "out[i] = a[i]; if (i < 9) out[i] += metal::exp(a[0]) + a[i + 1];"
    run(source, options={"orders": 1, "counts": counts})
    ((name, counted),) = counts
    assert (name, counted.exponentials) == ("small", 9)
    assert counted.reads == {"a": 64 + 9 + 9, "out": 9}


def test_the_fast_build_gives_the_same_at_full_size():
    weights = np.random.default_rng(0).random((32, 65536)).astype(np.float32)
    expected = examples.victim_reference(weights, 65535)
    for checked in (True, False):
        with checked_kernels(checked=checked, orders=1):
            got = examples.make_victim(threads=1024)(mx.array(weights), 65535)
        assert np.array_equal(got, expected)


def test_a_victim_is_a_slot_whatever_the_weights_are():
    weights = mx.full((3, 500), float("nan"))
    with checked_kernels():
        assert examples.make_victim()(weights, 400).item() < 400


@pytest.mark.parametrize(
    ("threads", "heads", "rows", "held"),
    [(32, 1, 1, 8), (64, 3, 7, 60), (256, 4, 32, 128), (1024, 2, 5, 33)],
)
def test_replayed_victims_are_numpys_and_nothing_is_found(threads, heads, rows, held):
    rng = np.random.default_rng(rows)
    logits = (3 * rng.standard_normal((heads, rows, held + rows))).astype(np.float32)
    expected = examples.replay_reference(logits, held)
    with checked_kernels(seed=2):
        replay = examples.make_replay(threads=threads)
        assert np.array_equal(replay(mx.array(logits), held), expected)


# Seeded bugs.


def victim_cases():
    """Planted minima; in every other case the same minimum at a later slot."""
    rng = np.random.default_rng(1)
    for i in range(30):
        weights = rng.integers(4, 9, (7, 700)).astype(np.float32)
        weights[:, 650:] = -1
        slot = int(rng.integers(0, 650))
        weights[:, slot] = 1
        if i % 2:
            weights[:, min(649, slot + int(rng.integers(1, 40)))] = 1
        expected = examples.victim_reference(weights, 650)
        yield Case((mx.array(weights), 650), expected)


def replay_cases():
    rng = np.random.default_rng(2)
    for _ in range(4):
        logits = (3 * rng.standard_normal((3, 6, 100))).astype(np.float32)
        expected = examples.replay_reference(logits, 94)
        yield Case((mx.array(logits), 94), expected)


def test_every_seeded_bug_is_found_for_what_it_is(capsys):
    unchanged = Bug("unchanged (harmless)", "float", "float", ())
    results = [
        *outcomes(
            examples.make_victim,
            examples.VICTIM,
            [unchanged, *example_bugs.VICTIM_BUGS],
            [*victim_cases()],
        ),
        *outcomes(
            examples.make_replay,
            examples.REPLAY,
            [unchanged, *example_bugs.REPLAY_BUGS],
            [*replay_cases()],
        ),
    ]
    caught = [result for result in results if result.found]
    unseen = [result for result in caught if not result.fast]
    with capsys.disabled():
        print(f"\n\n{table(results)}")
        print(f"{len(caught)} bugs caught, {len(unseen)} of them only when checked")
    assert [result.bug.name for result in results if not result.as_expected] == []
    assert len(caught) >= 30
    assert len({result.found[0].kind for result in caught}) >= 10


# Every rule by itself.


@pytest.mark.parametrize("name", RULES)
def test_a_rule(name):
    source, *expected = RULES[name]
    found = kinds(source, header=HELPER)
    assert bool(found) == bool(expected)
    assert found <= {*expected}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", RACES)
def test_a_race_is_found_in_whatever_order_threads_run(name, seed):
    options = {"orders": 1, "seed": seed}
    group = 32 if name.startswith("threadgroups") else N
    found = kinds(RACES[name], group=group, init=0, options=options)
    assert found == {Kind.RACE}


def test_threadgroup_memory_does_not_outlast_a_threadgroup():
    source = f"""
      threadgroup float s[32];
      if (i < 32) s[lane] = a[i];
      {SHARED}
      out[i] = s[lane];
    """
    assert kinds(source, group=32, options={"orders": 1}) == {Kind.UNINITIALISED}


def test_an_output_with_an_init_value_is_set():
    assert np.array_equal(run("out[i] += a[i];", init=2), np.arange(N) + 2)
    assert np.array_equal(run("if (i < 32) out[i] = 0;", init=2)[32:], [2] * 32)


def test_a_finding_names_the_line_and_its_caller():
    header = "\nMETAL_FUNC float at(const device float* p, int k) {\n  return p[k];\n}"
    with pytest.raises(MSLError) as error:
        run("\n  out[i] = at(a, 64);", header=header)
    (finding,) = error.value.findings
    assert finding.where == "header:3 from source:5"
    assert "a[64], which has 64 elements" in finding.message
    assert "small" in str(error.value)


def test_what_the_fast_build_still_sees():
    fast = {"checked": False}
    assert kinds("out[i + (1u << 31)] = 0;", options=fast) == {Kind.CRASH}
    assert kinds("((device float*)a)[i] = 0;", options=fast) == {Kind.CRASH}
    assert np.array_equal(run("out[i] = a[i];", options=fast), np.arange(N))


def test_a_crash_has_a_line():
    with pytest.raises(MSLError, match="crash at source:5: an integer division"):
        run("\n  out[i] = 7 / (int(i) - 3);")


def test_a_kernel_that_does_not_end_is_ended():
    short = {"seconds": 1, "orders": 1}
    assert kinds("while (true) {}", options=short) == {Kind.TIMEOUT}
    assert kinds(f"while (true) {{ {SHARED} }}", options=short) == {Kind.TIMEOUT}


def test_launches_that_metal_refuses():
    assert kinds("out[i] = 0;", threads=2048, group=2048) == {Kind.LAUNCH}
    assert kinds("out[i] = 0;", threads=0) == {Kind.LAUNCH}


# Metal's language and library.


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("double x = 0;", "no double"),
        ("float x = std::exp(1.0f);", "no std::"),
        ('printf("x");', "printf"),
        ("goto end; end:", "not in Metal"),
        ("auto f = [=](int x) { return x; };", "lambda"),
        ("atomic_load_explicit(p, memory_order_seq_cst);", "memory_order_relaxed"),
        ("void f(float& x);", "without address space: 'float& x'"),
        ("const int* p = &x;", "without address space"),
        ("template <typename V> void f(const V* p);", "without address space"),
        (
            "void f(const device float* p, thread int& i, volatile threadgroup T* t);",
            None,
        ),
        ("size_t x = sizeof(float) * N + int(a) * b & uint(c);", None),
        ("// caf\u00e9", "ASCII"),
        ('// double and std:: in a comment, "printf("', None),
        ("float x = w[i](0);", None),
    ],
)
def test_lint(source, says):
    found = [finding.message for finding in lint.lint(source)]
    assert (found == []) if says is None else (says in found[0])


def test_a_variable_with_the_name_of_a_parameter_is_found():
    assert kinds("uint grid_size = 3; out[i] = grid_size;") == {Kind.LINT}
    assert kinds("uint size = grid_size.x; out[i] = size;") == set()


def test_small_inputs_are_in_constant_memory():
    header = "METAL_FUNC float at(const device float* p, uint i) { return p[i]; }"
    source = "out[i] = at(a, i % a_shape[0]);"
    assert kinds(source, header=header, a=mx.ones(8)) == set()
    assert kinds(source, header=header, a=mx.ones(7)) == {Kind.COMPILE}


def test_scalars_templates_and_strides_arrive_as_mlx_passes_them():
    with checked_kernels():
        kernel = mx.fast.metal_kernel(
            name="all",
            input_names=["a", "scalar"],
            output_names=["out"],
            source="""
              uint i = thread_position_in_grid.x;
              uint row = i % a_shape[0], column = i / a_shape[0];
              T x = a[row * a_strides[0] + column * a_strides[1]];
              out[i] = MORE ? x * N + scalar + a_ndim : 0;
            """,
            ensure_row_contiguous=False,
        )
        a = mx.arange(60).astype(mx.bfloat16).reshape(10, 6)
        (out,) = kernel(
            inputs=[a[2:, 1:4].T, 7],
            output_shapes=[(8, 3)],
            output_dtypes=[mx.int32],
            grid=(24, 1, 1),
            threadgroup=(8, 1, 1),
            template=[("T", mx.bfloat16), ("N", 3), ("MORE", True)],
        )
    assert np.array_equal(out, np.arange(60).reshape(10, 6)[2:, 1:4] * 3 + 9)


def test_where_a_thread_stands():
    # A grid of 5 x 3 x 2 in threadgroups of 2 x 2 x 2, the last of each row smaller.
    source = """
      uint3 p = thread_position_in_grid;
      uint at = (p.z * 3 + p.y) * 5 + p.x;
      out[4 * at] = threadgroup_position_in_grid.x;
      out[4 * at + 1] = thread_position_in_threadgroup.y;
      out[4 * at + 2] = threads_per_threadgroup.x;
      out[4 * at + 3] = thread_index_in_threadgroup;
    """
    with checked_kernels():
        kernel = mx.fast.metal_kernel(
            name="where", input_names=[], output_names=["out"], source=source
        )
        (out,) = kernel(
            inputs=[],
            output_shapes=[(2, 3, 5, 4)],
            output_dtypes=[mx.int32],
            grid=(5, 3, 2),
            threadgroup=(2, 2, 2),
        )
    out = np.array(out)
    z, y, x = np.indices((2, 3, 5))
    width = np.where(x == 4, 1, 2)
    assert np.array_equal(out[..., 0], x // 2)
    assert np.array_equal(out[..., 1], y % 2)
    assert np.array_equal(out[..., 2], width)
    height = np.where(y == 2, 1, 2)
    index = (z % 2 * height + y % 2) * width + x % 2
    assert np.array_equal(out[..., 3], index)


def simd_reference(name):
    lanes = np.arange(32)
    rows = np.cos(np.arange(N)).astype(np.float32).reshape(2, 32)
    whole = {"simd_sum": "sum", "simd_max": "max", "simd_min": "min"}
    if name in whole:
        return np.repeat(getattr(rows, whole[name])(axis=1), 32)
    if name == "simd_prefix_inclusive_sum":
        return rows.cumsum(axis=1).reshape(-1)
    source = {
        "simd_shuffle_down": np.minimum(lanes + 5, 31 * (lanes < 27) + lanes),
        "simd_shuffle_up": np.where(lanes < 5, lanes, lanes - 5),
        "simd_shuffle_xor": lanes ^ 5,
        "simd_broadcast": 0 * lanes + 5,
    }[name]
    return rows[:, np.where(source < 32, source, lanes)].reshape(-1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("simd_sum", ""),
        ("simd_max", ""),
        ("simd_min", ""),
        ("simd_prefix_inclusive_sum", ""),
        ("simd_shuffle_down", ", 5"),
        ("simd_shuffle_up", ", 5"),
        ("simd_shuffle_xor", ", 5"),
        ("simd_broadcast", ", 5"),
    ],
)
def test_simdgroup_functions(name, argument, dtype):
    a = mx.cos(mx.arange(N)).astype(dtype)
    got = run(f"out[i] = {name}(a[i]{argument});", a=a, dtype=dtype)
    tolerance = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    expected = simd_reference(name)
    assert np.allclose(got, expected, rtol=4 * tolerance, atol=4 * tolerance)


def test_simdgroup_votes_and_integers():
    source = """
      bool some = simd_any(i == 40);
      bool all = simd_all(i < 40);
      uint most = simd_max(i % 32 == 7 ? 4000000000u : i);
      short sum = simd_sum(short(i));
      out[i] = some + 2 * all + 4 * (most == 4000000000u) + 8 * (sum == 496)
          + 16 * simd_is_first() + 32 * (simd_broadcast_first(i) % 32 == 0);
    """
    first = 16 * (np.arange(N) % 32 == 0)
    expected = np.where(np.arange(N) < 32, 2 + 4 + 8 + 32, 1 + 4 + 32) + first
    assert np.array_equal(run(source), expected)


def test_mathematics():
    source = """
      float x = a[i] / 8 - 3;
      float y = metal::exp(x) - fast::exp(x) + metal::precise::exp(x);
      y += min(x, 1.0f) * max(x, -1.0f) + clamp(x, -0.5f, 0.5f) + fma(x, x, x);
      y += isnan(x / 0.0f - x / 0.0f) + isinf(x / 0.0f) + abs(min(int(i), 3) - 2);
      uint bits = as_type<uint>(x);
      out[i] = as_type<float>(bits) == x ? y : NAN;
    """
    x = np.arange(N) / 8 - 3
    expected = np.exp(x) + np.minimum(x, 1) * np.maximum(x, -1) + np.clip(x, -0.5, 0.5)
    expected += x * x + x + 1 + (x != 0) + abs(np.minimum(np.arange(N), 3) - 2)
    assert np.allclose(run(source), expected, rtol=1e-6, atol=1e-6)
    # Of a number and NaN, the number.
    numbers = run("out[i] = min(NAN, a[i]) + max(a[i], NAN);")
    assert np.array_equal(numbers, 2 * np.arange(N))


def test_vectors():
    source = """
      float4 v = float4(a[i], 1, 2, 3) * 2;
      uint2 u = uint2(float2(v.x, v.y));
      out[i] = dot(v, float4(1)) + u.y + float3(v.xy, 1).z;
    """
    assert np.array_equal(run(source), 2 * np.arange(N) + 15)


def test_a_float_does_not_become_a_bfloat_by_itself():
    ones = mx.ones(N)
    implicit = "out[i] = float(a[i]) * 2.0f;"
    assert kinds(implicit, a=ones, dtype=mx.bfloat16) == {Kind.COMPILE}
    assert kinds(implicit, a=ones, dtype=mx.float16) == set()
    # To the nearest even, as NumPy's float16 and MLX's bfloat16.
    a = mx.sin(mx.arange(N))
    for dtype, name in [(mx.bfloat16, "bfloat16_t"), (mx.float16, "half")]:
        got = run(f"out[i] = {name}(a[i]);", a=a, dtype=dtype)
        assert np.array_equal(got, np.array(a.astype(dtype).astype(mx.float32)))


@pytest.mark.parametrize(
    "dtype", [mx.bool_, mx.int8, mx.uint16, mx.int32, mx.uint32, mx.int64, mx.float16]
)
def test_dtypes_of_inputs_and_outputs(dtype):
    a = (mx.arange(N) % 3).astype(dtype)
    got = run("out[i] = a[63 - i];", a=a, dtype=dtype)
    assert np.array_equal(got, np.array(a.astype(mx.float32))[::-1])


def test_products_and_sums_may_be_fused():
    # 1 + e + e / 4 + ... in float32: the square alone loses its last term.
    a = mx.full(N, 1 + 2**-12)
    source = "float x = a[i]; out[i] = x * x - 1.0f;"
    separate = run(source, a=a)[0]
    fused = run(source, a=a, options={"fused": True})[0]
    assert separate == 2**-11
    assert fused == 2**-11 + 2**-24


def test_denormals_may_be_flushed():
    tiny, least = np.float32(1e-40), np.finfo(np.float32).tiny
    a = mx.array(np.where(np.arange(N) % 2, tiny, least).astype(np.float32))
    flushed = {"flush": True}
    # As an argument, as a result, in a comparison and in a sum over the simdgroup.
    for source, kept, gone in [
        ("out[i] = a[i] * 1024;", [1024 * least, 1024 * tiny], [1024 * least, 0]),
        ("out[i] = a[i] / 1024;", [least / 1024, tiny / 1024], [0, 0]),
        ("out[i] = a[i] > 0;", [1, 1], [1, 0]),
        ("out[i] = simd_sum(lane % 2 ? a[i] : 0) * 1e30f;", [1.6e-9] * 2, [0, 0]),
    ]:
        for options, want in (({}, kept), (flushed, gone)):
            got = run(source, a=a, options=options)
            np.testing.assert_allclose(got[:2], np.float32(want), rtol=1e-4)
    # What is only moved stays, and so does float16.
    assert np.array_equal(run("out[i] = a[i];", a=a, options=flushed), np.array(a))
    half = mx.full(N, 1e-7, mx.float16)
    got = run("out[i] = float(a[i] + a[i]);", a=half, options=flushed)
    assert np.array_equal(got, 2 * np.array(half).astype(np.float32))


def test_the_environment_asks_for_what_apples_compiler_is_told(monkeypatch):
    a = mx.full(N, 1 + 2**-12)
    source = "out[i] = a[i] * a[i] - 1.0f + (a[i] * 1e-38f) * (1 / 64.0f) * 1e30f;"
    assert run(source, a=a)[0] != (want := np.float32(2**-11 + 2**-24))
    monkeypatch.setenv("MSLCHECK_FLUSH", "1")
    monkeypatch.setenv("MSLCHECK_FUSED", "1")
    assert run(source, a=a)[0] == want
    assert not mslcheck.Options(flush=False, fused=False).flush
    monkeypatch.setenv("MSLCHECK_FLUSH", "0")
    assert not mslcheck.Options().flush


def test_flushing_ends_with_the_kernel():
    # With what it ends with, too: a fault leaves the kernel where it stands.
    for source in ("out[i] = a[i];", "out[i] = 1 / (int(a[i]) & 0);"):
        kinds(source, options={"flush": True})
        assert np.float32(1e-38) / np.float32(4) > 0


def test_atomic_outputs():
    with checked_kernels():
        kernel = mx.fast.metal_kernel(
            name="histogram",
            input_names=["a"],
            output_names=["out"],
            source="""
              uint i = thread_position_in_grid.x;
              atomic_fetch_add_explicit(&out[a[i]], 1, memory_order_relaxed);
            """,
            atomic_outputs=True,
        )
        values = np.random.default_rng(0).integers(0, 10, 1000)
        (out,) = kernel(
            inputs=[mx.array(values.astype(np.int32))],
            output_shapes=[(10,)],
            output_dtypes=[mx.int32],
            grid=(1000, 1, 1),
            threadgroup=(128, 1, 1),
            init_value=0,
        )
    assert np.array_equal(out, np.bincount(values))


# Around it.


def test_what_was_there_comes_back():
    real = mx.fast.metal_kernel
    with checked_kernels():
        assert mx.fast.metal_kernel is mslcheck.Kernel
    assert mx.fast.metal_kernel is real
    mslcheck.install(seed=3)
    assert mx.fast.metal_kernel is mslcheck.Kernel
    mslcheck.uninstall()
    assert mx.fast.metal_kernel is real


def test_with_metal_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    real = mx.fast.metal_kernel
    with checked_kernels():
        assert mx.fast.metal_kernel is real
    assert "Metal" in mslcheck.skip_reason()


def test_a_missing_compiler_is_named_and_fails_in_ci(monkeypatch):
    monkeypatch.setenv("MSLCHECK_CLANG", "no-such-compiler")
    monkeypatch.delenv("CI", raising=False)
    assert "no-such-compiler" in mslcheck.missing()
    assert mslcheck.skip_reason() == mslcheck.missing()
    monkeypatch.setenv("CI", "true")
    assert mslcheck.skip_reason() is None


def test_builds_side_by_side(tmp_path):
    # From an empty cache both build everything; whole files, and nothing else, remain.
    script = """
import mlx.core as mx
from mslcheck import checked_kernels, examples
with checked_kernels():
    print(examples.make_victim(threads=64)(mx.ones((2, 70)), 70).item())
"""
    place = Path(mslcheck.__file__).parents[1]
    env = {**os.environ, "MSLCHECK_CACHE": str(tmp_path), "PYTHONPATH": str(place)}
    command = [sys.executable, "-c", script]
    both = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == ["0", "0"]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"] * 3
