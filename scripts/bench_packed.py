"""Memory and speed of quantised slots against unquantised ones.

    python scripts/bench_packed.py [--limit 512] [--policy tova] [--out FILE]

Demo model, float32 where there is no Metal. Per storage: cache bytes, MLX's peak memory
above the weights while a text is read and while tokens are decoded, medians of a decode
step (interleaved, after a warm-up). The last line is JSON.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import finish, load_demo_model, provenance

from tova_mlx import PolicyKVCache, make_prompt_cache

STORAGE = {
    "as they come": {},
    "8 (8h,8)": {"kv_bits": 8},
    "4 (6h,4)": {"kv_bits": 4},
    "6h,4 turned only": {"kv_bits": ("6h", 4)},
    "6,4": {"kv_bits": (6, 4)},
    "8,8": {"kv_bits": (8, 8)},
    "4,4": {"kv_bits": (4, 4)},
}


def caches_of(model: Any, name: str, limit: int, policy: str) -> list[Any]:
    """Caches with one of these storages; without a model nothing is centred."""
    options = {"policy": policy, "journal": 0, **STORAGE[name]}
    if name.endswith("only"):
        return [PolicyKVCache(limit, **options) for _ in model.layers]
    return make_prompt_cache(model, limit, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--policy", default="tova")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, _ = load_demo_model()
    mx.eval(model.parameters())
    tokens = mx.random.randint(0, 1000, (1, args.limit + 256))
    mx.eval(tokens)
    weights = mx.get_active_memory()

    def peak(caches, tokens, chunk):
        mx.clear_cache()
        mx.reset_peak_memory()
        for start in range(0, tokens.shape[1], chunk):
            logits = model(tokens[:, start : start + chunk], cache=caches)
            mx.eval(logits[:, -1], [c.state for c in caches])
            del logits
        return mx.get_peak_memory() - weights

    rows = {}
    for name in STORAGE:
        caches = caches_of(model, name, args.limit, args.policy)
        prefill = peak(caches, tokens, 256)
        decode = peak(caches, tokens[:, :8], 1)
        rows[name] = {
            "cache_bytes": sum(c.nbytes for c in caches),
            "prefill_peak_bytes": prefill,
            "decode_peak_bytes": decode,
        }
        # All of them at once would add up in the peaks; only for the timing below.
        del caches
    times: dict[str, list[float]] = {name: [] for name in STORAGE}
    caches = {n: caches_of(model, n, args.limit, args.policy) for n in STORAGE}
    for cache in caches.values():
        peak(cache, tokens, 256)
    for i in range(args.steps + 4):
        for name, cache in caches.items():
            start = time.perf_counter()
            mx.eval(model(tokens[:, :1], cache=cache), [c.state for c in cache])
            if i >= 4:
                times[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        row["decode_ms"] = 1000 * statistics.median(times[name])
        # Step by step against that of the same moment: the machine's speed drifts.
        for other in ("as they come", "4,4"):
            pairs = zip(times[name], times[other], strict=True)
            ratios = [mine / theirs for mine, theirs in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row[f"decode_to_{other}"] = [low, middle, high]
        print(name, row, flush=True)
    report = {
        **provenance(),
        "policy": args.policy,
        "max_kv_size": args.limit,
        "storage": rows,
    }
    finish(report, args.out)


if __name__ == "__main__":
    main()
