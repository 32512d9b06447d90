"""Perplexity of a long text under bounded caches, paired token by token.

The text is cut into windows as long as the context; each is read from an empty cache,
with token-by-token semantics. Losses are kept beside the rows, so that settings can be
compared on the same tokens.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..errors import EvaluationError
from ..files import written_whole
from .budgets import cache_bytes
from .plots import (
    Style,
    draw_by_size,
    full_style,
    legend_below,
    line_of,
    new_figure,
    save,
    styles,
)
from .reading import Progress, token_losses
from .results import Results, Setting, missing
from .statistics import mean_with_error

Losses = npt.NDArray[np.float32]


def cut(ids: list[int], context: int, n_tokens: int) -> npt.NDArray[np.int32]:
    """Windows [W, context] of the first `n_tokens` tokens, the last part one left out.

    Raises EvaluationError: not one window.
    """
    n = min(n_tokens, len(ids)) // context
    if n == 0:
        raise EvaluationError(
            f"The text has {len(ids)} tokens and {n_tokens} are to be read, less than "
            f"one context of {context}. Give a longer text, more --tokens or a smaller "
            "--context."
        )
    return np.array(ids[: n * context], np.int32).reshape(n, context)


class Perplexity:
    """Rows and losses of one text's windows [W, context], under any settings."""

    def __init__(self, results: Results, windows: npt.NDArray[np.int32], step: int):
        self.results, self.windows, self.step = results, windows, step

    def missing(self, settings: list[Setting]) -> list[Setting]:
        """The settings to measure: see `results.missing`."""
        return missing(
            settings,
            measured=lambda s: self._row(s) is not None,
            references=lambda s: list(_references(s).values()),
            saved=lambda s: self._saved(s) is not None,
        )

    def run(
        self,
        model: nn.Module,
        settings: list[Setting],
        progress: Progress | None = None,
        began: Callable[[Setting], Any] = lambda setting: None,
    ) -> Iterator[dict[str, Any]]:
        """The rows of the settings in order, measured where they are missing."""
        to_measure = self.missing(settings)
        for setting in settings:
            row = self._row(setting)
            if setting in to_measure:
                began(setting)
                losses = self._measure(model, setting, progress)
                self._save(setting, losses)
                if row is None:
                    values = self._values(setting, losses)
                    nbytes = cache_bytes(model, setting, self.windows.shape[1])
                    row = self.results.add(setting, **values, cache_bytes=nbytes)
            assert row is not None
            yield row

    def compare(self, one: Setting, other: Setting) -> tuple[float, float]:
        """The ratio of one's perplexity to the other's, and its standard error."""
        mine, theirs = self._saved(one), self._saved(other)
        if mine is None or theirs is None:
            return math.nan, math.nan
        mean, error = mean_with_error((mine - theirs).reshape(-1))
        return math.exp(mean), math.exp(mean) * error

    def _measure(
        self, model: nn.Module, setting: Setting, progress: Progress | None
    ) -> Losses:
        rows = [
            token_losses(model, mx.array(w[None]), setting, self.step, progress)
            for w in self.windows
        ]
        return np.concatenate(rows)

    def _values(self, setting: Setting, losses: Losses) -> dict[str, Any]:
        value, error = _perplexity(losses)
        row: dict[str, Any] = {
            "task": "perplexity",
            "unit": "perplexity",
            "value": value,
            "stderr": _number(error),
            "n": losses.size,
            "by_position": _by_position(losses),
        }
        for name, other in _references(setting).items():
            ratio, error = self.compare(setting, other)
            row[f"ratio_to_{name}"] = _number(ratio)
            row[f"ratio_to_{name}_stderr"] = _number(error)
        return row

    def _row(self, setting: Setting) -> dict[str, Any] | None:
        rows = self.results.rows(task="perplexity", **setting._asdict())
        return rows[0] if rows else None

    def _path(self, setting: Setting) -> Path:
        name = str(setting).replace(" ", "-")
        return self.results.directory / "losses" / self.results.name / f"{name}.npy"

    def _saved(self, setting: Setting) -> Losses | None:
        shape = (len(self.windows), self.windows.shape[1] - 1)
        try:
            # A map has no more than the file, whatever its header says.
            losses = np.array(np.load(self._path(setting), mmap_mode="r"))
        except Exception:
            # Anything may come out of a damaged file: they are measured again.
            return None
        whole = losses.shape == shape and losses.dtype == np.float32
        return losses if whole and np.isfinite(losses).all() else None

    def _save(self, setting: Setting, losses: Losses) -> None:
        path = self._path(setting)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as written:
                np.save(written, losses)
        except OSError as error:
            raise EvaluationError(
                f"{path}: cannot be written ({error.strerror or error}). Make room, or "
                "name another --out; the same command goes on."
            ) from error


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Against tokens kept, a line per policy: perplexity, and its change from full.

    Where something is quantised, against bytes too.
    """
    changes = [_change(row) for row in rows if row.get("ratio_to_full") is not None]
    weighed = [row for row in rows if "cache_bytes" in row]
    by_bytes = any("kv_bits" in row for row in weighed)
    n = 1 + bool(changes) + by_bytes
    figure, grid = new_figure(width=7 if n == 1 else 6 * n, ncols=n, squeeze=False)
    panels, first, looks = grid[0], rows[0], styles(rows)
    _draw_values(panels[0], rows, looks)
    if changes:
        _draw_changes(panels[1], changes, looks)
    if by_bytes:
        _draw_values(panels[-1], weighed, looks, by="cache_bytes")
    figure.suptitle(
        f"{first['model']}, {first['text']}: {first['tokens']:,} tokens in contexts "
        f"of {first['context']:,}; bars: standard error"
    )
    legend_below(figure, panels, 8)
    return save(figure, path)


def _draw_values(
    axes: Any, rows: list[dict[str, Any]], looks: Mapping[str, Style], **how: Any
) -> None:
    draw_by_size(axes, rows, looks, **how)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_ylabel("perplexity (lower is better)")


def _change(row: dict[str, Any]) -> dict[str, Any]:
    error = row.get("ratio_to_full_stderr")
    change = 100 * (row["ratio_to_full"] - 1)
    return {**row, "value": change, "stderr": None if error is None else 100 * error}


def _draw_changes(
    axes: Any, changes: list[dict[str, Any]], looks: Mapping[str, Style]
) -> None:
    draw_by_size(axes, changes, looks, apart=0.03)
    axes.axhline(0, **full_style())
    # The better half of the lines in full: the worst would flatten them.
    worst: dict[str, float] = {}
    for row in changes:
        most, line = row["value"] + (row["stderr"] or 0), line_of(row)
        worst[line] = max(most, worst.get(line, most))
    top = 1.2 * max(1.0, statistics.median(worst.values()))
    axes.set_ylim(min(0, *(r["value"] for r in changes)) - 0.05 * top, top)
    axes.set_ylabel("change from full, on the same tokens (%)")


def _references(setting: Setting) -> dict[str, Setting]:
    """What a setting is compared with, by the names that its row has for them.

    `full`; `tova` of the same size, bits and recall; of what is quantised, `plain`, and
    of what recalls, `no_recall`: the same without.
    """
    others = {"full": Setting("full", None)}
    if setting.max_kv_size is not None:
        others["tova"] = setting._replace(policy="tova")
    if setting != setting.plain:
        others["plain"] = setting.plain
    if setting.recall is not None:
        others["no_recall"] = setting._replace(recall=None)
    return {name: other for name, other in others.items() if other != setting}


def _perplexity(losses: Losses) -> tuple[float, float]:
    mean, error = mean_with_error(losses.reshape(-1))
    return math.exp(mean), math.exp(mean) * error


def _by_position(losses: Losses) -> list[dict[str, Any]]:
    """Perplexity of the tokens at positions 1 to 63, 64 to 127, 128 to 255 …"""
    length, start, buckets = losses.shape[1] + 1, 1, []
    while start < length:
        stop = min(length, max(64, 2 * start) if start > 1 else 64)
        some = losses[:, start - 1 : stop - 1]
        # A window's part is a block: parts of different windows are independent.
        mean, error = mean_with_error(some.mean(axis=1), block=1)
        buckets.append(
            {
                "from": start,
                "to": stop - 1,
                "perplexity": math.exp(mean),
                "stderr": _number(math.exp(mean) * error),
            }
        )
        start = stop
    return buckets


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
