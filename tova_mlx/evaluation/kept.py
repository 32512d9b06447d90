"""Which tokens a policy keeps: how recent they are, and which kinds stay longest.

A text is read with exact stepwise prefill, and all that is noted is the step at which
each token left each layer (and KV head, if those choose on their own): one number a
token. A lifetime is the number of steps after which the token was still there, so a
window's is `max_kv_size`; a token that leaves at its own step has 0.

Share of recent: of the tokens kept after a step, those among the newest `max_kv_size`
seen, which is what a window would keep; the mean over all steps at which a token left.

Mean lifetimes are Kaplan and Meier's, over as many steps as were read: a token still
there at the end counts as one that stays for longer than could be seen.

Source: "Transformers are Multi-State RNNs", arXiv 2401.06104, section 7.3.
Differs from the source: it does not say what it calls recent. It counts a token still
there at the end as if it left then, and its own step too: that way the mean over all
tokens is the same for every policy. Its tags are NLTK's, ours those of `kinds`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..caches.layer import PolicyKVCache
from ..caches.observing import observe_evictions
from ..errors import EvaluationError
from ..hooks.layers import leaves
from ..policies import POLICIES
from .kinds import ENOUGH, KINDS
from .plots import (
    Style,
    bar_style,
    full_style,
    legend_below,
    line_of,
    new_figure,
    save,
    styles,
)
from .reading import Progress, new_cache, read
from .results import Results, Setting
from .statistics import mean_survival, mean_with_error

# The step at which each token left, int32 [H', T]; T for one still there.
Gone = npt.NDArray[np.int32]
# Steps [n], and the positions evicted after each [H', n].
Evicted = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]

# The rows of each setting, one a layer.
Settings = list[list[dict[str, Any]]]

# How many of the first tokens are looked at one by one.
N_FIRST = 4


def first_tokens(ids: list[int], n_tokens: int, settings: list[Setting]) -> list[int]:
    """As many tokens as wanted and there. Raises EvaluationError: none would leave."""
    largest = max(s.max_kv_size or 0 for s in settings)
    if min(n_tokens, len(ids)) <= largest:
        wanted = f"--tokens {n_tokens}" if len(ids) >= n_tokens else "The text"
        raise EvaluationError(
            f"{wanted}: of {min(n_tokens, len(ids))} tokens none would leave with "
            f"max_kv_size={largest}. Give a longer text, more --tokens or a smaller "
            "--max-kv-size."
        )
    return ids[:n_tokens]


def departures(
    model: nn.Module,
    ids: list[int],
    setting: Setting,
    step: int,
    progress: Progress | None = None,
    **options: Any,
) -> dict[int, Gone]:
    """When each token left, for every layer that a cache of ours bounds.

    options: the policy's own.
    """
    caches = new_cache(model, setting, **options)
    # A layer of some models has two caches.
    parts = [(i, leaf) for i, cache in enumerate(caches) for leaf in leaves([cache])]
    new: list[tuple[int, Sequence[int], mx.array]] = []
    evicted: dict[int, list[Evicted]] = {}
    with observe_evictions([leaf for _, leaf in parts], lambda *e: new.append(e)):
        for _ in read(model, mx.array([ids]), caches, step, progress):
            # Now: what waits would keep the arrays of every step alive.
            for i, steps, positions in new:
                evictions = evicted.setdefault(i, [])
                evictions.append((np.array(steps), np.array(positions[0])))
            new.clear()
    layers: dict[int, list[Gone]] = {}
    for i, (layer, leaf) in enumerate(parts):
        # Some models make caches that they do not use.
        if isinstance(leaf, PolicyKVCache) and not leaf.empty():
            last = _last_steps(leaf.seen, evicted[i])
            layers.setdefault(layer, []).append(last)
    return {layer: np.concatenate(several) for layer, several in layers.items()}


def _last_steps(n_tokens: int, evicted: list[Evicted]) -> Gone:
    """The steps [H', T] after which each token was evicted; T if it never was."""
    steps = np.concatenate([steps for steps, _ in evicted])
    positions = np.concatenate([places for _, places in evicted], axis=1)
    last = np.full((len(positions), n_tokens), n_tokens, np.int32)
    np.put_along_axis(last, positions, np.broadcast_to(steps, positions.shape), axis=1)
    return last


def recent_share(gone: Gone, size: int, newest: int) -> npt.NDArray[np.float64]:
    """The share [T - size] of the `size` kept that are among the `newest` seen.

    After each step at which a token left; the mean over H'.
    """
    choosers, n = gone.shape
    arrived = np.arange(n)
    until = np.minimum(np.minimum(gone, arrived + newest), n)
    ceased = np.bincount(until.ravel(), minlength=n + 1)[:n]
    counts = choosers * (arrived + 1) - np.cumsum(ceased)
    return counts[size:] / (choosers * size)


def mean_lifetime(gone: Gone, chosen: npt.NDArray[np.bool_]) -> float:
    """The mean steps that the chosen tokens [T] stay, of at most T; mean over H'."""
    n = gone.shape[1]
    arrived = np.arange(n)[chosen]
    means = []
    for steps in gone[:, chosen]:
        left = steps < n
        # One still there was seen not to leave through the last step, n - 1.
        seen = np.where(left, steps, n - 1) - arrived
        means.append(mean_survival(seen, left, n))
    return float(np.mean(means))


def first_survival(gone: Gone) -> tuple[list[float], list[float]]:
    """Steps that the first tokens stay, and the share of H' where to the end."""
    n = gone.shape[1]
    first = gone[:, :N_FIRST]
    steps = first - np.arange(first.shape[1])
    return steps.mean(axis=0).tolist(), (first == n).mean(axis=0).tolist()


class Kept:
    """Rows of one text's tokens, of these kinds, under any settings."""

    def __init__(self, results: Results, ids: list[int], kinds: list[str], step: int):
        self.results, self.ids, self.step = results, ids, step
        self._counts = {k: n for k in KINDS if (n := Counter(kinds)[k])}
        self._kinds = np.array(kinds)

    def missing(self, settings: list[Setting]) -> list[Setting]:
        """The settings that have to be read for, in order; never `full`."""
        bounded = (s for s in settings if s.max_kv_size is not None)
        return [s for s in bounded if not self._complete(self._rows(s))]

    def run(
        self,
        model: nn.Module,
        settings: list[Setting],
        progress: Progress | None = None,
        began: Callable[[Setting], Any] = lambda setting: None,
    ) -> Iterator[list[dict[str, Any]]]:
        """The rows of each setting, one a layer, measured where they are missing."""
        for setting in settings:
            rows = self._rows(setting)
            if not self._complete(rows):
                if setting.max_kv_size is None:
                    layers = {None: self._everything()}
                else:
                    began(setting)
                    layers = self._measure(model, setting, progress)
                there = {row["layer"] for row in rows}
                rows += [
                    self._add(setting, layer, len(layers), values)
                    for layer, values in layers.items()
                    if layer not in there
                ]
            yield sorted(rows, key=lambda row: row["layer"] or 0)

    def _rows(self, setting: Setting) -> list[dict[str, Any]]:
        return self.results.rows(task="kept", **setting._asdict())

    @staticmethod
    def _complete(rows: list[dict[str, Any]]) -> bool:
        return bool(rows) and len(rows) == rows[0]["layers"]

    def _add(
        self, setting: Setting, layer: int | None, n: int, values: dict[str, Any]
    ) -> dict[str, Any]:
        return self.results.add(
            setting,
            task="kept",
            unit="share",
            layer=layer,
            layers=n,
            **values,
            counts=self._counts,
        )

    def _everything(self) -> dict[str, Any]:
        """What is true of `full`: nothing is read for it."""
        n = len(self.ids)
        first = range(n)[:N_FIRST]
        return {
            "value": 1.0,
            "stderr": None,
            "n": n,
            "share_newest_half": None,
            "first_token_steps": n,
            "first_tokens_steps": [n - i for i in first],
            "first_tokens_stay": [1.0 for _ in first],
            "lifetimes": {},
            "relative": {},
        }

    def _measure(
        self, model: nn.Module, setting: Setting, progress: Progress | None
    ) -> dict[int, dict[str, Any]]:
        layers = departures(model, self.ids, setting, self.step, progress)
        if not layers:
            raise EvaluationError(
                f"{type(model).__module__} bounds all its layers itself, so a policy "
                "decides nothing in it. Use another model."
            )
        assert setting.max_kv_size is not None
        return {
            layer: self._values(gone, setting.max_kv_size)
            for layer, gone in layers.items()
        }

    def _values(self, gone: Gone, size: int) -> dict[str, Any]:
        shares = recent_share(gone, size, size)
        # What is kept is renewed in as many steps: less would not be independent.
        value, error = mean_with_error(shares, block=size)
        steps, stay = first_survival(gone)
        lifetimes = {"all": mean_lifetime(gone, np.ones(gone.shape[1], np.bool_))}
        for kind in self._counts:
            lifetimes[kind] = mean_lifetime(gone, self._kinds == kind)
        return {
            "value": value,
            "stderr": error if math.isfinite(error) else None,
            "n": len(shares),
            "share_newest_half": float(recent_share(gone, size, size // 2).mean()),
            "first_token_steps": steps[0],
            "first_tokens_steps": steps,
            "first_tokens_stay": stay,
            "lifetimes": lifetimes,
            "relative": relative([lifetimes]),
        }


def relative(lifetimes: list[dict[str, float]]) -> dict[str, float]:
    """Mean lifetimes of the kinds as multiples of that of all tokens, over layers."""
    every = sum(layer["all"] for layer in lifetimes)
    kinds = [kind for kind in lifetimes[0] if kind != "all"]
    return {k: sum(layer[k] for layer in lifetimes) / every for k in kinds}


def plot(settings: Settings, path: Path) -> Path | None:
    """Per size, the share of recent by layer and the lifetimes by kind.

    settings: the rows of each; None if there is none but `full`.
    """
    bounded = [rows for rows in settings if rows[0]["max_kv_size"] is not None]
    if not bounded:
        return None
    order = {policy: i for i, policy in enumerate(POLICIES)}
    bounded.sort(key=lambda rows: order.get(rows[0]["policy"], len(order)))
    looks = styles(rows[0] for rows in bounded)
    sizes = sorted({rows[0]["max_kv_size"] for rows in bounded})
    figure, axes = new_figure(
        13,
        0.9 + 3.6 * len(sizes),
        nrows=len(sizes),
        ncols=2,
        squeeze=False,
        width_ratios=(2, 3),
    )
    for (left, right), size in zip(axes, sizes, strict=True):
        mine = [rows for rows in bounded if rows[0]["max_kv_size"] == size]
        _plot_shares(left, mine, size, looks)
        _plot_lifetimes(right, mine, size, looks)
    legend_below(figure, axes[:, 0], 8)
    first = bounded[0][0]
    figure.suptitle(
        f"Which tokens are kept: {first['model']}, {first['text']}, "
        f"{first['tokens']:,} tokens"
    )
    return save(figure, path)


def _plot_shares(
    axes: Any, settings: Settings, size: int, looks: Mapping[str, Style]
) -> None:
    for rows in settings:
        axes.plot(
            [row["layer"] for row in rows],
            [100 * row["value"] for row in rows],
            markersize=4,
            **looks[line_of(rows[0])],
        )
    axes.set_xlabel("layer")
    axes.set_ylabel(f"share of the newest {size} (%)")
    lowest = min(row["value"] for rows in settings for row in rows)
    axes.set_ylim(max(0, 100 * lowest - 8), 102)
    axes.set_title(f"Recent tokens among the {size} kept")
    axes.grid(alpha=0.3)


def _plot_lifetimes(
    axes: Any, settings: Settings, size: int, looks: Mapping[str, Style]
) -> None:
    counts = settings[0][0]["counts"]
    width = 0.84 / len(settings)
    for i, rows in enumerate(settings):
        ratios = relative([row["lifetimes"] for row in rows])
        bars = axes.bar(
            np.arange(len(counts)) + (i - (len(settings) - 1) / 2) * width,
            [ratios[kind] for kind in counts],
            width,
            **bar_style(looks[line_of(rows[0])]),
        )
        for bar, n in zip(bars, counts.values(), strict=True):
            bar.set_alpha(1 if n >= ENOUGH else 0.3)
    axes.axhline(1, color=full_style()["color"], linestyle="--", linewidth=1)
    names = [f"{k.replace(' ', chr(10))}\n({n})" for k, n in counts.items()]
    axes.set_xticks(range(len(counts)), names)
    few = f"; pale: fewer than {ENOUGH}" if min(counts.values()) < ENOUGH else ""
    axes.set_xlabel(f"kind of token (how many were read{few})")
    axes.set_ylabel("lifetime, times that of all tokens")
    axes.set_title(f"How long each kind stays, {size} kept")
    axes.grid(axis="y", alpha=0.3)
