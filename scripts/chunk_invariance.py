"""Chunk invariance on real weights: same logits and kept tokens for every chunking.

    python scripts/chunk_invariance.py --out results/chunk_invariance.jsonl

Feeds the text one token at a time, in chunks of 7, of 256 and in one chunk, under
every policy and granularity, float32. Writes the largest difference of a logit and
whether the positions kept in all layers are equal. Matrix products of different shapes
round differently, so two runs can part where two scores are equal to the last digits:
then the number of evictions that differ is written too and, for the first, the
relative gap between the two lowest scores. Rows already in `--out` are not run again.
The last line is JSON.
"""

import argparse
import json
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import EXCERPT, provenance
from mlx_lm import load

from tova_mlx import POLICIES, make_prompt_cache, observe_evictions
from tova_mlx.eviction import step
from tova_mlx.models.demo import demo_model_path


class Run:
    """What one chunking gave: logits, positions held, victims and their margins.

    victims: int32 [layers, H', evictions], in order of step, None without an eviction;
    gaps: how much higher the second lowest score was, relative [layers, H',
    evictions], None for chunks, whose scan tells nobody.
    """

    def __init__(self, model, tokens, caches, chunk):
        logits, victims, gaps = [], [[] for _ in caches], []

        def evicted(layer, steps, positions):
            victims[layer].append(positions[0])

        with observe_evictions(caches, evicted), margins(gaps):
            for start in range(0, tokens.shape[1], chunk):
                logits.append(model(tokens[:, start : start + chunk], cache=caches))
                mx.eval(logits[-1], victims, gaps, [c.state for c in caches])
        logits = mx.concatenate(logits, axis=1)
        self.logits = np.array(logits[0].astype(mx.float32))
        self.held = [np.array(c.positions) for c in caches]
        self.victims = self.gaps = None
        if victims[0]:
            layers = [mx.concatenate(v, axis=1) for v in victims]
            self.victims = np.array(mx.stack(layers))
        if chunk == 1 and gaps:
            layers = [
                mx.stack(gaps[i :: len(caches)], axis=1) for i in range(len(caches))
            ]
            self.gaps = np.array(mx.stack(layers))


@contextmanager
def margins(gaps):
    """Append the relative gap [H'] between the two lowest scores of every step."""
    choose = step.choose_victim

    def measured(positions, scores, newest, rule):
        free = (positions >= rule.n_sinks) & (positions <= newest - rule.n_recent)
        two = mx.sort(mx.where(free, scores, mx.inf), axis=-1)[0, :, :2]
        gaps.append((two[:, 1] - two[:, 0]) / two[:, 0])
        return choose(positions, scores, newest, rule)

    step.choose_victim = measured
    try:
        yield
    finally:
        step.choose_victim = choose


def compare(ours, reference, size):
    """One row's measured part."""
    difference = np.abs(ours.logits - reference.logits).max(axis=1)
    row = {
        "largest_difference": float(difference.max()),
        "same_positions": all(map(np.array_equal, ours.held, reference.held)),
    }
    if reference.victims is None:
        return row
    parted = ours.victims != reference.victims
    row |= {"evictions": parted.size, "evictions_parted": int(parted.sum())}
    if parted.any():
        first = int(np.nonzero(parted.any(axis=(0, 1)))[0][0])
        layer, head = (int(a[0]) for a in np.nonzero(parted[..., first]))
        row["first_parting"] = {
            "token": size + first,
            "layer": layer,
            "largest_difference_before": float(difference[: size + first + 1].max()),
        }
        if reference.gaps is not None:
            gap = float(reference.gaps[layer, head, first])
            row["first_parting"]["relative_gap"] = gap
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=EXCERPT)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    args = parser.parse_args()
    model, tokenizer = load(str(demo_model_path()))
    model.set_dtype(mx.float32)
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8")[:40_000])
    if len(ids) < args.tokens:
        parser.error(f"{args.text} has {len(ids)} tokens, fewer than {args.tokens}.")
    tokens = mx.array(ids[: args.tokens])[None]
    rows = []
    if args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    done = {(r["policy"], r["granularity"]) for r in rows}
    for policy in args.policies:
        reads = POLICIES[policy].reads_attention
        for granularity in ("layer", "head") if reads else (None,):
            if (policy, granularity) in done:
                continue
            options = {"granularity": granularity} if granularity else {}
            reference = None
            for chunk in (1, 7, 256, args.tokens):
                cache = make_prompt_cache(model, args.size, policy=policy, **options)
                result = Run(model, tokens, cache, chunk)
                if reference is None:
                    reference = result
                    continue
                row = {"policy": policy, "granularity": granularity, "chunk": chunk}
                row |= compare(result, reference, args.size)
                row |= {
                    "max_kv_size": args.size,
                    "tokens": args.tokens,
                    **provenance(),
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
            args.out.write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = {
        "rows": len(rows),
        "same_positions": sum(r["same_positions"] for r in rows),
        "largest_difference": max(r["largest_difference"] for r in rows),
        "evictions_parted": sum(r.get("evictions_parted", 0) for r in rows),
        "evictions": sum(r.get("evictions", 0) for r in rows),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
