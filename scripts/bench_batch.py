"""Decode of a bounded batch against an unbounded one that takes the same bytes.

    python scripts/bench_batch.py [--limit 512] [--contexts 4096 8192 16384]
        [--rows 1] [--policy tova] [--out FILE]

Demo model, float32 where there is no Metal. For each context, `rows` unbounded rows of
that length against as many rows of `limit` tokens as take the same keys and values.
Caches are filled with random rows: a step's time does not depend on what they hold.
Medians over interleaved steps after a warm-up. `predicted` is the ratio if a step took
the time of the bytes it moves (weights, keys and values). The last line is JSON.
"""

import argparse
import statistics
import time
from pathlib import Path

import mlx.core as mx
from common import finish, load_demo_model, provenance
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from tova_mlx import make_prompt_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--policy", default="tova")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, _ = load_demo_model()
    weights = sum(a.nbytes for _, a in tree_flatten(model.parameters()))

    def filled(make, length, rows):
        """Batched caches of `rows` rows that have seen `length` random tokens."""
        head_dim = model.args.hidden_size // model.args.num_attention_heads
        shape = (1, model.args.num_key_value_heads, length, head_dim)
        layers = []
        for layer in range(len(model.layers)):
            singles = []
            for _ in range(rows):
                cache = make()[layer]
                keys = mx.random.normal(shape, model.model.norm.weight.dtype)
                cache.update_and_fetch(keys, keys)
                # Nothing attends to this fill.
                cache._awaits = None
                singles.append(cache)
            layers.append(singles[0].merge(singles))
            mx.eval(layers[-1].state)
        return layers

    def step(caches, rows):
        tokens = mx.random.randint(0, 1000, (rows, 1))
        mx.eval(tokens)
        start = time.perf_counter()
        mx.eval(model(tokens, cache=caches), [c.state for c in caches])
        return time.perf_counter() - start

    results = []
    for context in args.contexts:
        many = args.rows * context // args.limit
        # Journals off: mlx-lm's batch has none, and both are to take the same bytes.
        bounded = filled(
            lambda: make_prompt_cache(model, args.limit, policy=args.policy, journal=0),
            args.limit,
            many,
        )
        unbounded = filled(
            lambda: [KVCache() for _ in model.layers], context, args.rows
        )
        for _ in range(4):
            step(bounded, many), step(unbounded, args.rows)
        times = [
            (step(bounded, many), step(unbounded, args.rows)) for _ in range(args.steps)
        ]
        ours, theirs = (statistics.median(t) for t in zip(*times, strict=True))
        size, other_size = (sum(c.nbytes for c in b) for b in (bounded, unbounded))
        moved, other_moved = weights + size, weights + other_size
        results.append(
            {
                "context": context,
                "rows_bounded": many,
                "rows_unbounded": args.rows,
                "cache_bytes": size,
                "cache_bytes_unbounded": other_size,
                "decode_ms": 1000 * ours,
                "decode_ms_unbounded": 1000 * theirs,
                "tps": many / ours,
                "tps_unbounded": args.rows / theirs,
                "ratio": many / ours * theirs / args.rows,
                "predicted": many / args.rows * other_moved / moved,
            }
        )
        print(
            f"context {context}: {many} rows at {args.limit} against {args.rows}: "
            f"{results[-1]['tps']:.1f} and {results[-1]['tps_unbounded']:.1f} tokens/s"
            f", ratio {results[-1]['ratio']:.2f} (bytes moved: "
            f"{results[-1]['predicted']:.1f})",
            flush=True,
        )
    report = {
        **provenance(),
        "policy": args.policy,
        "max_kv_size": args.limit,
        "results": results,
    }
    finish(report, args.out)


if __name__ == "__main__":
    main()
