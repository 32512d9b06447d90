"""Budgets in bytes against what caches take: every policy, every kind of bits.

    python scripts/check_budgets.py [--read 4096] [--out results/budgets.json]

A random model of two layers and the demo model's heads reads a text that is longer
than any of the limits; then the bytes of all its caches, journals included, are
compared with the budget. Ends with 1 if one is above its budget or leaves a tenth of
it. The last line is JSON.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import mlx.core as mx
from common import provenance
from mlx_lm.models import llama

from tova_mlx import POLICIES, OptionError, make_prompt_cache
from tova_mlx.models.budget import parse_size

BITS = [None, 8, 6, 5, 4, (4, 4)]
# From a few dozen tokens to a third of the text.
BUDGETS = [f"{n}{unit}" for n in (150, 250, 400, 700, 1000) for unit in ("kB", "KiB")]
STEP = 1024


def make_model() -> llama.Model:
    """A model of random weights, in float32."""
    mx.random.seed(0)
    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 101,
    }
    return llama.Model(llama.ModelArgs.from_dict(shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = make_model()
    tokens = mx.random.randint(0, 101, (1, args.read))
    rows = []
    policies = [p for p in POLICIES if p != "full"]
    for policy, bits, budget in itertools.product(policies, BITS, BUDGETS):
        row = {"policy": policy, "kv_bits": bits, "budget": budget}
        try:
            caches = make_prompt_cache(model, budget, policy=policy, kv_bits=bits)
        except OptionError as error:
            rows.append({**row, "refused": str(error)})
            continue
        for start in range(0, args.read, STEP):
            mx.eval(model(tokens[:, start : start + STEP], cache=caches))
        for token in tokens[0, :20]:
            mx.eval(model(token[None, None], cache=caches))
        share = sum(c.nbytes for c in caches) / parse_size(budget).nbytes
        rows.append({**row, "tokens": caches[0].rule.max_size, "share": share})
        print(json.dumps(rows[-1]), flush=True)
    shares = [row["share"] for row in rows if "share" in row]
    report = {
        "runs": len(shares),
        "refused": len(rows) - len(shares),
        "least": min(shares),
        "most": max(shares),
        "read": args.read,
        **provenance(),
        "rows": rows,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    del report["rows"]
    print(json.dumps(report))
    sys.exit(not 0.9 < min(shares) <= max(shares) <= 1)


if __name__ == "__main__":
    main()
