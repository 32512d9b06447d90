"""Prints the documentation's quality tables from results/; --write puts them there.

python scripts/quality_table.py [--write]
"""

import json
import sys
from pathlib import Path

from common import write_block

from tova_mlx import POLICIES
from tova_mlx.cli.evaluation.figures import percent, pm

_TO_FULL = ("ratio_to_full", "ratio_to_full_stderr")
RESULTS = Path(__file__).parents[1] / "results"


def quality() -> str:
    """Markdown: perplexity ± standard error, and the change against full."""
    rows = _rows("quality.jsonl")
    found = {(r["text"], r["max_kv_size"], r["policy"]): r for r in rows}
    policies = [p for p in POLICIES if any(key[2] == p for key in found)]
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


def bits() -> str:
    """Markdown: what fewer bits change for the same policy, on each model and text."""
    rows = _of_models("bits")
    found: dict[tuple, dict] = {}
    for row in rows:
        if row["max_kv_size"] is not None:
            line = found.setdefault((row["model"], row["text"], row["policy"]), {})
            line[tuple(row["kv_bits"]) if "kv_bits" in row else None] = row
    storages = list(dict.fromkeys(s for line in found.values() for s in line if s))
    heads = [",".join(map(str, storage)) for storage in storages]
    lines = ["| model, text | policy | as they come | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for (model, text, policy), line in found.items():
        cells = [
            _change(line[s], "ratio_to_plain", "ratio_to_plain_stderr")
            for s in storages
        ]
        plain = pm(line[None]["value"], line[None]["stderr"], 2)
        lines.append(
            f"| {model.split('-')[0]}, {text.replace('_', ' ')} | `{policy}` | {plain} "
            "| " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def by_bytes() -> str:
    """Markdown: the change against full at shares of its bytes, with fewer bits."""
    found: dict[tuple, dict] = {}
    for row in _of_models("bytes"):
        if row["max_kv_size"] is None:
            full = row["cache_bytes"]
            continue
        share = round(full / row["cache_bytes"])
        line = found.setdefault((row["model"], row["policy"], share), {})
        line[",".join(map(str, row.get("kv_bits", ["as they come"])))] = row
    heads = list(dict.fromkeys(name for line in found.values() for name in line))
    lines = ["| model, policy | bytes | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(heads) + 2) + "|")
    for (model, policy, share), line in found.items():
        best = min(line, key=lambda name: line[name]["value"])
        cells = []
        for name in heads:
            mark = "**" if name == best else ""
            changed = _change(line[name], *_TO_FULL)
            cells.append(f"{mark}{changed}{mark}, {line[name]['max_kv_size']} tokens")
        lines.append(
            f"| {model.split('-')[0]}, `{policy}` | 1/{share} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def _of_models(name: str) -> list[dict]:
    """The rows of all models that have a directory of their own."""
    paths = sorted((RESULTS / name).glob("*/results.jsonl"))
    return [row for path in paths for row in _rows(str(path.relative_to(RESULTS)))]


def perplexity() -> str:
    """Markdown: by policy and size, against full; and against tova, with 95 %."""
    rows = _rows("perplexity/results.jsonl")
    sizes = sorted({r["max_kv_size"] for r in rows if r["max_kv_size"]})
    found = {(r["policy"], r["max_kv_size"]): r for r in rows}
    full = found["full", None]
    head = [f"`{full['text']}`, full {pm(full['value'], full['stderr'], 2)}"]
    lines = ["| " + " | ".join(head + [str(s) for s in sizes]) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    policies = [p for p in POLICIES if any((p, s) in found for s in sizes)]
    for policy in policies:
        cells = [
            _change(found[policy, s], *_TO_FULL) if (policy, s) in found else ""
            for s in sizes
        ]
        lines.append(f"| `{policy}` | " + " | ".join(cells) + " |")
    for policy in policies:
        if policy == "tova":
            continue
        cells = [_interval(found.get((policy, s))) for s in sizes]
        lines.append(f"| `{policy}` to `tova` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short() -> str:
    """Markdown: a few lines of `perplexity`, for the README."""
    wanted = ("streaming", "h2o", "tova", "fade")
    rows = _rows("perplexity/results.jsonl")
    found = {(r["policy"], r["max_kv_size"]): r for r in rows}
    sizes = (64, 128, 256, 512)
    lines = ["| | " + " | ".join(map(str, sizes)) + " |", "|---" * 5 + "|"]
    for policy in wanted:
        cells = [_change(found[policy, s], *_TO_FULL) for s in sizes]
        lines.append(f"| `{policy}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recall() -> str:
    """Markdown: perplexity with recall and without, at as many slots."""
    rows = [
        row
        for path in sorted(
            (RESULTS / "recall").glob("**/perplexity/*.jsonl"), key=_order
        )
        for row in _rows(str(path.relative_to(RESULTS)))
    ]
    found: dict[tuple, dict] = {}
    for row in rows:
        line = found.setdefault((row["model"], row["text"]), {})
        line[row["policy"], row["max_kv_size"], row.get("recall")] = row
    lines = ["| model, text, full | policy | without | with recall | change |"]
    lines.append("|---" * 5 + "|")
    for (model, text), line in found.items():
        full = line["full", None, None]
        where = f"{model.split('-')[0]}, {text.replace('_', ' ')}, "
        where += pm(full["value"], full["stderr"], 2)
        for (policy, size, slots), row in line.items():
            if slots is None:
                continue
            without = line[policy, size, None]
            names = ("ratio_to_no_recall", "ratio_to_no_recall_stderr")
            lines.append(
                f"| {where} | `{policy}` {size} "
                f"| {pm(without['value'], without['stderr'], 2)} "
                f"| {size - slots} + {slots}: {pm(row['value'], row['stderr'], 2)} "
                f"| {_change(row, *names)} |"
            )
    return "\n".join(lines)


def _order(path: Path) -> tuple[int, str]:
    """The demo model first."""
    return len(path.parts), str(path)


def recalled() -> str:
    """Markdown: facts found with recall and without."""
    return needle("recall/needle/results.jsonl")


def recalled_later() -> str:
    """Markdown: the same in four times the text."""
    return needle("recall/needle_4096/results.jsonl")


def recalled_last() -> str:
    """Markdown: the same in eight times the text."""
    return needle("recall/needle_8000/results.jsonl")


def limits() -> str:
    """Markdown: what recall costs, one thing replaced at a time."""
    report = json.loads((RESULTS / "recall" / "limits.json").read_text())
    size, slots = report["max_kv_size"], report["recall"]
    what = f"{report['model'].split('-')[0]}, `{report['policy']}` {size - slots}"
    lines = [f"| {what} + {slots} | change |", "|---|---|"]
    for name, change in report["change_from_full"].items():
        lines.append(
            f"| {name} | {pm(change['percent'], change['stderr'], 1, '+')} % |"
        )
    return "\n".join(lines)


def recalled_qwen() -> str:
    """Markdown: the same by Qwen2.5."""
    return needle("recall/Qwen2.5-Coder-0.5B-Instruct/needle/results.jsonl")


def needle(name: str = "needle/results.jsonl") -> str:
    """Markdown: hits and log-probabilities of all cells, by policy and size."""
    from tova_mlx.evaluation.needle import summary

    lines = [
        "| policy, size | kind | accuracy, 95 % | log-probability | cases |",
        "|---|---|---|---|---|",
    ]
    for row in summary(_rows(name)):
        low, high = row["interval"]
        mean, error = (
            row[f"mean_log_probability{suffix}"] for suffix in ("", "_stderr")
        )
        slots = f", recall {row['recall']}" if row.get("recall") else ""
        lines.append(
            f"| `{row['policy']}` {row['max_kv_size'] or ''}{slots} | {row['kind']} "
            f"| {row['value']:.2f}, {low:.2f} to {high:.2f} "
            f"| {pm(mean, error, 2)} | {row['n']} |"
        )
    return "\n".join(lines)


def longrange() -> str:
    """Markdown: scores in percent, and the difference to full on the same questions."""
    lines = ["| policy, size | task | score | to `full` |", "|---" * 4 + "|"]
    for row in _rows("longrange/results.jsonl"):
        change = ""
        if "minus_full" in row:
            change = pm(100 * row["minus_full"], 100 * row["minus_full_stderr"], 1, "+")
        lines.append(
            f"| `{row['policy']}` {row['max_kv_size'] or ''} "
            f"| {row['task']}, {row['unit']} "
            f"| {pm(100 * row['value'], 100 * row['stderr'], 1)} | {change} |"
        )
    return "\n".join(lines)


def kept() -> str:
    """Markdown: means over layers of what is kept, by policy and size."""
    from tova_mlx.evaluation.kept import relative
    from tova_mlx.evaluation.kinds import ENOUGH

    groups: dict[tuple, list[dict]] = {}
    for row in _rows("kept/results.jsonl"):
        if row["max_kv_size"] is not None:
            groups.setdefault((row["policy"], row["max_kv_size"]), []).append(row)
    counts = next(iter(groups.values()))[0]["counts"]
    kinds = [kind for kind, n in counts.items() if n >= ENOUGH]
    heads = [f"{kind} ({counts[kind]})" for kind in kinds]
    lines = [
        "| policy, size | recent | first token stays | " + " | ".join(heads) + " |",
        "|---" * (len(kinds) + 3) + "|",
    ]
    for (policy, size), rows in groups.items():
        ratios = relative([row["lifetimes"] for row in rows])
        recent = sum(row["value"] for row in rows) / len(rows)
        first = sum(row["first_tokens_stay"][0] for row in rows) / len(rows)
        cells = [f"{ratios[kind]:.2f}" for kind in kinds]
        lines.append(
            f"| `{policy}` {size} | {recent:.0%} | {first:.0%} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def _interval(row: dict | None) -> str:
    """The change against tova, paired token by token: its 95 % interval."""
    if row is None or row.get("ratio_to_tova") is None:
        return ""
    middle = 100 * (row["ratio_to_tova"] - 1)
    half = 1.96 * 100 * row["ratio_to_tova_stderr"]
    return f"{middle - half:+.1f} to {middle + half:+.1f} %"


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def _cell(row: dict) -> str:
    value = pm(row["value"], row["stderr"], 2)
    if row["policy"] == "full":
        return value
    return f"{value} ({_change(row, 'ratio_to_full')})"


def _change(row: dict, ratio: str, error: str = "ratio_stderr") -> str:
    return percent(row[ratio], row[error])


TABLES = {
    "short": short,
    "quality": quality,
    "bits": bits,
    "bytes": by_bytes,
    "perplexity": perplexity,
    "needle": needle,
    "recall": recall,
    "recalled": recalled,
    "recalled-qwen": recalled_qwen,
    "recalled-later": recalled_later,
    "recalled-last": recalled_last,
    "limits": limits,
    "longrange": longrange,
    "kept": kept,
}

if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"<!-- {name} -->\n{make()}\n<!-- /{name} -->")
        if "--write" in sys.argv[1:]:
            write_block(name, make())
