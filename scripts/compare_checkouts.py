"""Two checkouts side by side: the same tokens and positions, and which is faster.

    git worktree add /tmp/before REVISION
    python scripts/compare_checkouts.py /tmp/before [--out results/checkouts.json]

For every policy, and with options that take other ways through the code, both
checkouts read `--read` tokens of the excerpt with a limit of 128 and generate
`--generate` greedily with the demo model; the tokens, and the positions held in every
layer, must be equal to the last one. Then both take turns in reading 1,024 tokens and
decoding with a limit of 512: medians of the ratios. Each checkout runs in a process of
its own, with the environment of this script. The last line is JSON; exit 1 if anything
differs.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXCERPT = Path(__file__).parent / "moby_dick_excerpt.txt"
LIMIT, CHUNK = 128, 256
POLICIES = "full", "window", "streaming", "h2o", "tova", "vatp", "fade", "keydiff"
CASES = [
    *({"policy": p} for p in POLICIES),
    *({"policy": p, "granularity": "head"} for p in ("tova", "fade")),
    *({"policy": p, "granularity": "layer"} for p in ("h2o", "keydiff")),
    *({"policy": p, "kv_bits": 8} for p in ("tova", "fade", "streaming", "keydiff")),
    {"policy": "tova", "kv_bits": (8, 4), "kv_group_size": 32},
    {"policy": "tova", "prefill": "once"},
    {"policy": "tova", "n_sinks": 4, "n_recent": 16},
]
TIMED = [{"policy": p} for p in ("tova", "fade", "h2o", "streaming", "keydiff")]
TIMED.append({"policy": "tova", "kv_bits": 8})
TIMED_LIMIT, TIMED_READ, TIMED_DECODED = 512, 1024, 24


def work() -> None:
    """In a checkout's process: answer each line of standard input with one."""
    for name in ("tova_mlx.hooks.blas", "tova_mlx.hooks.blas"):
        try:
            importlib.import_module(name).load_openblas()
            break
        except ModuleNotFoundError:
            continue
    import mlx.core as mx
    from mlx_lm import load

    import tova_mlx

    model, tokenizer = load(sys.argv[2])
    if not mx.metal.is_available():
        model.set_dtype(mx.float32)
    ids = tokenizer.encode(EXCERPT.read_text(encoding="utf-8"))

    def read(caches, n):
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            logits = model(mx.array([ids[start:stop]]), cache=caches)
            mx.eval([logits, *(c.state for c in caches)])
        return logits

    def same(case, length, generated):
        caches = tova_mlx.make_prompt_cache(model, LIMIT, **case)
        logits, tokens = read(caches, length), []
        for _ in range(generated):
            tokens.append(int(mx.argmax(logits[0, -1])))
            logits = model(mx.array([[tokens[-1]]]), cache=caches)
        return {"tokens": tokens, "positions": [c.positions.tolist() for c in caches]}

    def timed(case):
        caches = tova_mlx.make_prompt_cache(model, TIMED_LIMIT, **case)
        began = time.perf_counter()
        read(caches, TIMED_READ)
        prefill, steps = time.perf_counter() - began, []
        for token in ids[:TIMED_DECODED]:
            began = time.perf_counter()
            mx.eval(model(mx.array([[token]]), cache=caches))
            steps.append(time.perf_counter() - began)
        return {"prefill": prefill, "decode": statistics.median(steps)}

    for line in sys.stdin:
        what, case, *lengths = json.loads(line)
        if isinstance(case.get("kv_bits"), list):
            case["kv_bits"] = tuple(case["kv_bits"])
        print(
            json.dumps({"same": same, "timed": timed}[what](case, *lengths)), flush=True
        )


class Checkout:
    """A process that runs one checkout's package."""

    def __init__(self, root: Path, model: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", model],
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str, case: dict, *lengths: int) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([what, case, *lengths]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("A checkout's process ended; see its error above.")
        return json.loads(line)


def name(case: dict) -> str:
    options = [f"{k}={v}" for k, v in case.items() if k != "policy"]
    return " ".join([case["policy"], *options])


def compare(before: Checkout, after: Checkout, lengths: list[int]) -> list[dict]:
    """What differs, case by case."""
    rows = []
    for case in CASES:
        a, b = (c.ask("same", case, *lengths) for c in (before, after))
        pairs = zip(a["positions"], b["positions"], strict=True)
        rows.append(
            {
                "case": name(case),
                "same_tokens": a["tokens"] == b["tokens"],
                "layers_that_differ": sum(p != q for p, q in pairs),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def race(before: Checkout, after: Checkout, repeats: int) -> list[dict]:
    """Time after / time before, medians over the turns."""
    rows = []
    for case in TIMED:
        turns = []
        for i in range(repeats + 1):
            pair = [before, after]
            times = {c: c.ask("timed", case) for c in (pair if i % 2 else pair[::-1])}
            turns.append((times[before], times[after]))
        row: dict = {"case": name(case)}
        for what in ("prefill", "decode"):
            # The first turn is the warm-up.
            ratios = sorted(b[what] / a[what] for a, b in turns[1:])
            row[what] = round(statistics.median(ratios), 3)
            row[f"{what}_range"] = [round(ratios[0], 3), round(ratios[-1], 3)]
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        work()
        return 0
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="the other checkout's directory")
    parser.add_argument("--read", type=int, default=700)
    parser.add_argument("--generate", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-race", action="store_true", help="compare only")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from common import provenance

    from tova_mlx.models.demo import demo_model_path

    revision = ["git", "-C", str(args.before), "rev-parse", "--short", "HEAD"]
    result = {
        "read": args.read,
        "generated": args.generate,
        "before": subprocess.run(
            revision, capture_output=True, text=True
        ).stdout.strip(),
        **provenance(),
    }
    checkouts = [Checkout(root, str(demo_model_path())) for root in (args.before, ROOT)]
    result["same"] = compare(*checkouts, [args.read, args.generate])
    if not args.no_race:
        result["ratios"] = race(*checkouts, args.repeats)
    for checkout in checkouts:
        checkout.process.kill()
    line = json.dumps(result)
    if args.out:
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)
    return int(
        any(r["layers_that_differ"] or not r["same_tokens"] for r in result["same"])
    )


if __name__ == "__main__":
    sys.exit(main())
