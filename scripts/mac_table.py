"""What was measured on a Mac, as Markdown.

    python scripts/mac_table.py FOLDER

Reads what .github/workflows/mac.yml leaves in a folder: `kernels.json` of
scripts/bench_kernels.py, `dispatches.json` of scripts/count_dispatches.py and
`bench/results.jsonl` of `tova-mlx bench`. What is not there is said not to be.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tova_mlx.benchmark.report import by_case, sentences

Row = dict[str, Any]


def table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table; the first column is text, the rest are figures."""
    marks = ["---", *["--:"] * (len(heads) - 1)]
    return [f"| {' | '.join(map(str, line))} |" for line in (heads, marks, *lines)]


def figure(value: object) -> str:
    """Three digits of a float; anything else as it is, nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def columns(rows: Sequence[Row]) -> list[str]:
    """The names of what is one figure or one word in all rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [
        name
        for name in names
        if not any(isinstance(row.get(name), (dict, list)) for row in rows)
    ]


def kernels(report: Row) -> list[str]:
    """The times of evictions, as a kernel and in the portable form."""
    heads = ["eviction", "policy", "tokens held", "portable ms", "kernel ms", "ratio"]
    lines = []
    for row in report["times"]:
        times = row["portable_ms"], row["metal_ms"]
        ratio = times[0] / times[1] if times[1] else None
        named = row["what"], row["policy"], row["max_kv_size"]
        lines.append([*named, *map(figure, (*times, ratio))])
    return table(heads, lines)


def dispatches(report: Row) -> list[str]:
    """What a step launches beyond mlx-lm's own cache; a column for each figure."""
    heads = columns(report["rows"])
    return table(heads, [[figure(r.get(h)) for h in heads] for r in report["rows"]])


def bench(rows: Sequence[Row]) -> list[str]:
    """Speed and memory of each setting at each length, and what they say."""
    heads = ["cache", "context", "prefill tokens/s", "decode ms", "× bound"]
    heads += ["peak MB", "caches MB"]
    lines = []
    for (setting, context), units in by_case(rows).items():

        def value(
            unit: str, per: float = 1, name: str = "value", units: Any = units
        ) -> str:
            return figure(units[unit][name] / per) if unit in units else ""

        speeds = value("prefill_tps"), value("decode_ms")
        bound = value("decode_ms", name="ratio_to_bound")
        sizes = value("peak_memory_bytes", 1e6), value("cache_bytes", 1e6)
        lines.append([setting, f"{context:,}", *speeds, bound, *sizes])
    return [*table(heads, lines), "", *sentences(rows)]


def machine(report: Row) -> str:
    """Where, with what and when a report was made."""
    info = report.get("metal") or {}
    words = [str(info.get("device_name", report["device"]))]
    if "memory_size" in info:
        words.append(f"{info['memory_size'] / 2**30:.0f} GiB")
    words += [f"{name} {number}" for name, number in report["versions"].items()]
    return ", ".join([*words, report["date"]])


PARTS = (
    ("An eviction", "kernels.json", kernels),
    ("Launches of a decode step, per layer", "dispatches.json", dispatches),
    ("tova-mlx bench", "bench/results.jsonl", bench),
)


def markdown(folder: Path) -> str:
    """All parts; the machine is named once under each."""
    lines = []
    for title, name, part in PARTS:
        lines += [f"### {title}", ""]
        try:
            text = (folder / name).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            text = ""
        # One report, or one row a line.
        found = [json.loads(line) for line in text.splitlines()]
        if not found:
            lines += [f"Not measured: there is no {name}.", ""]
            continue
        made = part(found) if name.endswith(".jsonl") else part(found[-1])
        lines += [*made, "", machine(found[-1]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    print(markdown(parser.parse_args().folder))


if __name__ == "__main__":
    main()
