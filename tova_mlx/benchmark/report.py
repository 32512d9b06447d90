"""What a benchmark's rows say: a table, a few sentences, a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.plots import legend_below, line_of, new_figure, save, styles
from ..evaluation.results import Setting
from ..tables import table as text_table
from .baselines import FULL, ROTATING

Row = dict[str, Any]
# A setting and a context length; the rows by unit.
Case = tuple[Setting, int]
_MB = 1e6


def by_case(rows: Sequence[Row]) -> dict[Case, dict[str, Row]]:
    """The rows of each case by their units, settings in order, then lengths."""
    settings = dict.fromkeys(Setting.of(row) for row in rows)
    contexts = sorted({row["context"] for row in rows})
    found: dict[Case, dict[str, Row]] = {(s, c): {} for s in settings for c in contexts}
    for row in rows:
        found[Setting.of(row), row["context"]][row["unit"]] = row
    return {case: units for case, units in found.items() if units}


def table(rows: Sequence[Row]) -> str:
    """A line per case, then what the rows say in words."""
    heads = ("policy", "size", "context", "prefill", "decode", "p20 – p80")
    heads += ("bound", "× bound", "peak", "caches")
    units = ("", "", "tokens", "tokens/s", "ms", "ms", "ms", "", "MB", "MB")
    lines = [_line(case, found) for case, found in by_case(rows).items()]
    aligned = text_table([heads, units, *lines], "<9 >5 >7 >8 >6 >11 >5 >7 >6 >6")
    return "\n".join([aligned, "", *sentences(rows)])


def _line(case: Case, units: dict[str, Row]) -> tuple[object, ...]:
    setting, context = case
    name = str(setting._replace(max_kv_size=None))
    cells: list[object] = [name, setting.max_kv_size, f"{context:,}"]
    cells.append(_said(units, "prefill_tps", "value", ".0f"))
    decode = [_said(units, "decode_ms", n, ".1f") for n in ("value", "p20", "p80")]
    cells += [decode[0], decode[1] and f"{decode[1]} – {decode[2]}"]
    cells.append(_said(units, "decode_ms", "bound_ms", ".1f"))
    cells.append(_said(units, "decode_ms", "ratio_to_bound", ".2f"))
    cells.append(_said(units, "peak_memory_bytes", "value", ",.0f", _MB))
    cells.append(_said(units, "cache_bytes", "value", ",.1f", _MB))
    return tuple(cells)


def _said(
    units: dict[str, Row], unit: str, name: str, digits: str, per: float = 1
) -> str:
    return f"{units[unit][name] / per:{digits}}" if unit in units else ""


def sentences(rows: Sequence[Row]) -> list[str]:
    """What it means for one setting, of `tova` if it is there, and what bound is."""
    cases = by_case(rows)
    lines = [
        f"Bound: the bytes that a step has to read, at {row['bandwidth'] / 1e9:.1f} "
        f"GB/s ({row['bandwidth_is']})."
        for units in list(cases.values())[:1]
        if (row := units.get("decode_ms"))
    ]
    bounded = [s for s, _ in cases if s.policy not in ("full", ROTATING)]
    bounded.sort(key=lambda s: s.policy != "tova")
    if bounded and (sentence := _meaning(cases, bounded[0])):
        lines.append(sentence)
    return lines


def _meaning(cases: dict[Case, dict[str, Row]], setting: Setting) -> str:
    """One sentence on a setting at its longest context."""
    last = max(c for s, c in cases if s == setting)
    row = cases[setting, last].get("decode_ms")
    full = cases.get((FULL, last), {})
    sizes = [u.get("cache_bytes") for u in (cases[setting, last], full)]
    if row is None or "decode_ms" not in full or None in sizes:
        return ""
    parts = []
    if grown := row.get("ratio_to_first_context"):
        first = min(c for s, c in cases if s == setting)
        others = full["decode_ms"].get("ratio_to_first_context")
        parts.append(
            f"a decode step at {last:,} tokens takes {grown:.2f} of one at {first:,} "
            f"(full: {others:.2f})"
        )
    against = f"{row['ratio_to_full']:.2f} of full's time at {last:,}"
    if rotating := row.get("ratio_to_rotating"):
        against += f", {rotating:.2f} of rotating's"
    own, whole = (size["value"] / _MB for size in sizes if size)
    parts += [against, f"caches of {own:,.1f} MB against {whole:,.1f} MB"]
    return f"{setting}: {'; '.join(parts)}."


# What each panel shows: a unit, its axis, and how a value is scaled.
_PANELS: tuple[tuple[str, str, float], ...] = (
    ("decode_ms", "a decode step (ms), bars: p20 to p80", 1),
    ("peak_memory_bytes", "peak memory, weights included (MB)", _MB),
    ("cache_bytes", "bytes of all caches (MB)", _MB),
)


def plot(rows: Sequence[Row], path: Path) -> Path | None:
    """Decode time, peak memory and cache bytes against the context, a line a setting.

    None if there is nothing of these yet.
    """
    shown = [p for p in _PANELS if any(row["unit"] == p[0] for row in rows)]
    if not shown:
        return None
    looks = _looks(rows)
    figure, grid = new_figure(5.2 * len(shown), 4.6, ncols=len(shown), squeeze=False)
    for axes, (unit, label, per) in zip(grid[0], shown, strict=True):
        _draw(axes, [row for row in rows if row["unit"] == unit], looks, per)
        axes.set_ylabel(label)
    first = rows[0]
    figure.suptitle(
        f"{first['model']}, {first['dtype']}, steps of {first['prefill_step_size']:,} "
        f"tokens, {first['device']}"
    )
    legend_below(figure, grid[0], 6)
    return save(figure, path)


def _looks(rows: Sequence[Row]) -> dict[Setting, dict[str, Any]]:
    """Looks of policies as `styles` has them; a larger size has larger marks."""
    known = styles(rows)
    sizes = sorted({row["max_kv_size"] or 0 for row in rows} - {0})
    looks: dict[Setting, dict[str, Any]] = {}
    for row in rows:
        setting = Setting.of(row)
        look = {**known[line_of(row)], "label": str(setting)}
        if setting.max_kv_size is not None:
            look["markersize"] = 5 + 3 * sizes.index(setting.max_kv_size)
        looks[setting] = look
    return looks


def _draw(
    axes: Any, rows: Sequence[Row], looks: dict[Setting, dict[str, Any]], per: float
) -> None:
    contexts = sorted({row["context"] for row in rows})
    for setting, look in looks.items():
        own = [row for row in rows if Setting.of(row) == setting]
        own.sort(key=lambda row: row["context"])
        bars = None
        if own and all("p20" in row for row in own):
            bars = [
                [row["value"] - row["p20"] for row in own],
                [row["p80"] - row["value"] for row in own],
            ]
        if own:
            x, y = [row["context"] for row in own], [row["value"] / per for row in own]
            axes.errorbar(x, y, yerr=bars, capsize=3, **look)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(contexts, [f"{n:,}" for n in contexts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context (tokens)")
    axes.grid(alpha=0.3)
