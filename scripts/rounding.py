"""What limits 8-bit slots: how much of their cost is which token is evicted.

    python scripts/rounding.py TEXT --model PATH [--policy fade] [--out FILE]

The first 4,096 tokens of a text, 512 held: the change of perplexity against slots that
are stored as they come, when they are stored in 8 bits (read in steps of several sizes,
which rounds elsewhere), and when they are rounded to bfloat16 or float16 and nothing
else, as models in half precision do. Errors are of the paired mean, in blocks of 64
tokens. The last line is JSON.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import finish, provenance, read_losses

from tova_mlx import make_prompt_cache
from tova_mlx.cli.models import load
from tova_mlx.evaluation.statistics import mean_with_error
from tova_mlx.storage.formats import Storage

TOKENS, LIMIT, STEPS = 4096, 512, (128, 256, 512, 1024)


class Rounded(Storage):
    """Stores entries as they come, but with the digits of another type."""

    dtype = mx.bfloat16

    def store(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return tuple(a.astype(self.dtype).astype(a.dtype) for a in (keys, values))


class Half(Rounded):
    dtype = mx.float16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--policy", default="fade")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer, path = load(args.model)
    text = args.text.read_text(encoding="utf-8")[: 16 * TOKENS]
    ids = tokenizer.encode(text)[: TOKENS + 1]

    def measured(storage: Storage | None, step: int, **bits: Any) -> np.ndarray:
        caches = make_prompt_cache(model, LIMIT, policy=args.policy, journal=0, **bits)
        for cache in caches if storage is not None else ():
            cache.slots.storage = storage
        return read_losses(model, ids, caches, step)

    plain = measured(None, 512)
    rows = []
    cases = [(f"8 bits, steps of {n}", None, n, {"kv_bits": 8}) for n in STEPS]
    cases += [
        ("rounded to bfloat16", Rounded(), 512, {}),
        ("rounded to float16", Half(), 512, {}),
    ]
    for name, storage, step, bits in cases:
        mean, error = mean_with_error(measured(storage, step, **bits) - plain)
        percent = 100 * (math.exp(mean) - 1)
        rows.append({"name": name, "percent": percent, "stderr": 100 * error})
        print(rows[-1], flush=True)
    report = {
        **provenance(),
        "model": Path(path).name,
        "text": args.text.stem,
        "policy": args.policy,
        "max_kv_size": LIMIT,
        "tokens": TOKENS,
        "rows": rows,
    }
    finish(report, args.out)


if __name__ == "__main__":
    main()
