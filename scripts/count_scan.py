"""What the sequential part of a prefill scan reads and computes, on real logits.

    python scripts/count_scan.py [--model PATH] [--layers 4] [--out FILE]

Fills caches of 512 tokens with a text, takes the logits of the next block of 256 from a
few layers, and has the Metal kernels run on them by tests/mslcheck, which counts (Linux
x86-64, clang 19; no GPU). Loads are elements read from device memory; those that all 32
lanes of a simdgroup read alike count once. Exponentials are calls of exp. Per row of
the sequential kernel and threadgroup; the parallel ones are not counted.

Beside it what one kernel took that read every logit of every row twice ("before"; its
own joining of partial sums not counted), how many columns a row's bounds leave, and in
how many rows a head was lost and read again. Victims are compared with those of the
portable path. The last line is JSON.
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import EXCERPT, ROOT, finish, provenance, repeated_ids
from count_dispatches import KERNELS

from tova_mlx import make_prompt_cache
from tova_mlx.attention import block
from tova_mlx.cli.models import load
from tova_mlx.eviction import scan_block, scan_kernels
from tova_mlx.eviction.scan import scan_on_cpu
from tova_mlx.models.demo import demo_model_path

LIMIT, LENGTH = 512, 256
POLICIES = ("tova", "fade", "h2o")
# Read by all lanes of a simdgroup alike.
SHARED = ("tops", "sums", "range", "scores")
# In a constant memory of their own, or in registers.
CONSTANT = ("logits_shape", "counts", "memory")


def scans(model, ids, policy):
    """What the scan of each layer is given for the last 256 of the ids."""
    caches, given = make_prompt_cache(model, LIMIT, policy=policy), []

    def noted(logits, columns, rule, **how):
        given.append((logits, columns, rule, how))
        return scan_block(logits, columns, rule, **how)

    for start in range(0, len(ids), LENGTH):
        given.clear()
        block.scan_block = noted
        model(mx.array([ids[start : start + LENGTH]]), cache=caches)
        block.scan_block = scan_block
        mx.eval([(c.keys, c.positions) for c in caches])
    return given


def counted(logits, columns, rule, how, rows):
    """Loads and exponentials per row with so many rows at once, and `last`."""
    import mslcheck

    before, counts = scan_kernels.ROWS, []
    for kernel in KERNELS:
        kernel.cache_clear()
    try:
        scan_kernels.ROWS = rows
        with mslcheck.checked_kernels(orders=1, counts=counts, seconds=600):
            result = scan_kernels.scan_on_gpu(logits, columns, rule, **how)
    finally:
        scan_kernels.ROWS = before
    scanned = [c for name, c in counts if name == "tova_scan"]
    loads = sum(
        n / (32 if name in SHARED else 1)
        for c in scanned
        for name, n in c.reads.items()
        if name not in CONSTANT
    )
    each = len(columns.positions) * logits.shape[2]
    exponentials = sum(c.exponentials for c in scanned)
    return loads / each, exponentials / each, np.array(result.last)


def taken_before(logits, columns, rule, how, last):
    """Loads and exponentials per row of a kernel that reads every logit twice."""
    n_choices, n = columns.positions.shape
    length, heads = logits.shape[2], logits.shape[0] * logits.shape[1] // n_choices
    steps = np.arange(length)
    seen = n - length + steps + 1
    held = sum((last >= s) & (np.arange(n) < seen[s]) for s in steps).sum(axis=1)
    per_column = heads * (2 if rule.value_weighted else 1) + 1 + bool(rule.memory)
    loads = heads * seen.mean() + per_column * held.mean() / length
    loads += how["n_before"] * n / length
    return loads, 3 * heads * held.mean() / length


def candidates(logits, columns, rule, last, rows):
    """Per chooser and row [R, L]: columns that may be it, and heads taken again.

    By the kernel's bounds, recomputed here.
    """
    n_choices, n = columns.positions.shape
    length = logits.shape[2]
    logits = np.array(logits.astype(mx.float32)).reshape(n_choices, -1, length, n)
    norms = np.ones(1, np.float32)
    if columns.value_norms is not None:
        norms = np.array(columns.value_norms)
        norms = norms.repeat(logits.shape[1] * n_choices // norms[..., 0].size, axis=1)
        norms = norms.reshape(n_choices, -1, n)
    positions = np.array(columns.positions)
    newest = positions[:, -1:] - (length - 1)
    found = np.zeros((n_choices, length), int)
    lost = np.zeros((n_choices, length), bool)
    exact = np.array(columns.scores)
    for step in range(length):
        if step % rows == 0:
            lows, most = exact, np.ones(n_choices)
        there = np.arange(n) <= n - length + step
        began, held = ((last >= s) & there for s in (step - step % rows, step))
        visible = np.where(began[:, None], logits[:, :, step], -np.inf)
        weights = np.exp(visible - visible.max(axis=-1, keepdims=True))
        sums = weights.sum(axis=-1)
        rest = (weights * held[:, None]).sum(axis=-1)
        weights = weights * norms
        ratio = (sums / rest).max(axis=1)
        most = np.maximum(most, ratio) if rule.memory else ratio
        lows, exact = (
            rule.memory * before + (weights / total[..., None]).mean(axis=1)
            for before, total in ((lows, sums), (exact, rest))
        )
        free = held & (positions >= rule.n_sinks)
        free &= positions <= newest + step - rule.n_recent
        lost[:, step] = (rest < scan_kernels._LOST * sums).any(axis=1)
        lowest = np.where(free, lows, np.inf).min(axis=1)
        bound = (lowest + scan_kernels._SLACK) * most * 1.0001
        few = free & (lows <= bound[:, None])
        assert few[last == step].all()
        found[:, step] = few.sum(axis=1)
    return found, lost


def measure(given, policy, layer):
    """One line of the report."""
    logits, columns, rule, how = given
    how = {k: v for k, v in how.items() if k != "at_eviction"}
    last = np.array(scan_on_cpu(logits, columns, rule, **how).last)
    before = taken_before(logits, columns, rule, how, last)
    line = {"policy": policy, "layer": layer, "threadgroups": len(last)}
    line["before"] = {"loads": before[0], "exponentials": before[1]}
    for rows in (32, 64, 128):
        loads, exponentials, victims = counted(logits, columns, rule, how, rows)
        assert np.array_equal(victims, last), (policy, layer, rows)
        found, lost = candidates(logits, columns, rule, last, rows)
        few = {"candidates": found.mean(), "most_candidates": int(found.max())}
        line[f"{rows} rows"] = {
            "loads": loads,
            "exponentials": exponentials,
            **few,
            "rows_lost": int(lost.sum()),
        }
    return line


def summary(lines):
    """Per policy and number of rows: the means, and what they are of those before."""
    means = {}
    for policy in POLICIES:
        own = [line for line in lines if line["policy"] == policy]
        before = own[0]["before"]
        for rows in (key for key in own[0] if key.endswith("rows")):
            what = {k: np.mean([line[rows][k] for line in own]) for k in own[0][rows]}
            what["most_candidates"] = max(ln[rows]["most_candidates"] for ln in own)
            for kind in ("loads", "exponentials"):
                what[f"{kind}_of_before"] = what[kind] / before[kind]
            what["both_of_before"] = (what["loads"] + what["exponentials"]) / sum(
                before.values()
            )
            means[f"{policy}, {rows}"] = what
    return means


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=demo_model_path())
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # Their own package, which a user of tova_mlx does not have.
    sys.path.insert(0, str(ROOT / "tests"))
    model, tokenizer, _ = load(str(args.model))
    if not mx.metal.is_available():
        model.set_dtype(mx.float32)
    ids = repeated_ids(tokenizer, EXCERPT, LIMIT + 2 * LENGTH)
    lines = []
    for policy in POLICIES:
        given = scans(model, ids, policy)
        layers = np.linspace(0, len(given) - 1, args.layers).astype(int).tolist()
        lines += [measure(given[layer], policy, layer) for layer in layers]
    means = rounded(summary(lines))
    for name, what in means.items():
        print(
            f"{name:16} {what['loads']:7.0f} loads ({what['loads_of_before']:.3f}), "
            f"{what['exponentials']:6.0f} exponentials "
            f"({what['exponentials_of_before']:.3f}), both {what['both_of_before']:.3f}"
            f", {what['candidates']:.1f} candidates (at most {what['most_candidates']})"
        )
    report = {**provenance(), "model": args.model.name, "held": LIMIT}
    report |= {"block": LENGTH, "rows_at_once": scan_kernels.ROWS}
    finish({**report, "mean": means, "layers": rounded(lines)}, args.out)


if __name__ == "__main__":
    main()
