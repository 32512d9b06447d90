"""Figures with one look: a colour and a mark per policy, legible to the colour-blind.

Colours: Okabe and Ito, "Color Universal Design" (2008).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..policies import POLICIES

_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
)
_MARKS = "osD^vPX"
_ORDER = [name for name in POLICIES if name != "full"]


def pyplot() -> Any:
    """matplotlib's, drawing into files. Raises EvaluationError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise EvaluationError(
            'Plots need matplotlib. Run: pip install "tova_mlx[eval]"'
        ) from error
    # No window, whatever the machine has.
    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot as module

    return module


def new_figure(width: float = 7, height: float = 4.5, **how: Any) -> tuple[Any, Any]:
    """A figure and its axes; `how`: as in matplotlib's `subplots`."""
    return pyplot().subplots(figsize=(width, height), layout="constrained", **how)


def style(policy: str) -> dict[str, Any]:
    """Colour, mark and line of a policy, for `plot` or `errorbar`."""
    if policy == "full":
        return {"color": "#555555", "linestyle": "--", "label": "full"}
    i = _ORDER.index(policy)
    return {"color": _COLOURS[i], "marker": _MARKS[i], "label": policy}


def draw_by_size(
    axes: Any, rows: Sequence[dict[str, Any]], apart: float = 0.0
) -> list[int]:
    """Values with error bars against tokens kept, a line per policy; `full` dashed.

    apart: how far the policies stand from each other at one size, in powers of two.
    Returns the sizes.
    """
    for row in rows:
        if row["policy"] == "full":
            axes.axhline(row["value"], **style("full"))
    bounded = [row for row in rows if row["max_kv_size"]]
    policies = list(dict.fromkeys(row["policy"] for row in bounded))
    for i, policy in enumerate(policies):
        mine = sorted(
            (row for row in bounded if row["policy"] == policy),
            key=lambda row: row["max_kv_size"],
        )
        shift = 2 ** (apart * (i - (len(policies) - 1) / 2))
        axes.errorbar(
            [row["max_kv_size"] * shift for row in mine],
            [row["value"] for row in mine],
            yerr=[row["stderr"] or 0 for row in mine],
            capsize=3,
            **style(policy),
        )
    sizes = sorted({row["max_kv_size"] for row in bounded})
    if sizes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("tokens kept per layer (max_kv_size)")
    axes.grid(alpha=0.3)
    return sizes


def legend_below(figure: Any, panels: Sequence[Any], ncols: int) -> None:
    """One legend for all panels, under them."""
    marks: dict[str, Any] = {}
    for axes in panels:
        for mark, label in zip(*axes.get_legend_handles_labels(), strict=True):
            marks.setdefault(label, mark)
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=ncols)


def save(figure: Any, path: Path) -> Path:
    """Write a PNG and let go of the figure."""
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
    return path
