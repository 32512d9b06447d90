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
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import provenance
from mlx_lm import load

import tova_mlx.attention.block
import tova_mlx.eviction.step
from tova_mlx import POLICIES, make_prompt_cache
from tova_mlx.models.demo import demo_model_path

EXCERPT = Path(__file__).parent / "moby_dick_excerpt.txt"


class Evictions:
    """Which token left each layer at each step, in the order of the calls."""

    def __init__(self):
        self.victims, self.gaps = [], []
        self._choose = tova_mlx.eviction.step.choose_victim
        self._scan = tova_mlx.attention.block.scan_block

    def __enter__(self):
        tova_mlx.eviction.step.choose_victim = self._chosen
        tova_mlx.attention.block.scan_block = self._scanned
        return self

    def __exit__(self, *_):
        tova_mlx.eviction.step.choose_victim = self._choose
        tova_mlx.attention.block.scan_block = self._scan

    def _chosen(self, positions, scores, newest, rule):
        victim = self._choose(positions, scores, newest, rule)
        if scores is not None:
            free = (positions >= rule.n_sinks) & (positions <= newest - rule.n_recent)
            two = mx.sort(mx.where(free, scores, mx.inf), axis=-1)[0, :, :2]
            self.gaps.append((two[:, 1] - two[:, 0]) / two[:, 0])
            self.victims.append(mx.take_along_axis(positions, victim, axis=-1)[0, :, 0])
        return victim

    def _scanned(self, logits, positions, *args, **options):
        result = self._scan(logits, positions, *args, **options)
        last = np.array(result.last)
        n_gone = int((last[0] < logits.shape[2]).sum())
        gone = np.argsort(last, axis=1)[:, :n_gone]
        self.victims.append(np.take_along_axis(np.array(positions), gone, axis=1))
        return result

    def by_layer(self, n_layers):
        """What one forward pass recorded: victims [layers, R, steps] and gaps."""
        if not self.victims:
            return None
        share = len(self.victims) // n_layers
        victims = np.array(
            [
                np.concatenate(
                    [np.array(v).reshape(len(v), -1) for v in self.victims[i:][:share]],
                    axis=1,
                )
                for i in range(0, len(self.victims), share)
            ]
        )
        gaps = np.array([np.array(g)[:, None] for g in self.gaps])
        self.victims, self.gaps = [], []
        return victims, gaps


def feed(model, tokens, cache, chunk):
    """Logits, positions kept, victims and gaps [layers, R, steps] of all steps."""
    parts, steps = [], []
    with Evictions() as evictions:
        for start in range(0, tokens.shape[1], chunk):
            logits = model(tokens[:, start : start + chunk], cache=cache)
            mx.eval(logits, [c.state for c in cache])
            steps.append(evictions.by_layer(len(cache)))
            parts.append(np.array(logits[0]).astype(np.float32))
    kept = [np.array(c.positions) for c in cache]
    victims = gaps = None
    if any(steps):
        victims, gaps = zip(*filter(None, steps), strict=True)
        victims = np.concatenate(victims, axis=2)
        gaps = np.concatenate(gaps, axis=2) if gaps[0].size else None
    return np.concatenate(parts), kept, victims, gaps


def compare(ours, reference, size):
    """One row's measured part."""
    difference = np.abs(ours[0] - reference[0]).max(axis=1)
    row = {
        "largest_difference": float(difference.max()),
        "same_positions": all(map(np.array_equal, ours[1], reference[1])),
    }
    if ours[2] is None:
        return row
    parted = ours[2] != reference[2]
    row |= {"evictions": parted.size, "evictions_parted": int(parted.sum())}
    if parted.any():
        step = int(np.nonzero(parted.any(axis=(0, 1)))[0][0])
        layer, chooser = (int(a[0]) for a in np.nonzero(parted[..., step]))
        row["first_parting"] = {
            "token": size + step,
            "layer": layer,
            "relative_gap": float(reference[3][layer, chooser, step]),
            "largest_difference_before": float(difference[: size + step + 1].max()),
        }
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
                result = feed(model, tokens, cache, chunk)
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
