"""Prints README's quality tables from results/; --write puts them there.

python scripts/quality_table.py [--write]
"""

import json
import sys
from pathlib import Path

from common import write_block

RESULTS = Path(__file__).parents[1] / "results"
ORDER = ("full", "window", "streaming", "h2o", "tova", "vatp", "fade")


def quality() -> str:
    """Markdown: perplexity ± standard error, and the change against full."""
    rows = _rows("quality.jsonl")
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


def packed() -> str:
    """Markdown: the change that quantised slots make to the same policy."""
    rows = _rows("quality_packed.jsonl")
    found = {}
    for row in rows:
        keys, values = row["kv_bits"]
        bits = f"{keys}" if keys == values else f"{keys}, {values}"
        kept = f"{bits} bits, groups of {row['kv_group_size']}"
        found.setdefault(kept, {})[row["policy"], row["text"]] = row
    heads = sorted({key for cells in found.values() for key in cells}, reverse=True)
    names = [f"`{policy}`, {text.replace('_', ' ')}" for policy, text in heads]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(heads) + 1) + "|"]
    for kept, cells in found.items():
        changes = [_change(cells[key], "ratio_to_plain") for key in heads]
        lines.append(f"| {kept} | " + " | ".join(changes) + " |")
    return "\n".join(lines)


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def _cell(row: dict) -> str:
    value = f"{row['value']:.2f} ± {row['stderr']:.2f}"
    if row["policy"] == "full":
        return value
    return f"{value} ({_change(row, 'ratio_to_full')})"


def _change(row: dict, ratio: str) -> str:
    return f"{100 * (row[ratio] - 1):+.1f} ± {100 * row['ratio_stderr']:.1f} %"


TABLES = {"quality": quality, "packed": packed}

if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"<!-- {name} -->\n{make()}\n<!-- /{name} -->")
        if "--write" in sys.argv[1:]:
            write_block(name, make())
