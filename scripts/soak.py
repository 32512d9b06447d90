"""Reads and decodes without end, and looks for anything that drifts.

    python scripts/soak.py [TEXT] [--tokens 100000] [--out results/soak.json]

The demo model reads the text, over and over, and after every 1,920 tokens decodes 128
of its own. For each stretch of 2,048 tokens it prints the perplexity of what was read,
tokens per second, bytes of all caches, MLX's active and peak memory, and resident
memory. Ends with 1 if, past the first 10,240 tokens, cache bytes change at all, peak
memory by more than 1 %, resident memory grows by more than 1 MB per 10,000 tokens, the
last tenth is slower than 0.95 of the first, or a stretch has more than 1.1 times the
perplexity that the same one had in the first lap. The last line is JSON.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import EXCERPT, load_demo_model, losses, provenance

from tova_mlx import describe, make_prompt_cache
from tova_mlx.evaluation.reading import read

READ, DECODED, STEP = 1920, 128, 640
# Tokens up to where all is as it stays: the demo model's range ends at 8,192, and from
# there on a layer has a number more per slot.
WARM_UP = 10_240
PER_LAP = READ + DECODED


def resident() -> int:
    """Bytes of this process that are in memory."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    import resource

    # The most so far: it cannot go down, which is all that is asked of it.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stretch(model: Any, ids: list[int], caches: list[Any]) -> dict[str, Any]:
    """Read some tokens and decode some; what was seen of it."""
    mx.reset_peak_memory()
    began, loss = time.perf_counter(), 0.0
    tokens = mx.array([ids])
    logits = tokens
    for start, logits in read(model, tokens, caches, STEP):
        # What the last one predicts is not in the text.
        n = min(logits.shape[1], len(ids) - 1 - start)
        wanted = tokens[0, start + 1 : start + 1 + n]
        loss += float(losses(logits[0, :n], wanted).sum())
    reading = time.perf_counter() - began
    began, newest = time.perf_counter(), mx.argmax(logits[:, -1:], axis=-1)
    for _ in range(DECODED):
        newest = mx.argmax(model(newest, cache=caches)[:, -1:], axis=-1)
        mx.async_eval(newest)
    mx.eval(newest)
    decoding = time.perf_counter() - began
    return {
        "perplexity": math.exp(loss / (len(ids) - 1)),
        "read_tokens_per_s": len(ids) / reading,
        "decoded_tokens_per_s": DECODED / decoding,
        "tokens_per_s": (len(ids) + DECODED) / (reading + decoding),
        "cache_bytes": describe(caches).totals["bytes_now"],
        "active_bytes": mx.get_active_memory(),
        "peak_bytes": mx.get_peak_memory(),
        "resident_bytes": resident(),
    }


def drift(rows: list[dict[str, Any]], lap: int) -> dict[str, Any]:
    """What changed between stretches; the first ones are the warm-up."""
    later = [r for r in rows if r["tokens"] > WARM_UP] or rows[len(rows) // 4 :]
    tenth = max(1, len(later) // 10)
    x = [r["tokens"] for r in later]
    slope, _ = statistics.linear_regression(x, [r["resident_bytes"] for r in later])
    rates = [r["tokens_per_s"] for r in later]
    first, last = (statistics.median(r) for r in (rates[:tenth], rates[-tenth:]))
    peaks = [r["peak_bytes"] for r in later]
    again = [
        row["perplexity"] / rows[i % lap]["perplexity"]
        for i, row in enumerate(rows)
        if i >= lap
    ]
    return {
        "cache_bytes": sorted({r["cache_bytes"] for r in later}),
        "peak_bytes_change": max(peaks) / min(peaks) - 1,
        "resident_bytes_per_10k_tokens": 10_000 * slope,
        "speed_last_tenth_to_first": last / first,
        "perplexity_to_first_lap": [min(again, default=1.0), max(again, default=1.0)],
    }


def wrong(found: dict[str, Any]) -> list[str]:
    """Names of what drifts."""
    checks = {
        "cache_bytes": len(found["cache_bytes"]) > 1,
        "peak_bytes_change": found["peak_bytes_change"] > 0.01,
        "resident_bytes_per_10k_tokens": found["resident_bytes_per_10k_tokens"] > 1e6,
        "speed_last_tenth_to_first": found["speed_last_tenth_to_first"] < 0.95,
        "perplexity_to_first_lap": not found["perplexity_to_first_lap"][1] <= 1.1,
    }
    return [name for name, is_wrong in checks.items() if is_wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, nargs="?", default=EXCERPT)
    parser.add_argument("--tokens", type=int, default=0, help="0: until Ctrl-C")
    parser.add_argument("--max-kv-size", type=int, default=512)
    parser.add_argument("--policy", default="tova")
    parser.add_argument("--positions", default="auto")
    parser.add_argument("--kv-bits", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_demo_model()
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    # Enough for laps to repeat several times.
    ids = ids[: max(READ, min(len(ids), 8 * READ) // READ * READ)]
    lap = max(1, len(ids) // READ)
    how = {"policy": args.policy, "positions": args.positions, "kv_bits": args.kv_bits}
    caches = make_prompt_cache(model, args.max_kv_size, journal=0, **how)
    rows: list[dict[str, Any]] = []
    try:
        while not args.tokens or len(rows) * PER_LAP < args.tokens:
            start = len(rows) % lap * READ
            row = stretch(model, ids[start : start + READ], caches)
            rows.append({"tokens": (len(rows) + 1) * PER_LAP, **row})
            said = {k: round(v, 2) for k, v in rows[-1].items()}
            print(json.dumps(said), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if len(rows) < 2:
            raise
    found = drift(rows, lap)
    report = {
        **how,
        "max_kv_size": args.max_kv_size,
        "tokens": rows[-1]["tokens"],
        "drift": found,
        "drifts": wrong(found),
        "stretches": rows,
        **provenance(),
    }
    if args.out:
        args.out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "stretches"}))
    sys.exit(bool(report["drifts"]))


if __name__ == "__main__":
    main()
