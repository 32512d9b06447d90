"""What it costs that a decode step on Metal has its logits in half precision.

    python scripts/half_logits.py TEXT [TEXT ...] --model PATH [--model PATH ...]
        [--policy fade ...] [--max-kv-size 512] [--tokens 4096] [--out FILE]

There the logits that choose a victim are rounded to the model's type, and so are the
scaled queries; products add up in float32. Here the model runs in float32, with
queries, keys and values rounded to that type, and so do the scans that evict in a
prompt, which are exact token by token: as if all of the text was decoded. Attention
itself is the same in all runs. For float16 and bfloat16:

- along the run by float32 logits: how often the rounded ones choose another victim,
  also of the layer where it is most often, by how much its score in float32 is above
  the lowest, as a part of it, and how often it is the second lowest; beside it, how
  often float32 is not sure, which is how often a step's softmax and the scan's choose
  otherwise. Once more with queries that are not scaled by a power of two, as where a
  head has 128 numbers: heads of 64 have a scale that rounds nothing;
- run by rounded logits: the change of perplexity of the tokens past the limit against
  the run by float32 logits, beside what evicting costs against the full cache (in
  float16), and which part of the tokens held at the end is the same. Errors are of the
  paired mean, in blocks of 64 tokens.

The last line is JSON.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from common import finish, provenance, read_losses

from tova_mlx import make_prompt_cache
from tova_mlx.attention.arguments import AttentionArgs
from tova_mlx.attention.block import BLOCK
from tova_mlx.attention.logits import masked_logits
from tova_mlx.cli.models import load
from tova_mlx.evaluation.reading import first_ids
from tova_mlx.evaluation.statistics import mean_with_error
from tova_mlx.eviction import (
    Columns,
    ScanResult,
    choose_victim,
    scan_block,
    update_scores,
)
from tova_mlx.policies import Rule

Floats = npt.NDArray[np.floating]


TYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}

# What queries are scaled by beside the model's own scale.
FACTORS = {"along": 1.0, "along_odd_scale": 0.5**0.5}


class Run(NamedTuple):
    """Losses of the tokens past the limit; positions held at the end, by layer."""

    losses: Floats
    held: list[npt.NDArray[np.integer]]


class Input(NamedTuple):
    """What is read: a model, the tokens of a text, how many are held, and the type."""

    model: Any
    ids: list[int]
    limit: int
    dtype: mx.Dtype

    def run(self, policy: str) -> Run:
        """Read the text, with all that the caches get rounded to the type."""
        caches = make_prompt_cache(self.model, self.limit, policy=policy, journal=0)
        for cache in caches:
            cache.update_and_fetch = rounding(cache.update_and_fetch, self.dtype)
            cache.attend = rounding(cache.attend, self.dtype)
        losses = read_losses(self.model, self.ids, caches, BLOCK)
        held = [np.array(c.slots.held_positions()) for c in caches]
        return Run(losses[self.limit :], held)


def rounded(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return the numbers that another type has for these."""
    return array.astype(dtype).astype(array.dtype)


def rounding(function: Callable[..., Any], dtype: mx.Dtype) -> Callable[..., Any]:
    """Return a function whose arguments that have no name are rounded first."""

    def with_rounded(*arrays: mx.array, **how: Any) -> Any:
        return function(*(rounded(a, dtype) for a in arrays), **how)

    return with_rounded


def half_logits(
    queries: mx.array,
    keys: Any,
    args: AttentionArgs,
    dtype: mx.Dtype,
    factor: float = 1.0,
) -> mx.array:
    """Return logits as a decode step on Metal has them."""
    scaled = rounded(queries * (args.scale * factor), dtype)
    exact = masked_logits(scaled, keys, args._replace(scale=1 / factor))
    return rounded(exact, dtype)


@contextmanager
def evicting_by(logits: Any, scan: Any = scan_block) -> Iterator[None]:
    """Let prompts be scanned by other logits, and by another scan."""
    block = "tova_mlx.attention.block"
    with (
        mock.patch(f"{block}.masked_logits", logits),
        mock.patch(f"{block}.scan_block", scan),
    ):
        yield


class Comparison:
    """What rounded logits would evict at each step of a run by float32 logits.

    Policies with a memory remember what rounded logits gave, of the tokens held.
    """

    def __init__(self, source: Input, factors: Collection[float]):
        self._factors, self._dtype = factors, source.dtype
        n_layers = len(source.model.layers)
        self._layers = itertools.cycle(range(n_layers))
        self._n_tokens = len(source.ids)
        # By layer and factor: scores [H', tokens], by position.
        self._memory: dict[tuple[int, int], Floats] = {}
        self._logits: list[mx.array] = []
        self._victims = self._unsure = 0
        self._gaps: list[list[Floats]] = [[] for _ in factors]
        self._seconds = [0] * len(factors)
        self._by_layer = np.zeros((len(factors), n_layers))

    def logits(self, queries: mx.array, keys: Any, args: AttentionArgs) -> mx.array:
        """Return float32 logits, as a scan gets them."""
        self._logits = [
            half_logits(queries, keys, args, self._dtype, f) for f in self._factors
        ]
        return masked_logits(queries, keys, args)

    def scan(
        self, logits: mx.array, columns: Columns, rule: Rule, **how: Any
    ) -> ScanResult:
        """Scan by these logits, and count what the others would evict."""
        result = scan_block(logits, columns, rule, **how)
        steps = Steps(result, columns, rule, logits.shape[2])
        layer = next(self._layers)
        exact = steps.scores(logits, np.array(columns.scores))
        others = [
            self._remembered((layer, i), steps, given)
            for i, given in enumerate(self._logits)
        ]
        first = max(0, how["limit"] - steps.n_held)
        if first >= steps.length:
            return result
        lowest = steps.victims(exact)
        second = steps.victims(exact, without=lowest)
        self._victims += lowest[first:].size
        self._unsure += int((lowest != steps.evicted)[first:].sum())
        for i, scores in enumerate(others):
            victims = steps.victims(scores)
            differ = (victims != lowest)[first:]
            least, own = (
                np.take_along_axis(exact, v, axis=-1)[first:][differ]
                for v in (lowest, victims)
            )
            self._by_layer[i, layer] += differ.sum()
            self._gaps[i].append((own - least) / np.maximum(least, 1e-30))
            self._seconds[i] += int((victims == second)[first:][differ].sum())
        return result

    def _remembered(
        self, which: tuple[int, int], steps: "Steps", logits: mx.array
    ) -> Floats:
        """Return scores by rounded logits, and remember those after the last step."""
        places = np.array(steps.columns.positions)
        new = np.zeros((len(places), self._n_tokens), np.float32)
        memory = self._memory.setdefault(which, new)
        before = np.take_along_axis(memory, places, axis=1)
        scores = steps.scores(logits, before)
        np.put_along_axis(memory, places, scores[-1], axis=1)
        return scores

    def report(self, i: int) -> dict[str, Any]:
        """Return what was found of a factor."""
        gaps, victims = np.concatenate(self._gaps[i]), self._victims
        n = len(gaps)
        quantiles = np.quantile(gaps, (0.5, 0.9, 0.99, 1)) if n else np.zeros(4)
        named = zip(("median", "90%", "99%", "max"), quantiles, strict=True)
        return {
            "victims": victims,
            "differ": n / victims,
            "differ_in_worst_layer": self._by_layer[i].max()
            * self._by_layer.shape[1]
            / victims,
            "float32_unsure": self._unsure / victims,
            "second_lowest": self._seconds[i] / max(1, n),
            "gap": {name: float(q) for name, q in named},
        }


class Steps:
    """A block's steps as if each was a decode step: [L, H', N], one row of a batch."""

    def __init__(self, scan: ScanResult, columns: Columns, rule: Rule, length: int):
        self.columns, self.rule, self.length = columns, rule, length
        n_columns = columns.positions.shape[1]
        self.n_held = n_columns - length
        steps, last = mx.arange(length)[:, None, None], scan.last[None]
        there = mx.arange(n_columns) <= self.n_held + steps
        self.held = there & (last >= steps)
        # The column that the scan evicts; any where it evicts none.
        self.evicted = np.array(mx.argmax(last == steps, axis=-1, keepdims=True))
        self._newest = columns.positions[0, self.n_held :][:, None, None]

    def scores(self, logits: mx.array, before: Floats) -> Floats:
        """Return scores after each step, by `before` [H', N] and the logits."""
        n_heads, norms = logits.shape[1], self.columns.value_norms
        heads = self.held.shape[1]
        held = mx.repeat(self.held, n_heads // heads, axis=1)
        visible = mx.where(held, logits[0].swapaxes(0, 1), -mx.inf)
        weights = mx.softmax(visible, axis=-1, precise=True)
        n_kv_heads = heads if norms is None else norms.shape[1]
        grouped = weights.reshape(self.length, n_kv_heads, -1, weights.shape[2])
        scores = np.array(update_scores(grouped, norms, None, self.rule))
        if self.rule.memory:
            for received in scores:
                received += np.float32(self.rule.memory) * before
                before = received
        return scores

    def victims(
        self, scores: Floats, without: npt.NDArray[np.integer] | None = None
    ) -> npt.NDArray[np.integer]:
        """Return the victims [L, H', 1], or what they are without some columns."""
        held = self.held
        if without is not None:
            columns = mx.arange(held.shape[2])
            held = held & (columns != mx.array(without))
        positions = mx.broadcast_to(self.columns.positions[None], held.shape)
        chosen = choose_victim(
            positions, mx.array(scores), self._newest, self.rule, held
        )
        return np.array(chosen).astype(np.int64)


def alike(one: Run, other: Run) -> float:
    """Return which part of the tokens held is held by both."""
    parts = [
        len(np.intersect1d(a, b)) / len(a)
        for layer in zip(one.held, other.held, strict=True)
        for a, b in zip(*(h.reshape(-1, h.shape[2]) for h in layer), strict=True)
    ]
    return float(np.mean(parts))


def percent(changes: Floats) -> dict[str, float]:
    """Return the change of perplexity, and its error."""
    mean, error = mean_with_error(changes)
    return {"percent": 100 * math.expm1(mean), "stderr": 100 * error}


def measure(source: Input, policy: str, full: Run) -> tuple[dict[str, Any], Floats]:
    """Return what is found, and the change of each token's loss by rounding."""
    found = Comparison(source, FACTORS.values())
    with evicting_by(found.logits, found.scan):
        exact = source.run(policy)
    with evicting_by(partial(half_logits, dtype=source.dtype)):
        run = source.run(policy)
    changes = run.losses - exact.losses
    report = {
        "perplexity": math.exp(exact.losses.mean()),
        "evicting": percent(exact.losses - full.losses),
        "rounded_logits": percent(changes),
        "held_alike": alike(exact, run),
    }
    return report | {n: found.report(i) for i, n in enumerate(FACTORS)}, changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--policy", action="append")
    parser.add_argument("--max-kv-size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows, changes = [], {}
    for text, name in itertools.product(args.texts, args.model):
        model, tokenizer, path = load(name)
        ids = first_ids(tokenizer, text.read_text(encoding="utf-8"), args.tokens)
        sources = {
            kind: Input(model, ids[: args.tokens + 1], args.max_kv_size, dtype)
            for kind, dtype in TYPES.items()
        }
        full = sources["float16"].run("full")
        for kind, policy in itertools.product(TYPES, args.policy or ["tova", "fade"]):
            found, own = measure(sources[kind], policy, full)
            which = {"model": Path(path).name, "policy": policy, "type": kind}
            changes.setdefault(tuple(which.items()), []).append(own)
            rows.append({**which, "text": text.stem, **found})
            print(rows[-1], flush=True)
        # After each, for a run takes long.
        report = {
            **provenance(),
            "max_kv_size": args.max_kv_size,
            "tokens": args.tokens,
            "rows": rows,
            "all_texts": [
                {**dict(which), **percent(np.concatenate(parts))}
                for which, parts in changes.items()
            ],
        }
        finish(report, args.out)


if __name__ == "__main__":
    main()
