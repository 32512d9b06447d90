"""Figures with one look: a colour and a mark per policy, legible to the colour-blind.

Colours: Okabe and Ito, "Color Universal Design" (2008).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files import written_whole
from .results import Setting

_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
)
_MARKS = "osD^vPX<>*hp8"
_LINES = ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))
_HATCHES = ("", "///", "...", "xxx", "---")
# Each has the look of its place in every figure; a new policy goes to the end.
_KNOWN = (
    *("window", "streaming", "h2o", "tova", "vatp", "fade", "keydiff"),
    # mlx-lm's own.
    "rotating",
)
# Background, text and lines of a dark page.
_PAGE, _INK, _LINE = "#0d1117", "#e6edf3", "#57606a"
_DARK = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), _PAGE),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), _LINE),
    "legend.facecolor": _PAGE,
}

Style = dict[str, Any]


def pyplot() -> Any:
    """matplotlib's, drawing into files. Raises EvaluationError without matplotlib."""
    try:
        import matplotlib

        # No window, whatever the machine has.
        matplotlib.use("Agg", force=True)
        from matplotlib import pyplot as module
    except ImportError as error:
        raise EvaluationError(
            'Plots need matplotlib. Run: pip install "tova_mlx[eval]"'
        ) from error
    except OSError as error:
        raise EvaluationError(
            f"Plots need a directory for matplotlib's own files ({error}). Set "
            "MPLCONFIGDIR to one that can be written to."
        ) from error
    return module


@contextmanager
def on_dark() -> Iterator[None]:
    """Draw figures for a dark page while the block runs."""
    with pyplot().rc_context(_DARK):
        yield


def is_dark() -> bool:
    """Whether figures are drawn for a dark page."""
    return pyplot().rcParams["figure.facecolor"] == _PAGE


def full_style() -> Style:
    """Colour, line and name of `full`, and of what stands for it."""
    return {
        "color": "#b0b8c0" if is_dark() else "#555555",
        "linestyle": "--",
        "label": "full",
    }


def new_figure(width: float = 7, height: float = 4.5, **how: Any) -> tuple[Any, Any]:
    """A figure and its axes; `how`: as in matplotlib's `subplots`."""
    return pyplot().subplots(figsize=(width, height), layout="constrained", **how)


def line_of(row: dict[str, Any]) -> str:
    """The line of a figure that a row belongs to: its setting but for the size."""
    return str(Setting.of(row)._replace(max_kv_size=None))


def styles(rows: Iterable[dict[str, Any]]) -> dict[str, Style]:
    """Colour, mark and line of each of the rows' lines, for `plot` or `errorbar`.

    A policy has one colour and mark, and the package's own have theirs in every figure.
    What is quantised, or recalls, has open marks and other lines.
    """
    settings = dict.fromkeys(Setting.of(row)._replace(max_kv_size=None) for row in rows)
    policies = dict.fromkeys([*_KNOWN, *(s.policy for s in settings)])
    policies.pop("full", None)
    places = {policy: i for i, policy in enumerate(policies)}
    # As they come, without recall, first.
    kinds = dict.fromkeys([Setting("", None)[2:], *(s[2:] for s in settings)])
    storages = {kind: i for i, kind in enumerate(kinds)}
    found: dict[str, Style] = {}
    for setting in settings:
        storage = storages[setting[2:]]
        if setting.policy == "full":
            look = full_style()
            if storage:
                look["linestyle"] = (0, (storage, 2))
        else:
            place = places[setting.policy]
            look = {
                "color": _colour(place),
                "marker": _MARKS[place % len(_MARKS)],
                "linestyle": _LINES[(place // len(_COLOURS) + storage) % len(_LINES)],
            }
            if storage:
                look["markerfacecolor"] = "none"
        found[str(setting)] = {**look, "label": str(setting)}
    return found


def _colour(place: int) -> str:
    colour = _COLOURS[place % len(_COLOURS)]
    return _INK if is_dark() and colour == "#000000" else colour


def bar_style(look: Style) -> Style:
    """What a line's look is for bars: hatched where the line is not solid."""
    place = _LINES.index(look["linestyle"])
    hatched = {"hatch": _HATCHES[place], "edgecolor": "white", "linewidth": 0}
    return {"color": look["color"], **(hatched if place else {})}


def draw_by_size(
    axes: Any,
    rows: Sequence[dict[str, Any]],
    looks: Mapping[str, Style],
    apart: float = 0.0,
    by: str = "max_kv_size",
) -> list[int]:
    """Values with error bars against tokens kept, a line per policy; `full` dashed.

    looks: see `styles`; apart: how far the lines stand from each other at one size, in
    powers of two; by: "cache_bytes" for bytes instead of tokens. Returns the sizes.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["max_kv_size"] is None:
            axes.axhline(row["value"], **looks[line_of(row)])
        else:
            lines.setdefault(line_of(row), []).append(row)
    for i, (line, some) in enumerate(lines.items()):
        some = sorted(some, key=lambda row: row[by])
        shift = 2 ** (apart * (i - (len(lines) - 1) / 2))
        axes.errorbar(
            [row[by] * shift for row in some],
            [row["value"] for row in some],
            yerr=[row["stderr"] or 0 for row in some],
            capsize=3,
            **looks[line],
        )
    sizes = sorted({row[by] for some in lines.values() for row in some})
    if sizes:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        _tick(axes, sizes, str if by == "max_kv_size" else _bytes)
    axes.set_xlabel(
        "tokens kept per layer (max_kv_size)"
        if by == "max_kv_size"
        else "bytes of all caches, keys and values in half precision"
    )
    axes.grid(alpha=0.3)
    return sizes


def _tick(axes: Any, sizes: list[int], said: Callable[[int], str]) -> None:
    """Name the sizes, but of those that are near each other only the first."""
    named = [sizes[0]]
    for size in sizes:
        if size >= 1.5 * named[-1]:
            named.append(size)
    axes.set_xticks(named, [said(size) for size in named])


def _bytes(n: int) -> str:
    return f"{n / 1e6:.3g} MB"


def legend_below(figure: Any, panels: Sequence[Any], ncols: int) -> None:
    """One legend for all panels, under them."""
    marks: dict[str, Any] = {}
    for axes in panels:
        for mark, label in zip(*axes.get_legend_handles_labels(), strict=True):
            marks.setdefault(label, mark)
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=ncols)


def save(figure: Any, path: Path) -> Path:
    """Write a PNG, all of it or nothing, and let go of the figure.

    Raises EvaluationError if it cannot be written; what was there stays.
    """
    try:
        with written_whole(path) as written:
            figure.savefig(written, dpi=150)
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be written ({error.strerror}). Make room, or name another "
            "--out; what was measured is kept."
        ) from error
    finally:
        pyplot().close(figure)
    return path
