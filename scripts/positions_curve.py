"""Perplexity over a text far longer than a model was trained for, by positions.

    python scripts/positions_curve.py TEXT [--tokens 61440] [--out results/positions]

The demo model reads the text under one policy, exact token by token, with original and
with automatic positions; one figure per 2,048 tokens. Some pages of a novel are harder
than others, so there is a third line: each stretch read by a new cache that has seen
only the 2,048 tokens before it. The ratio to that one is what positions cost. Written:
a row per stretch, and a figure. The last line is JSON; exit 1 if automatic positions
cost more than a tenth more than in the first 8,192 tokens anywhere.
"""

import argparse
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import load_demo_model, provenance, read_losses

from tova_mlx import make_prompt_cache
from tova_mlx.evaluation.plots import new_figure, save
from tova_mlx.models.rotary import trained_range

STRETCH, STEP = 2048, 512
FIRST, WITHIN = 8192, 1.1
LINES = {"original": "#D55E00", "auto": "#0072B2", "fresh": "#999999"}


def line(name: str, ids: list[int], how: dict[str, Any]) -> list[float]:
    """The perplexity of each stretch, for one line of the figure."""
    model, _ = load_demo_model()
    starts = range(0, len(ids) - 1, STRETCH)
    if name != "fresh":
        caches = make_prompt_cache(model, positions=name, **how)
        found = read_losses(model, ids, caches, STEP)
        parts = [found[i : i + STRETCH] for i in starts]
    else:
        parts = []
        for i in starts:
            some = ids[max(0, i - STRETCH) : i + STRETCH + 1]
            caches = make_prompt_cache(model, **how)
            found = read_losses(model, some, caches, STEP)
            parts.append(found[-STRETCH:])
    return [math.exp(sum(p) / len(p)) for p in parts]


def draw(rows: list[dict[str, Any]], trained: int | None, path: Path) -> None:
    """Both curves, and what they cost beside a new cache."""
    figure, axes = new_figure(7, 6, nrows=2, sharex=True)
    ends = [row["tokens"] for row in rows]
    for name, colour in LINES.items():
        style = {"color": colour, "label": name, "marker": ".", "linewidth": 1.5}
        axes[0].plot(ends, [row[name] for row in rows], **style)
        if name != "fresh":
            ratios = [row[name] / row["fresh"] for row in rows]
            axes[1].plot(ends, ratios, **style)
    axes[0].set_ylabel("perplexity of 2,048 tokens")
    axes[1].set_ylabel("times that of a new cache")
    axes[1].set_xlabel("tokens read")
    axes[1].axhline(1, color="#999999", linewidth=1)
    for ax in axes:
        if trained is not None:
            ax.axvline(trained, color="#999999", linestyle=":")
        ax.legend(frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=61440)
    parser.add_argument("--max-kv-size", type=int, default=512)
    parser.add_argument("--policy", default="tova")
    parser.add_argument("--jobs", type=int, default=1, help="lines at once")
    parser.add_argument("--out", type=Path, default=Path("results/positions"))
    args = parser.parse_args()
    model, tokenizer = load_demo_model()
    trained = trained_range(model)
    del model
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))[: args.tokens + 1]
    if len(ids) <= args.tokens:
        sys.exit(f"{args.text}: {len(ids)} tokens are too few for {args.tokens}.")

    how = {"max_kv_size": args.max_kv_size, "policy": args.policy}
    rows = [{"tokens": n + STRETCH} for n in range(0, args.tokens, STRETCH)]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        running = {name: pool.submit(line, name, ids, how) for name in LINES}
        for name, future in running.items():
            for row, perplexity in zip(rows, future.result(), strict=True):
                row[name] = perplexity
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    (args.out / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(rows, trained, args.out / "positions.png")

    def costs(name: str, first: bool) -> list[float]:
        some = [r for r in rows if (r["tokens"] <= FIRST) == first]
        return [r[name] / r["fresh"] for r in some]

    report: dict[str, Any] = {"policy": args.policy, "max_kv_size": args.max_kv_size}
    for name in ("original", "auto"):
        at_first = sum(costs(name, True)) / len(costs(name, True))
        report[name] = {
            "cost_in_first_8192": at_first,
            "most_times_that_later": max(costs(name, False), default=0) / at_first,
        }
    report |= {"tokens": args.tokens, "text": args.text.name, **provenance()}
    (args.out / "summary.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(json.dumps(report))
    sys.exit(report["auto"]["most_times_that_later"] > WITHIN)


if __name__ == "__main__":
    main()
