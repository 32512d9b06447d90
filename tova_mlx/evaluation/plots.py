"""Figures with one look: a colour and a mark per policy, legible to the colour-blind.

Colours: Okabe and Ito, "Color Universal Design" (2008).
"""

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


def save(figure: Any, path: Path) -> Path:
    """Write a PNG and let go of the figure."""
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
    return path
