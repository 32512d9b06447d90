"""Chunk invariance on real weights: same logits and kept tokens for every chunking.

    python scripts/chunk_invariance.py [--text FILE] [--tokens 2048] [--size 128]

Feeds the text one token at a time, in chunks of 7, of 256 and in one chunk, under
every policy and granularity, float32. Prints the largest difference of a logit and
whether the positions kept in all layers are equal; the last line is JSON.
"""

import argparse
import json
from pathlib import Path

from tova_mlx.blas import load_openblas

load_openblas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm import load  # noqa: E402

from tova_mlx import POLICIES, make_prompt_cache  # noqa: E402
from tova_mlx.demo import demo_model_path  # noqa: E402

EXCERPT = Path(__file__).parent / "moby_dick_excerpt.txt"


def feed(model, tokens, cache, chunk):
    parts = []
    for start in range(0, tokens.shape[1], chunk):
        logits = model(tokens[:, start : start + chunk], cache=cache)
        mx.eval(logits, [c.state for c in cache])
        parts.append(np.array(logits[0]).astype(np.float32))
    return np.concatenate(parts), [np.array(c.positions) for c in cache]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=EXCERPT)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    args = parser.parse_args()
    model, tokenizer = load(str(demo_model_path()))
    model.set_dtype(mx.float32)
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8")[:40_000])
    if len(ids) < args.tokens:
        parser.error(f"{args.text} has {len(ids)} tokens, fewer than {args.tokens}.")
    tokens = mx.array(ids[: args.tokens])[None]
    rows = []
    for policy in args.policies:
        reads = POLICIES[policy].reads_attention
        for granularity in ("layer", "head") if reads else (None,):
            options = {"granularity": granularity} if granularity else {}
            reference = None
            for chunk in (1, 7, 256, args.tokens):
                cache = make_prompt_cache(model, args.size, policy=policy, **options)
                logits, kept = feed(model, tokens, cache, chunk)
                if reference is None:
                    reference = logits, kept
                    continue
                row = {
                    "policy": policy,
                    "granularity": granularity,
                    "chunk": chunk,
                    "largest_difference": float(np.abs(logits - reference[0]).max()),
                    "same_positions": all(map(np.array_equal, kept, reference[1])),
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    worst = max(r["largest_difference"] for r in rows)
    same = all(r["same_positions"] for r in rows)
    print(json.dumps({"rows": len(rows), "worst": worst, "same_positions": same}))


if __name__ == "__main__":
    main()
