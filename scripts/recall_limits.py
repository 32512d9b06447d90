"""What recall costs in perplexity on a text, and which part of it does.

    python scripts/recall_limits.py TEXT [--model PATH] [--tokens 1400] [--out FILE]

A policy with recall, against as many slots without it and against the full cache, on
the same tokens: as it is; with an archive that is not quantised; where what is evicted
waits for the archive less long; and both. The last line is JSON.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, provenance, read_losses

from tova_mlx import make_prompt_cache
from tova_mlx.cli.models import load
from tova_mlx.storage.formats import storage_for

SLOTS, STEP = 64, 256


def changed(caches: list[Any], *, plain: bool = False, period: int = 0) -> list[Any]:
    """Let new caches archive rows as they come, or every so many tokens."""
    for cache in caches:
        known = cache.slots.recall
        storage = storage_for(None, 64) if plain else known.archive.storage
        cache.slots.recall = replace(
            known,
            archive=replace(known.archive, storage=storage),
            period=period or known.period,
        )
    return caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=1400)
    parser.add_argument("--max-kv-size", type=int, default=256)
    parser.add_argument("--policy", default="fade")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer, path = load(args.model)
    text = args.text.read_text(encoding="utf-8")[: 16 * args.tokens]
    ids = tokenizer.encode(text)[: args.tokens]

    def caches(policy: str = args.policy, slots: int = SLOTS) -> list[Any]:
        options = {"policy": policy, "recall": slots, "journal": 0}
        return make_prompt_cache(model, args.max_kv_size, **options)

    full = read_losses(model, ids, caches("full", 0), STEP)
    report: dict[str, Any] = {
        **provenance(),
        "model": Path(path).name,
        "text": args.text.stem,
        "policy": args.policy,
        "max_kv_size": args.max_kv_size,
        "recall": SLOTS,
        "perplexity_full": math.exp(full.mean()),
        "change_from_full": {},
    }

    def measure(name: str, new: list[Any]) -> None:
        changes = read_losses(model, ids, new, STEP) - full
        change = 100 * math.expm1(changes.mean())
        error = 100 * float(np.std(changes)) / math.sqrt(len(changes))
        report["change_from_full"][name] = {"percent": change, "stderr": error}
        print(f"{name:24} {change:+.2f} ± {error:.2f} %", flush=True)

    measure("without recall", caches(slots=0))
    measure("as it is", caches())
    measure("archive unquantised", changed(caches(), plain=True))
    measure("archived every 16 tokens", changed(caches(), period=16))
    both = changed(caches(), plain=True, period=16)
    measure("both", both)
    finish(report, args.out)


if __name__ == "__main__":
    main()
