"""Prints README's quality table from results/quality.jsonl; --write puts it there.

python scripts/quality_table.py [--write]
"""

import json
import sys
from pathlib import Path

from common import write_block

RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"
ORDER = ("full", "window", "streaming", "h2o", "tova", "vatp", "fade")


def table(path: Path = RESULTS) -> str:
    """Markdown: perplexity ± standard error, and the change against full."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(r["text"], r["max_kv_size"], r["policy"]): r for r in rows}
    policies = [p for p in ORDER if any(key[2] == p for key in found)]
    lines = [
        "| text, limit | " + " | ".join(f"`{p}`" for p in policies) + " |",
        "|---" * (len(policies) + 1) + "|",
    ]
    for text, size in sorted({key[:2] for key in found}):
        cells = [f"{text.replace('_', ' ')}, {size}"]
        for policy in policies:
            row = found.get((text, size, policy))
            cells.append("" if row is None else _cell(row))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict) -> str:
    value = f"{row['value']:.2f} ± {row['stderr']:.2f}"
    if row["policy"] == "full":
        return value
    change = 100 * (row["ratio_to_full"] - 1)
    return f"{value} ({change:+.1f} ± {100 * row['ratio_stderr']:.1f} %)"


if __name__ == "__main__":
    print(table())
    if "--write" in sys.argv[1:]:
        write_block("quality", table())
