"""The same chapter read with all of its tokens held, with 256, and with recall.

    python scripts/demo.py [--policy fade] [--max-kv-size 256]

Prints how the model goes on in each case, what it answers when asked for a number that
was said once, near the beginning, and what reading took in seconds and bytes. Needs the
demo model, see scripts/prepare_demo_model.py.
"""

import argparse
import copy
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from common import load_demo_model
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from tova_mlx import describe, make_prompt_cache
from tova_mlx.progress import Bar
from tova_mlx.tables import table

CHAPTER = Path(__file__).parent / "the_chase.txt"
# A sentence of ours, and the paragraph after which it stands.
SAID, AFTER = "“The number of the cabin is 48213,” said Starbuck.", 2
QUESTION = (
    "\n\nQuestion: What is the number of the cabin?\nAnswer: The number of the cabin is"
)
OPENING = "\n\n“Captain Ahab,” said Starbuck, “"
STEP, RECALL = 256, 64


class Reading(NamedTuple):
    """What a chapter came to in a cache."""

    name: str
    seconds: float
    totals: dict[str, Any]
    text: str
    answer: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="fade")
    parser.add_argument("--max-kv-size", type=int, default=256)
    args = parser.parse_args()
    size = args.max_kv_size
    model, tokenizer = load_demo_model()
    paragraphs = CHAPTER.read_text(encoding="utf-8").strip().split("\n\n")
    paragraphs.insert(AFTER + 1, SAID)
    tokens = tokenizer.encode("\n\n".join(paragraphs))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("full cache", {"policy": "full"}),
        (f"{size} tokens", {"policy": args.policy}),
        (f"{size}, {RECALL} recall", {"policy": args.policy, "recall": RECALL}),
    ]
    print(INTRO.format(n=len(tokens), size=size, policy=args.policy, said=SAID))
    sys.stdout.flush()
    readings = []
    for name, options in cases:
        readings.append(read(model, tokenizer, tokens, name, size, options))
        show(readings[-1])
    print(summary(readings))
    print(NEXT.format(size=size))


def read(
    model: Any,
    tokenizer: Any,
    tokens: list[int],
    name: str,
    size: int,
    options: dict[str, Any],
) -> Reading:
    """Read the chapter into a new cache, and go on from two copies of it."""
    caches = make_prompt_cache(model, size, journal=0, **options)
    start_time = time.perf_counter()
    with Bar(len(tokens), f"Reading, {name}") as bar:
        for start in range(0, len(tokens), STEP):
            part = tokens[start : start + STEP]
            model(mx.array([part]), cache=caches)
            mx.eval([c.state for c in caches])
            bar.advance(len(part))
    seconds = time.perf_counter() - start_time

    def go_on(text: str, n: int, temp: float) -> str:
        mx.random.seed(1)
        pieces = stream_generate(
            model,
            tokenizer,
            tokenizer.encode(text),
            max_tokens=n,
            sampler=make_sampler(temp, 0.9),
            prompt_cache=copy.deepcopy(caches),
        )
        return "".join(piece.text for piece in pieces)

    text = OPENING + go_on(OPENING, 70, 0.7)
    answer = go_on(QUESTION, 7, 0.0).split(".")[0].split("\n")[0].strip()
    return Reading(name, seconds, describe(caches).totals, text, answer)


def show(reading: Reading) -> None:
    print(f"── {reading.name}")
    said = " ".join(reading.text.split())
    print(textwrap.fill(said, 80, initial_indent="   ", subsequent_indent="   "), "…")
    print(f"   Asked for the number of the cabin: {reading.answer}\n", flush=True)


def summary(readings: list[Reading]) -> str:
    """Seconds, tokens and bytes of each reading."""
    rows: list[tuple[object, ...]] = [
        ("", "read in", "tokens held", "cache", "archive", "the number")
    ]
    for r in readings:
        archive = r.totals["archive_bytes"]
        rows.append(
            (
                r.name,
                f"{r.seconds:.1f} s",
                f"{r.totals['tokens_held']:,}",
                f"{r.totals['bytes_now'] / 2**20:.1f} MiB",
                f"{archive / 2**20:.1f} MiB" if archive else "–",
                r.answer,
            )
        )
    return table(rows, "< > > > > <")


INTRO = """\
A model of 135 million parameters reads a chapter of Moby Dick ({n:,} tokens) three
times: with the full cache, with {size} tokens per layer (policy {policy}), and with
{size} and an archive of what they evict. Near the beginning of it we have put:
{said}
"""
NEXT = """
The cache of {size} tokens stays as it is however long the text; an archive grows, in
memory or on disk (--archive). Next:
  .venv/bin/tova-mlx chat --max-kv-size 1024 --recall 64       talk to it
  .venv/bin/tova-mlx bench                                     does it pay here?
  .venv/bin/tova-mlx inspect scripts/the_chase.txt --out page.html
                                                               see what is kept
  docs/guide.md and examples/ have the rest"""


if __name__ == "__main__":
    sys.exit(main())
