"""What quantised slots cost in perplexity, against the same policy unquantised.

    python scripts/quality_packed.py TEXT [TEXT …] --out results/quality_packed.jsonl

As scripts/quality.py, at one `--max-kv-size`. `ratio_to_plain` is the perplexity of
the tokens past the limit over that of the unquantised run, with the standard error of
the paired difference. Rows already in `--out` are not run again. The last line is JSON.
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from quality import losses, measured, provenance_of_row

from tova_mlx import POLICIES
from tova_mlx.models.demo import demo_model_path

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
    common, size = provenance_of_row(args.tokens), args.max_kv_size
    for policy in args.policies:
        plain = None
        for bits, group in KEPT:
            if (policy, *bits, group) in done:
                continue
            if plain is None:
                plain = losses(model, tokens, size, policy)
            kept = {"kv_bits": bits, "kv_group_size": group}
            got = losses(model, tokens, size, policy, **kept)
            for text, nll, base in zip(args.texts, got, plain, strict=True):
                row = {
                    **common,
                    "text": text.stem,
                    "policy": policy,
                    "max_kv_size": size,
                    **kept,
                    **measured(nll[size:], base[size:], "plain"),
                }
                with args.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(
                    f"{text.stem:12} {policy:6} {bits} group {group} "
                    f"{row['value']:8.3f} {row['ratio_to_plain']:.4f}",
                    flush=True,
                )
    print(
        json.dumps(
            {"out": str(args.out), "rows": len(args.out.read_text().splitlines())}
        )
    )


if __name__ == "__main__":
    main()
