"""What quantised slots cost in perplexity, against the same policy unquantised.

    python scripts/quality_packed.py TEXT [TEXT …] --out results/quality_packed.jsonl

As scripts/quality.py, at one `--max-kv-size`. `ratio_to_plain` is the perplexity of
the tokens past the limit over that of the unquantised run, with the standard error of
the paired difference. Rows already in `--out` are not run again. The last line is JSON.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load
from quality import STEP, losses

from tova_mlx import POLICIES
from tova_mlx.demo import demo_model_path

# Bits of keys and values, and values that share a scale.
KEPT = [((8, 8), 64), ((8, 4), 32), ((4, 4), 32), ((8, 4), 64), ((4, 4), 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4097)
    parser.add_argument("--max-kv-size", type=int, default=512)
    parser.add_argument(
        "--policies", nargs="+", default=["tova", "fade"], choices=POLICIES
    )
    args = parser.parse_args()
    done = set()
    if args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        done = {(r["policy"], *r["kv_bits"], r["kv_group_size"]) for r in rows}
    model, tokenizer = load(str(demo_model_path()))
    model.set_dtype(mx.float32)
    ids = [tokenizer.encode(t.read_text(encoding="utf-8")[:40_000]) for t in args.texts]
    tokens = mx.array([i[: args.tokens] for i in ids])
    for policy in args.policies:
        plain = None
        for bits, group in KEPT:
            if (policy, *bits, group) in done:
                continue
            if plain is None:
                plain = losses(model, tokens, args.max_kv_size, policy)
            kept = {"kv_bits": bits, "kv_group_size": group}
            got = losses(model, tokens, args.max_kv_size, policy, **kept)
            for text, nll, base in zip(args.texts, got, plain, strict=True):
                past = nll[args.max_kv_size :]
                difference = past - base[args.max_kv_size :]
                ratio = float(np.exp(difference.mean()))
                value = float(np.exp(past.mean()))
                n = len(past)
                row = {
                    "task": "perplexity",
                    "unit": "perplexity",
                    "model": demo_model_path().name,
                    "dtype": "float32",
                    "tokens": args.tokens - 1,
                    "prefill_step_size": STEP,
                    "seed": None,
                    "versions": {p: version(p) for p in ("tova_mlx", "mlx", "mlx-lm")},
                    "device": str(mx.default_device()),
                    "command": f"python scripts/quality_packed.py "
                    f"{' '.join(t.name for t in args.texts)} --out {args.out}",
                    "date": time.strftime("%Y-%m-%d"),
                    "text": text.stem,
                    "policy": policy,
                    "max_kv_size": args.max_kv_size,
                    **kept,
                    "value": value,
                    "n": n,
                    "stderr": value * float(past.std(ddof=1)) / n**0.5,
                    "ratio_to_plain": ratio,
                    "ratio_stderr": ratio * float(difference.std(ddof=1)) / n**0.5,
                }
                with args.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(
                    f"{text.stem:12} {policy:6} {bits} group {group} {value:8.3f} "
                    f"{ratio:.4f}",
                    flush=True,
                )
    print(json.dumps({"out": str(args.out), "command": " ".join(sys.argv)}))


if __name__ == "__main__":
    main()
