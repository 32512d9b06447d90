"""What it costs that a decode step on Metal has its logits in half precision.

    python scripts/half_logits.py TEXT [TEXT ...] --model PATH [--model PATH ...]
        [--policy fade ...] [--max-kv-size 512] [--tokens 4096] [--against-unrounded]
        [--out FILE]

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

With --against-unrounded, what a type does to victims anyway: along a run that rounds
nothing, how often float32 logits of rounded queries and keys choose another victim, and
how often rounded logits of them do; also the largest logits there are, by layer.

The last line is JSON.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
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

# Logits [B, n_heads, L, S] of queries, keys and what a model gives to its attention.
Logits: TypeAlias = Callable[[mx.array, Any, AttentionArgs], mx.array]


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
    """Return logits as a decode step on Metal has them.

    factor: what queries are scaled by beside the model's scale before they are rounded.
    """
    scaled = rounded(queries * (args.scale * factor), dtype)
    exact = masked_logits(scaled, keys, args._replace(scale=1 / factor))
    return rounded(exact, dtype)


def logits_of_rounded(
    queries: mx.array, keys: Any, args: AttentionArgs, dtype: mx.Dtype, logits: Logits
) -> mx.array:
    """Return logits of rounded queries and keys."""
    return logits(rounded(queries, dtype), rounded(keys, dtype), args)


@contextmanager
def evicting_by(logits: Logits, scan: Any = scan_block) -> Iterator[None]:
    """Let prompts be scanned by other logits, and by another scan."""
    block = "tova_mlx.attention.block"
    with (
        mock.patch(f"{block}.masked_logits", logits),
        mock.patch(f"{block}.scan_block", scan),
    ):
        yield


class Comparison:
    """What other logits would evict at each step of a run by float32 logits.

    Policies with a memory remember what those gave, of the tokens held.
    """

    def __init__(self, source: Input, others: dict[str, Logits]):
        self._others = others
        n_layers = len(source.model.layers)
        self._layers = itertools.cycle(range(n_layers))
        self._n_tokens = len(source.ids)
        # By layer and name: scores [H', tokens], by position.
        self._memory: dict[tuple[int, str], Floats] = {}
        self._given: dict[str, mx.array] = {}
        self._victims = self._unsure = 0
        self._gaps: dict[str, list[Floats]] = {name: [] for name in others}
        self._seconds = dict.fromkeys(others, 0)
        self._by_layer = {name: np.zeros(n_layers) for name in others}
        self.largest = np.zeros(n_layers)

    def logits(self, queries: mx.array, keys: Any, args: AttentionArgs) -> mx.array:
        """Return float32 logits, as a scan gets them."""
        self._given = {n: of(queries, keys, args) for n, of in self._others.items()}
        return masked_logits(queries, keys, args)

    def scan(
        self, logits: mx.array, columns: Columns, rule: Rule, **how: Any
    ) -> ScanResult:
        """Scan by these logits, and count what the others would evict."""
        result = scan_block(logits, columns, rule, **how)
        steps = Steps(result, columns, rule, logits.shape[2])
        layer = next(self._layers)
        exact = steps.scores(logits, np.array(columns.scores))
        others = {
            name: self._remembered((layer, name), steps, given)
            for name, given in self._given.items()
        }
        top = float(mx.abs(logits).max())
        self.largest[layer] = max(self.largest[layer], top)
        first = max(0, how["limit"] - steps.n_held)
        if first >= steps.length:
            return result
        lowest = steps.victims(exact)
        second = steps.victims(exact, without=lowest)
        self._victims += lowest[first:].size
        self._unsure += int((lowest != steps.evicted)[first:].sum())
        for name, scores in others.items():
            victims = steps.victims(scores)
            differ = (victims != lowest)[first:]
            least, own = (
                np.take_along_axis(exact, v, axis=-1)[first:][differ]
                for v in (lowest, victims)
            )
            self._by_layer[name][layer] += differ.sum()
            self._gaps[name].append((own - least) / np.maximum(least, 1e-30))
            self._seconds[name] += int((victims == second)[first:][differ].sum())
        return result

    def _remembered(
        self, which: tuple[int, str], steps: "Steps", logits: mx.array
    ) -> Floats:
        """Return scores by rounded logits, and remember those after the last step."""
        places = np.array(steps.columns.positions)
        new = np.zeros((len(places), self._n_tokens), np.float32)
        memory = self._memory.setdefault(which, new)
        before = np.take_along_axis(memory, places, axis=1)
        scores = steps.scores(logits, before)
        np.put_along_axis(memory, places, scores[-1], axis=1)
        return scores

    def report(self) -> dict[str, Any]:
        """Return what was found, by name."""
        return {name: self._found(name) for name in self._others}

    def _found(self, name: str) -> dict[str, Any]:
        gaps, by_layer = np.concatenate(self._gaps[name]), self._by_layer[name]
        n, victims = len(gaps), self._victims
        quantiles = np.quantile(gaps, (0.5, 0.9, 0.99, 1)) if n else np.zeros(4)
        named = zip(("median", "90%", "99%", "max"), quantiles, strict=True)
        return {
            "victims": victims,
            "differ": n / victims,
            "differ_in_worst_layer": float(by_layer.max()) * len(by_layer) / victims,
            "float32_unsure": self._unsure / victims,
            "second_lowest": self._seconds[name] / max(1, n),
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
    logits = partial(half_logits, dtype=source.dtype)
    odd = partial(half_logits, dtype=source.dtype, factor=0.5**0.5)
    found = Comparison(source, {"along": logits, "along_odd_scale": odd})
    with evicting_by(found.logits, found.scan):
        exact = source.run(policy)
    with evicting_by(logits):
        run = source.run(policy)
    changes = run.losses - exact.losses
    report = {
        "perplexity": math.exp(exact.losses.mean()),
        "evicting": percent(exact.losses - full.losses),
        "rounded_logits": percent(changes),
        "held_alike": alike(exact, run),
    }
    return report | found.report(), changes


def measure_type(source: Input, policy: str) -> dict[str, Any]:
    """Return what rounding more than logits does to victims; source: rounds nothing."""
    others: dict[str, Logits] = {}
    for name, dtype in TYPES.items():
        half = partial(half_logits, dtype=dtype)
        for what, logits in (("queries, keys", masked_logits), ("logits too", half)):
            own = partial(logits_of_rounded, dtype=dtype, logits=logits)
            others[f"{name}: {what}"] = own
    found = Comparison(source, others)
    with evicting_by(found.logits, found.scan):
        source.run(policy)
    return {**found.report(), "largest_logits": found.largest.round(1).tolist()}


def measured(
    exact: Input, policies: list[str], *, against_unrounded: bool
) -> Iterator[tuple[dict[str, Any], Floats | None]]:
    """Yield rows, and with them the changes of losses if there are any."""
    if against_unrounded:
        for policy in policies:
            yield {"policy": policy, **measure_type(exact, policy)}, None
        return
    full = exact._replace(dtype=mx.float16).run("full")
    for kind, policy in itertools.product(TYPES, policies):
        found, changes = measure(exact._replace(dtype=TYPES[kind]), policy, full)
        yield {"policy": policy, "type": kind, **found}, changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--policy", action="append")
    parser.add_argument("--max-kv-size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--against-unrounded", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    policies = args.policy or ["tova", "fade"]
    rows: list[dict[str, Any]] = []
    by_kind: dict[Any, list[Floats]] = {}
    for text, name in itertools.product(args.texts, args.model):
        model, tokenizer, path = load(name)
        ids = first_ids(tokenizer, text.read_text(encoding="utf-8"), args.tokens)
        exact = Input(model, ids[: args.tokens + 1], args.max_kv_size, mx.float32)
        about = {"model": Path(path).name, "text": text.stem}
        found = measured(exact, policies, against_unrounded=args.against_unrounded)
        for row, changes in found:
            rows.append({**about, **row})
            print(rows[-1], flush=True)
            if changes is not None:
                kind = about["model"], row["policy"], row["type"]
                by_kind.setdefault(kind, []).append(changes)
        # After each text and model, for all of them take long.
        report = {
            **provenance(),
            "max_kv_size": args.max_kv_size,
            "tokens": args.tokens,
            "rows": rows,
            "all_texts": [
                dict(zip(("model", "policy", "type"), kind, strict=True))
                | percent(np.concatenate(parts))
                for kind, parts in by_kind.items()
            ],
        }
        finish(report, args.out)


if __name__ == "__main__":
    main()
