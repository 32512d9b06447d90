"""Draws the pictures of README and docs from committed results, for light and dark.

    python scripts/pictures.py [NAME …]

Each is docs/images/NAME-light.png and NAME-dark.png. Needs the extra `eval`. The two of
`inspect` are pictures of a page, see scripts/bench_inspect.py.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import positions_curve

from tova_mlx.benchmark import report
from tova_mlx.evaluation import needle, perplexity
from tova_mlx.evaluation.plots import on_dark

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
Draw = Callable[[list[dict[str, Any]], Path], Any]


def positions(rows: list[dict[str, Any]], path: Path) -> None:
    # SmolLM2's range.
    positions_curve.draw(rows, 8192, path)


# Where the rows are, and what draws them.
PICTURES: dict[str, tuple[str, Draw]] = {
    "perplexity": ("perplexity/results.jsonl", perplexity.plot),
    "bytes": ("bytes/SmolLM2-135M-Instruct/results.jsonl", perplexity.plot),
    "positions": ("positions/rows.jsonl", positions),
    "positions-streaming": ("positions/streaming/rows.jsonl", positions),
    "recall": ("recall/needle/results.jsonl", needle.plot),
    "bench": ("bench/results.jsonl", report.plot),
}


def main(names: list[str]) -> None:
    IMAGES.mkdir(exist_ok=True)
    for name in names or PICTURES:
        place, draw = PICTURES[name]
        text = (ROOT / "results" / place).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        for theme, page in (("light", nullcontext()), ("dark", on_dark())):
            path = IMAGES / f"{name}-{theme}.png"
            with page:
                draw(rows, path)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
