"""Speed and memory of the core, as ratios inside one interleaved run.

    python scripts/bench_core.py [--text FILE] [--decode-tokens 16384] [--out FILE]

Demo model, float32 where there is no Metal. Compares stepwise prefill with token by
token and with mlx-lm's unbounded prefill; decode with mlx-lm's RotatingKVCache of the
same size; decode, cache bytes and peak memory late against early. Medians over
interleaved repeats after a warm-up. The last line is JSON.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
from common import finish, load_demo_model, provenance
from mlx_lm.models.cache import KVCache, RotatingKVCache

from tova_mlx import make_prompt_cache

SIZE, LENGTH, STEP = 512, 2048, 2048
EXCERPT = Path(__file__).parent / "moby_dick_excerpt.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=EXCERPT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=16_384)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_demo_model()
    n_layers = len(model.layers)
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8")[:40_000])
    ids = (ids * (LENGTH // len(ids) + 1))[:LENGTH]
    tokens = mx.array(ids)[None]

    def prefill(cache, step=STEP, length=LENGTH):
        start_time = time.perf_counter()
        for start in range(0, length, step):
            model(tokens[:, start : start + step], cache=cache)
            mx.eval([c.state for c in cache])
        return time.perf_counter() - start_time

    def decode(cache, n=48):
        times = []
        for i in range(n):
            start_time = time.perf_counter()
            mx.eval(model(tokens[:, i : i + 1], cache=cache))
            times.append(time.perf_counter() - start_time)
        return times

    def unbounded():
        return [KVCache() for _ in range(n_layers)]

    def rotating():
        return [RotatingKVCache(SIZE, keep=4) for _ in range(n_layers)]

    result = {
        **provenance(),
        "max_kv_size": SIZE,
        "tokens": LENGTH,
    }

    prefill(make_prompt_cache(model, SIZE), length=256)
    bounded, full = [], []
    for _ in range(args.repeats):
        bounded.append(prefill(make_prompt_cache(model, SIZE)))
        full.append(prefill(unbounded()))
    single = prefill(make_prompt_cache(model, SIZE), step=1)
    result["prefill_tps"] = LENGTH / statistics.median(bounded)
    result["prefill_vs_unbounded"] = statistics.median(bounded) / statistics.median(
        full
    )
    result["prefill_speedup_over_single_tokens"] = single / statistics.median(bounded)
    _say(result, "prefill_tps")
    _say(result, "prefill_vs_unbounded")
    _say(result, "prefill_speedup_over_single_tokens")

    ours, theirs = make_prompt_cache(model, SIZE), rotating()
    prefill(ours)
    prefill(theirs)
    mine, other = [], []
    decode(ours, 4), decode(theirs, 4)
    for _ in range(2 * args.repeats):
        mine += decode(ours, 16)
        other += decode(theirs, 16)
    result["decode_ms"] = 1e3 * statistics.median(mine)
    result["decode_vs_rotating"] = statistics.median(mine) / statistics.median(other)
    _say(result, "decode_ms")
    _say(result, "decode_vs_rotating")

    if args.decode_tokens > LENGTH:
        late = make_prompt_cache(model, SIZE)
        marks = {}
        mx.reset_peak_memory()
        for i in range(args.decode_tokens):
            mx.eval(model(tokens[:, i % LENGTH : i % LENGTH + 1], cache=late))
            if i + 1 in (LENGTH, args.decode_tokens):
                bytes_now = sum(c.nbytes for c in late)
                marks[i + 1] = (bytes_now, mx.get_peak_memory())
                mx.reset_peak_memory()
        print(f"{args.decode_tokens} tokens decoded", file=sys.stderr, flush=True)
        early_bytes, early_peak = marks[LENGTH]
        late_bytes, late_peak = marks[args.decode_tokens]
        result["decoded_tokens"] = args.decode_tokens
        result["cache_bytes"] = late_bytes
        result["cache_bytes_late_vs_early"] = late_bytes / early_bytes
        result["peak_memory_bytes"] = late_peak
        result["peak_late_vs_early"] = late_peak / early_peak
        early, times_early, times_late = ours, [], []
        for _ in range(2 * args.repeats):
            times_early += decode(early, 16)
            times_late += decode(late, 16)
        result["decode_late_vs_early"] = statistics.median(
            times_late
        ) / statistics.median(times_early)
        _say(result, "peak_late_vs_early")
        _say(result, "decode_late_vs_early")
    finish(result, args.out)


def _say(result: dict, name: str) -> None:
    print(f"{name}: {result[name]:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
