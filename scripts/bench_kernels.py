"""Time of an eviction, as a Metal kernel and in its portable form.

    python scripts/bench_kernels.py [--repeats 20] [--out FILE]

A decode step and the scan of a block of 256 rows, on random logits of a model with 32
heads and 8 KV heads; medians of interleaved repeats after a warm-up, in ms. Where there
is no Metal only the portable form is timed, and `metal` is null. The last line is JSON.
"""

import argparse
import statistics
import time
from pathlib import Path

import mlx.core as mx
from common import finish, provenance

from tova_mlx.eviction import step_on_gpu
from tova_mlx.eviction.scan import Columns, scan_on_cpu
from tova_mlx.eviction.scan_kernels import scan_on_gpu
from tova_mlx.eviction.step import step_on_cpu
from tova_mlx.policies import resolve_options
from tova_mlx.storage.fields import Fresh

N_HEADS, N_KV_HEADS, ROWS = 32, 8, 256
LIMITS = (512, 1024, 4096)
DTYPE = mx.float16


def inputs(policy, limit, n_rows):
    """Rule, logits, positions, scores and norms, as a full cache has them."""
    rule, n = resolve_options(policy, limit, {}), limit + n_rows
    choosers = N_KV_HEADS if rule.per_head else 1
    logits = (3 * mx.random.normal((1, N_HEADS, n_rows, n))).astype(DTYPE)
    positions = mx.broadcast_to(mx.arange(n, dtype=mx.int32), (1, choosers, n))
    scores = mx.random.uniform(shape=positions.shape)
    norms = mx.random.uniform(shape=(1, N_KV_HEADS, n)) if rule.value_weighted else None
    mx.eval(logits, scores, norms)
    return rule, logits, positions, scores, norms


def step(policy, limit):
    """Both forms of a decode step, as functions."""
    rule, logits, positions, scores, norms = inputs(policy, limit, 1)
    scores = scores if rule.memory else None
    known = (positions, scores, norms)
    values = mx.random.normal((1, N_KV_HEADS, 1, 64)).astype(DTYPE)
    fresh = Fresh(limit, positions[..., -1:], values)

    def portable():
        weights = mx.softmax(logits.astype(mx.float32), axis=-1)
        shape = (1, N_KV_HEADS, N_HEADS // N_KV_HEADS, limit + 1)
        return step_on_cpu(weights.reshape(shape), *known, limit, rule)

    return portable, lambda: step_on_gpu(
        logits, *known, fresh, [limit], rule, evicts=True
    )


def scan(policy, limit):
    """Both forms of the scan of a block, as functions."""
    rule, logits, positions, scores, norms = inputs(policy, limit, ROWS)
    flat = (-1, limit + ROWS)
    own = mx.arange(flat[1]) >= limit
    scores = mx.where(own, 0.0, scores).reshape(flat)
    given = (logits, Columns(positions.reshape(flat), scores, norms), rule)

    def portable():
        return scan_on_cpu(*given, limit=limit)[:2]

    return portable, lambda: scan_on_gpu(*given, limit=limit)[:2]


def medians(forms, repeats):
    """Milliseconds of each form."""
    times = [[] for _ in forms]
    for repeat in range(repeats + 2):
        for form, measured in zip(forms, times, strict=True):
            start = time.perf_counter()
            mx.eval([a for a in form() if a is not None])
            if repeat >= 2:
                measured.append(1000 * (time.perf_counter() - start))
    return [statistics.median(m) for m in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    on_metal = mx.metal.is_available()
    if not on_metal:
        print("No Metal here: the kernels were not measured.")
    rows = []
    for name, make in (("step", step), ("scan", scan)):
        for policy in ("tova", "fade"):
            for limit in LIMITS:
                portable, kernel = make(policy, limit)
                forms = [portable, kernel] if on_metal else [portable]
                repeats = args.repeats if name == "step" else max(3, args.repeats // 4)
                times = medians(forms, repeats)
                metal = times[1] if on_metal else None
                row = {"what": name, "policy": policy, "max_kv_size": limit}
                rows.append({**row, "portable_ms": times[0], "metal_ms": metal})
                said = "not measured" if metal is None else f"{metal:9.3f} ms"
                print(
                    f"{name:5} {policy:5} {limit:5}  portable {times[0]:9.3f} ms  "
                    f"kernel {said}",
                    flush=True,
                )
    result = {
        **provenance(),
        "metal": mx.device_info() if on_metal else None,
        "heads": [N_HEADS, N_KV_HEADS],
        "rows": ROWS,
        "times": rows,
    }
    finish(result, args.out)


if __name__ == "__main__":
    main()
