"""Speed of the exact prefill: against token by token, and against mlx-lm's own.

    python scripts/bench_prefill.py [--text FILE] [--repeats 3] [--out FILE]

Demo model, float32 where there is no Metal. Ratios of medians over interleaved repeats
after a warm-up. What decoding costs, and memory: `tova-mlx bench`. The last line is
JSON.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
from common import EXCERPT, finish, load_demo_model, provenance, repeated_ids
from mlx_lm.models.cache import KVCache

from tova_mlx import make_prompt_cache

SIZE, LENGTH, STEP = 512, 2048, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=EXCERPT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_demo_model()
    tokens = mx.array(repeated_ids(tokenizer, args.text, LENGTH))[None]

    def prefill(cache: list, step: int = STEP, length: int = LENGTH) -> float:
        start_time = time.perf_counter()
        for start in range(0, length, step):
            model(tokens[:, start : start + step], cache=cache)
            mx.eval([c.state for c in cache])
        return time.perf_counter() - start_time

    prefill(make_prompt_cache(model, SIZE), length=256)
    bounded, full = [], []
    for _ in range(args.repeats):
        bounded.append(prefill(make_prompt_cache(model, SIZE)))
        full.append(prefill([KVCache() for _ in model.layers]))
    single = prefill(make_prompt_cache(model, SIZE), step=1)
    ours, theirs = statistics.median(bounded), statistics.median(full)
    found = {
        "prefill_tps": LENGTH / ours,
        "prefill_vs_unbounded": ours / theirs,
        "prefill_speedup_over_single_tokens": single / ours,
    }
    for name, value in found.items():
        print(f"{name}: {value:.3f}", file=sys.stderr, flush=True)
    finish({**provenance(), "max_kv_size": SIZE, "tokens": LENGTH, **found}, args.out)


if __name__ == "__main__":
    main()
