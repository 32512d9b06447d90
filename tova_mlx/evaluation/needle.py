"""A fact hidden in a real text and asked for at its end: which cache still knows it?

Every setting gets the same cases. The prompt ends with the opening of the answer, as in
RULER (arXiv 2404.06654): what counts is what is remembered, not how it is phrased.
Small models answer wrongly all the same; the log-probability of the right answer tells
policies apart even then.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm import stream_generate

from .haystack import Case, Cell
from .plots import new_figure, save
from .reading import Progress, filled
from .results import Results, Setting
from .statistics import mean_with_error, wilson

# Tokens that a greedy answer may have beyond the right one.
SLACK = 8


class Outcome(NamedTuple):
    """What a model said; the mean log-probability of the right tokens, in nats."""

    said: str
    hit: bool
    log_probability: float


def ask(
    model: nn.Module,
    tokenizer: Any,
    case: Case,
    setting: Setting,
    step: int,
    progress: Progress | None = None,
) -> Outcome:
    """Read a case's prompt once, then answer greedily, then be told the answer."""
    tokens = mx.array(case.prompt + case.answer)[None]
    last = len(case.prompt) - 1
    cache = filled(model, case.prompt[:last], setting, step, progress)
    pieces = stream_generate(
        model,
        tokenizer,
        case.prompt[last:],
        max_tokens=len(case.answer) + SLACK,
        prompt_cache=copy.deepcopy(cache),
    )
    said = "".join(piece.text for piece in pieces)
    logits = model(tokens[:, last:-1], cache=cache).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, tokens[:, last + 1 :])
    return Outcome(said, case.fact.is_hit(said), -float(np.array(losses).mean()))


class Needle:
    """Rows of all cells under any settings. cells: as `draw` gives their cases."""

    def __init__(self, results: Results, cells: dict[Cell, list[Case]], step: int):
        self.results, self.cells, self.step = results, cells, step

    def to_read(self, settings: list[Setting]) -> int:
        """Tokens of the prompts that are still to be read."""
        return sum(
            len(case.prompt) - 1
            for cell, cases in self.cells.items()
            for setting in settings
            if self._row(setting, cell) is None
            for case in cases
        )

    def run(
        self,
        model: nn.Module,
        tokenizer: Any,
        settings: list[Setting],
        progress: Progress | None = None,
    ) -> Iterator[dict[str, Any]]:
        """One row per cell and setting, measured where it is missing."""
        for cell, cases in self.cells.items():
            for setting in settings:
                row = self._row(setting, cell)
                if row is None:
                    outcomes = [
                        ask(model, tokenizer, case, setting, self.step, progress)
                        for case in cases
                    ]
                    values = _values(cell, cases, outcomes)
                    row = self.results.add(setting, **values)
                yield row

    def _row(self, setting: Setting, cell: Cell) -> dict[str, Any] | None:
        wanted = {**setting._asdict(), **cell._asdict()}
        rows = self.results.rows(task="needle", **wanted)
        return rows[0] if rows else None


def _values(cell: Cell, cases: list[Case], outcomes: list[Outcome]) -> dict[str, Any]:
    log_probabilities = [outcome.log_probability for outcome in outcomes]
    return {
        "task": "needle",
        "unit": "accuracy",
        **_share(sum(outcome.hit for outcome in outcomes), len(outcomes)),
        **_mean(log_probabilities),
        **cell._asdict(),
        "tokens": float(np.mean([len(case.prompt) for case in cases])),
        "log_probabilities": log_probabilities,
        "answers": [outcome.said for outcome in outcomes],
    }


def _share(hits: int, n: int) -> dict[str, Any]:
    value = hits / n
    error = (value * (1 - value) / n) ** 0.5
    return {"value": value, "n": n, "stderr": error, "interval": wilson(hits, n)}


def _mean(log_probabilities: list[float]) -> dict[str, Any]:
    # Cases are independent: each is a block. JSON has no NaN.
    mean, error = mean_with_error(log_probabilities, block=1)
    return {
        "mean_log_probability": mean,
        "mean_log_probability_stderr": error if len(log_probabilities) > 1 else None,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per setting and kind, over all cells: accuracy and mean log-probability."""
    groups: dict[tuple[Setting, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((Setting.of(row), row["kind"]), []).append(row)
    return [
        {
            **setting.to_row(),
            "kind": kind,
            **_share(
                sum(round(r["value"] * r["n"]) for r in some), sum(r["n"] for r in some)
            ),
            **_mean([p for r in some for p in r["log_probabilities"]]),
        }
        for (setting, kind), some in groups.items()
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """A heat map per setting, depth by length, of means over kinds.

    Colour: log-probability of the right answer; number: share of hits.
    """
    panels: dict[Setting, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(Setting.of(row), []).append(row)
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})

    def means(some: list[dict[str, Any]], name: str) -> npt.NDArray[np.float64]:
        grid = np.full((len(depths), len(lengths)), np.nan)
        for i, j in np.ndindex(grid.shape):
            place = depths[i], lengths[j]
            here = [r[name] for r in some if (r["depth"], r["length"]) == place]
            grid[i, j] = np.mean(here) if here else np.nan
        return grid

    colours = [means(some, "mean_log_probability") for some in panels.values()]
    # Where all is well nothing shall look bad.
    worst = min(-1.0, float(np.nanmin(colours)))
    n_columns = min(4, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure, grid = new_figure(
        max(7.5, 2 + n_columns * max(1.9, 0.55 * len(lengths))),
        max(4, 1.5 + n_rows * max(1.7, 0.35 * len(depths))),
        nrows=n_rows,
        ncols=n_columns,
        squeeze=False,
    )
    used = grid.flat[: len(panels)].tolist()
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    image = None
    for axes, (setting, some), colour in zip(
        used, panels.items(), colours, strict=True
    ):
        image = axes.imshow(colour, vmin=worst, vmax=0, cmap="cividis", aspect="auto")
        axes.set_title(str(setting))
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
        for (i, j), share in np.ndenumerate(means(some, "value")):
            if np.isfinite(share):
                ink = "white" if colour[i, j] < worst / 2 else "black"
                axes.text(j, i, f"{share:.0%}", color=ink, ha="center", va="center")
    first = rows[0]
    kinds = " and ".join(dict.fromkeys(row["kind"] for row in rows))
    figure.suptitle(
        f"{first['model']}, {kinds} hidden in {first['text']}\n"
        "colour: mean log-probability of the right answer; number: accuracy"
    )
    figure.supxlabel("length of the text (tokens)")
    figure.supylabel("depth of the fact (share of the text)")
    bar = figure.colorbar(image, ax=used)
    bar.set_label("mean log-probability (nats per token)")
    return save(figure, path)
