"""Speed, value and memory of the evaluations' reading, against token by token.

    python scripts/bench_evaluation.py [--text FILE] [--repeats 3] [--out FILE]

Demo model, float32 where there is no Metal. The same tokens under the same policies,
one at a time and in the evaluations' steps, in turn: the ratio of the medians, and how
far the perplexities are apart. Then the peak of memory above the weights, of a text and
of one four times as long. The last line is JSON.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
from common import EXCERPT, finish, load_demo_model, provenance, repeated_ids

from tova_mlx.evaluation.reading import token_losses
from tova_mlx.evaluation.results import Setting

POLICIES = ("tova", "fade", "keydiff")
SIZE, LENGTH, LONG, STEP = 64, 512, 8192, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=EXCERPT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_demo_model()
    ids = repeated_ids(tokenizer, args.text, LONG)

    def read(policy: str, n: int, step: int) -> tuple[float, float]:
        """Seconds and perplexity of the first n tokens."""
        begun = time.perf_counter()
        losses = token_losses(
            model, mx.array(ids[:n])[None], Setting(policy, SIZE), step
        )
        return time.perf_counter() - begun, math.exp(losses.mean())

    def peak(n: int) -> int:
        """Bytes above what is there before."""
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        read("tova", n, STEP)
        return mx.get_peak_memory() - before

    result = {**provenance(), "max_kv_size": SIZE, "tokens": LENGTH, "step": STEP}
    for policy in POLICIES:
        read(policy, STEP, STEP)
    runs = {(p, step): [] for p in POLICIES for step in (STEP, 1)}
    for _ in range(args.repeats):
        for (policy, step), done in runs.items():
            done.append(read(policy, LENGTH, step))
    for policy in POLICIES:
        fast, slow = runs[policy, STEP], runs[policy, 1]
        speedup = _seconds(slow) / _seconds(fast)
        apart = max(abs(a / b - 1) for (_, a), (_, b) in zip(fast, slow, strict=True))
        result[policy] = {
            "tokens_per_second": LENGTH / _seconds(fast),
            "speedup_over_single_tokens": speedup,
            "perplexity": fast[0][1],
            "perplexity_apart": apart,
        }
        print(f"{policy}: {speedup:.1f}x, {apart:.1e} apart", file=sys.stderr)
    short, long = peak(LONG // 4), peak(LONG)
    result |= {
        "peak_bytes": {str(LONG // 4): short, str(LONG): long},
        "peak_long_vs_short": long / short,
    }
    print(f"peak of {LONG} to {LONG // 4} tokens: {long / short:.3f}", file=sys.stderr)
    finish(result, args.out)


def _seconds(runs: list[tuple[float, float]]) -> float:
    return statistics.median(seconds for seconds, _ in runs)


if __name__ == "__main__":
    main()
