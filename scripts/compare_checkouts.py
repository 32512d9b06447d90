"""Two checkouts side by side: the same tokens and positions, and which is faster.

    git worktree add /tmp/before REVISION
    python scripts/compare_checkouts.py /tmp/before [--out results/checkouts.json]

For every policy, and with options that take other ways through the code, both
checkouts read `--read` tokens of the excerpt with a limit of 128 and generate
`--generate` greedily with the demo model; the tokens, and the positions held in every
layer, must be equal to the last one. Then both take turns, chunk by chunk and token by
token, in reading 2,560 tokens and decoding 80 with a limit of 512: medians of the
ratios. Each checkout runs in a process of
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
from typing import Any

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
TIMED_LIMIT, TIMED_READ, TIMED_DECODED = 512, 2560, 80


def work() -> None:
    """In a checkout's process: answer each line of standard input with one."""
    # Before the folders, the module was at the top.
    for name in ("tova_mlx.hooks.blas", "tova_mlx.blas"):
        try:
            importlib.import_module(name).load_openblas()
            break
        except ModuleNotFoundError:
            continue
    import mlx.core as mx
    from mlx_lm import load

    import tova_mlx

    if not Path(tova_mlx.__file__).is_relative_to(sys.argv[3]):
        raise SystemExit(f"{tova_mlx.__file__} is not of the checkout {sys.argv[3]}.")
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

    running = []

    def start(case):
        running[:] = tova_mlx.make_prompt_cache(model, TIMED_LIMIT, **case)

    def timed(case, first, stop):
        began = time.perf_counter()
        # The text is shorter than what is read: it begins again.
        chunk = [ids[i % len(ids)] for i in range(first, stop)]
        logits = model(mx.array([chunk]), cache=running)
        mx.eval([logits, *(c.state for c in running)])
        return time.perf_counter() - began

    for line in sys.stdin:
        what, case, *rest = json.loads(line)
        if isinstance(case.get("kv_bits"), list):
            case["kv_bits"] = tuple(case["kv_bits"])
        answer = {"same": same, "start": start, "timed": timed}[what](case, *rest)
        print(json.dumps(answer), flush=True)


class Checkout:
    """A process that runs one checkout's package."""

    def __init__(self, root: Path, model: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", model, str(root)],
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str, case: dict, *lengths: int) -> Any:
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
    """Time after / time before: of chunks and of decoded tokens, in turns.

    Medians, and the quartiles.
    """
    rows = []
    chunks = [(n, n + CHUNK) for n in range(0, TIMED_READ, CHUNK)]
    steps = [(n, n + 1) for n in range(TIMED_READ, TIMED_READ + TIMED_DECODED)]
    for case in TIMED:
        ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
        for _ in range(repeats):
            for checkout in (before, after):
                checkout.ask("start", case)
            for what, spans in (("prefill", chunks), ("decode", steps)):
                for i, span in enumerate(spans):
                    pair = [before, after][:: 1 if i % 2 else -1]
                    times = {c: c.ask("timed", case, *span) for c in pair}
                    # The first ones evict nothing, or are the warm-up.
                    if i > 2:
                        ratios[what].append(times[after] / times[before])
        row: dict = {"case": name(case)}
        for what, found in ratios.items():
            low, middle, high = statistics.quantiles(found)
            row[what] = round(middle, 3)
            row[f"{what}_quartiles"] = [round(low, 3), round(high, 3)]
            row[f"{what}_n"] = len(found)
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
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-race", action="store_true", help="compare only")
    parser.add_argument("--only-race", action="store_true", help="keep what --out says")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from common import finish, provenance

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
    roots = args.before.resolve(), ROOT
    checkouts = [Checkout(root, str(demo_model_path())) for root in roots]
    if args.only_race:
        result = json.loads(args.out.read_text(encoding="utf-8"))
    else:
        result["same"] = compare(*checkouts, [args.read, args.generate])
    if not args.no_race:
        result["ratios"] = race(*checkouts, args.repeats)
    for checkout in checkouts:
        checkout.process.kill()
    finish(result, args.out)
    return int(
        any(r["layers_that_differ"] or not r["same_tokens"] for r in result["same"])
    )


if __name__ == "__main__":
    sys.exit(main())
