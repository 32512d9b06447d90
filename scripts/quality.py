"""Perplexity of every policy on two novels, real weights.

    python scripts/quality.py TEXT [TEXT …] --out results/quality.jsonl

Each text's first `--tokens` tokens are read with exact (stepwise) prefill; the texts
are rows of one batch. `value` is the perplexity of the tokens past `max_kv_size`,
`stderr` its standard error (tokens taken as independent), `ratio_to_full` the same
tokens' perplexity over that of `full`, with the standard error of the paired
difference. Rows already in `--out` are not run again. The last line is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tova_mlx.hooks.blas import load_openblas

load_openblas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from common import provenance  # noqa: E402
from mlx_lm import load  # noqa: E402

from tova_mlx import POLICIES  # noqa: E402
from tova_mlx.evaluation.reading import token_losses  # noqa: E402
from tova_mlx.evaluation.results import Setting  # noqa: E402
from tova_mlx.models.demo import demo_model_path  # noqa: E402

STEP = 512


def losses(
    model, tokens: mx.array, max_kv_size: int, policy: str, **options
) -> np.ndarray:
    """Negative log-likelihoods [B, n - 1] of tokens [B, n], given those before."""
    setting = Setting(policy, None if policy == "full" else max_kv_size)
    return token_losses(model, tokens, setting, STEP, **options)


def provenance_of_row(tokens: int) -> dict[str, Any]:
    """What all rows of a run say of it."""
    return {
        "task": "perplexity",
        "unit": "perplexity",
        "model": demo_model_path().name,
        "dtype": "float32",
        "tokens": tokens - 1,
        "prefill_step_size": STEP,
        "seed": None,
        **provenance(),
    }


def measured(nll: np.ndarray, base: np.ndarray, to: str) -> dict[str, Any]:
    """Perplexity with standard error, and its ratio to that of `base`, paired."""
    n, value = len(nll), float(np.exp(nll.mean()))
    difference = nll - base
    ratio = float(np.exp(difference.mean()))
    return {
        "value": value,
        "n": n,
        "stderr": value * float(nll.std(ddof=1)) / n**0.5,
        f"ratio_to_{to}": ratio,
        "ratio_stderr": ratio * float(difference.std(ddof=1)) / n**0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4097)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 256, 128])
    order = ["tova", "fade", "streaming", "h2o", "vatp", "window"]
    parser.add_argument("--policies", nargs="+", default=order, choices=POLICIES)
    args = parser.parse_args()
    done = set()
    if args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        done = {(r["policy"], r["max_kv_size"], r["text"]) for r in rows}
    model, tokenizer = load(str(demo_model_path()))
    model.set_dtype(mx.float32)
    ids = [tokenizer.encode(t.read_text(encoding="utf-8")[:40_000]) for t in args.texts]
    tokens = mx.array([i[: args.tokens] for i in ids])
    full = losses(model, tokens, 1, "full")
    common = provenance_of_row(args.tokens)
    for size in args.sizes:
        for policy in ["full", *args.policies]:
            names = [t.stem for t in args.texts]
            if all((policy, size, name) in done for name in names):
                continue
            got = full if policy == "full" else losses(model, tokens, size, policy)
            for name, nll, base in zip(names, got, full, strict=True):
                row = {
                    **common,
                    "text": name,
                    "policy": policy,
                    "max_kv_size": size,
                    **measured(nll[size:], base[size:], "full"),
                }
                with args.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(
                    f"{name:12} {size:4} {policy:10} {row['value']:8.3f} "
                    f"{row['ratio_to_full']:.4f}",
                    flush=True,
                )
    print(
        json.dumps(
            {"out": str(args.out), "rows": len(args.out.read_text().splitlines())}
        )
    )


if __name__ == "__main__":
    main()
