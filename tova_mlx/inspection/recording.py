"""A model reads a text, and which tokens each layer evicts meanwhile is written down.

Through the observer of the caches: nothing is written down, or computed for it, when
nobody inspects.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..caches.layer import PolicyKVCache
from ..caches.observing import observe_evictions
from ..errors import OptionError, PromptError, UnsupportedModelError
from ..evaluation.reading import Progress, first_ids, read
from ..hooks.layers import leaves
from ..models.conversion import make_prompt_cache
from ..policies import RECALL_BLOCK
from .pieces import AHEAD, Pieces
from .record import MOST_SETTINGS, Inspection, LayerRecord, Recalled, Record


def inspect(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[int],
    max_kv_size: int | str | None,
    *,
    policy: str | Sequence[str] = "tova",
    max_tokens: int | None = None,
    prefill_step_size: int = 256,
    name: str = "",
    progress: Progress | None = None,
    **options: Any,
) -> Inspection:
    """Read a text with bounded caches, and note when each layer evicted each token.

    Args:
        model, tokenizer: as `mlx_lm.load` gives them.
        text: read as it is, without a chat template; or its tokens.
        max_kv_size, options: as in `make_prompt_cache`.
        policy: a name in `POLICIES`, or two of them to be seen side by side.
        max_tokens: tokens read of the text, all if None.
        prefill_step_size: tokens read per step.
        name: what the model is called on the page.
        progress: called with the number of tokens read since the last call.

    Returns:
        The record: `to_dict()` is JSON-ready, `to_html()` a page, `save(path)` writes
        it.

    Raises:
        OptionError, UnsupportedModelError: as in `make_prompt_cache`; a model that
            bounds all its layers itself.
        PromptError: a text without tokens.
    """
    policies = (policy,) if isinstance(policy, str) else tuple(policy)
    if not 1 <= len(set(policies)) == len(policies) <= MOST_SETTINGS:
        raise OptionError(
            f"inspect: policy={policies!r} is not one policy, or two different ones "
            "to be seen side by side. Name one or two."
        )
    ids = encode(tokenizer, text, max_tokens)
    n = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    if not n:
        raise PromptError("The text has no tokens. Give at least one word.")
    records = []
    for chosen in policies:
        caches = make_prompt_cache(
            model, max_kv_size, policy=chosen, **{"journal": 0, **options}
        )
        layers = _read(model, ids[:n], caches, prefill_step_size, progress)
        # The limits of those that were used; they are alike.
        size = min((s for s, _ in layers if s is not None), default=None)
        records.append(
            Record(chosen, size, tuple(r for _, r in layers), _given(options))
        )
    pieces = Pieces.of(tokenizer, ids, n)
    return Inspection(name, tuple(ids[:n]), pieces, tuple(records))


def encode(
    tokenizer: Any, text: str | Sequence[int], n: int | None = None
) -> list[int]:
    """The tokens of a text; of a long one those wanted, and a few after them."""
    if not isinstance(text, str):
        return [int(i) for i in text]
    return first_ids(tokenizer, text, len(text) if n is None else n + AHEAD)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options worth a word: those that are not what they are without it."""
    usual = {"prefill": "stepwise", "positions": "original", "recall": 0}
    silent = {"kv_group_size", "archive", "journal"}
    return {
        name: value
        for name, value in options.items()
        if name not in silent and value is not None and value != usual.get(name)
    }


def _read(
    model: nn.Module,
    ids: list[int],
    caches: list[Any],
    step: int,
    progress: Progress | None,
) -> list[tuple[int | None, LayerRecord]]:
    """The limit and the record of each layer that a cache of ours bounds."""
    # A layer of some models has two caches.
    parts = [(i, leaf) for i, cache in enumerate(caches) for leaf in leaves([cache])]
    notes = [_Notes(len(ids)) for _ in parts]
    new: list[tuple[Any, ...]] = []

    def note(n: int) -> None:
        """Write down what the step did; what waits would keep its arrays alive."""
        mx.eval([a for event in new for a in event[3:] if a is not None])
        for write, part, steps, *arrays in new:
            write(notes[part], np.array(steps), *arrays)
        new.clear()
        if progress is not None:
            progress(n)

    with observe_evictions(
        [leaf for _, leaf in parts],
        lambda *event: new.append((_Notes.evicted, *event)),
        scores=True,
        recalled=lambda *event: new.append((_Notes.came_back, *event)),
    ):
        for _ in read(model, mx.array([ids]), caches, step, note):
            pass
    layers: dict[int, list[tuple[int | None, LayerRecord]]] = {}
    for (layer, leaf), own in zip(parts, notes, strict=True):
        # Some models make caches that they do not use.
        if isinstance(leaf, PolicyKVCache) and not leaf.empty():
            found = layers.setdefault(layer, [])
            found.append((leaf.max_size, own.record(layer, leaf.positions.shape[1])))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__module__} bounds all its layers itself, so a policy "
            "decides nothing in it. Use another model."
        )
    return [_joined(found) for found in layers.values()]


def _joined(
    found: list[tuple[int | None, LayerRecord]],
) -> tuple[int | None, LayerRecord]:
    """The caches of one layer as if they were heads of one."""
    if len(found) == 1:
        return found[0]
    records = [record for _, record in found]
    scores = [r.scores for r in records if r.scores is not None]
    return found[0][0], LayerRecord(
        records[0].layer,
        np.concatenate([r.evicted for r in records]),
        np.concatenate(scores) if len(scores) == len(records) else None,
    )


class _Notes:
    """What was seen of one cache, with n tokens in all."""

    def __init__(self, n: int):
        self._n = n
        self._evicted: Any = None
        self._scores: Any = None
        self._times = np.zeros(n, np.int32)
        self._first, self._last = np.full((2, n), -1, np.int32)
        self._blocks: list[tuple[Any, Any]] = []

    def evicted(self, steps: Any, positions: mx.array, *scores: mx.array) -> None:
        """Note what was evicted after steps [n]; positions, scores: [1, H', n]."""
        places = np.array(positions[0])
        if self._evicted is None:
            self._evicted = np.full((len(places), self._n), self._n, np.int32)
        when = np.broadcast_to(steps.astype(np.int32), places.shape)
        np.put_along_axis(self._evicted, places, when, axis=1)
        if scores and scores[0] is not None:
            if self._scores is None:
                self._scores = np.full(self._evicted.shape, np.nan, np.float32)
            np.put_along_axis(self._scores, places, np.array(scores[0][0]), axis=1)

    def came_back(self, steps: Any, positions: mx.array) -> None:
        """Note what could be read at steps [n]; positions: [1, heads, n * slots]."""
        places = np.array(positions[0])
        places = places.reshape(len(places), len(steps), -1)
        rows = np.broadcast_to(np.arange(len(steps))[None, :, None], places.shape)
        there = places >= 0
        # A token that several heads read came back once.
        read = np.zeros((len(steps), self._n + -self._n % RECALL_BLOCK), np.bool_)
        read[rows[there], places[there]] = True
        found = np.flatnonzero(read.any(axis=0))
        self._times[found] += read[:, found].sum(axis=0, dtype=np.int32)
        new = found[self._first[found] < 0]
        self._first[new] = steps[read[:, new].argmax(axis=0)]
        self._last[found] = steps[len(steps) - 1 - read[::-1, found].argmax(axis=0)]
        row, block = np.nonzero(read.reshape(len(steps), -1, RECALL_BLOCK).any(axis=2))
        self._blocks.append((steps[row], block))

    def record(self, layer: int, heads: int) -> LayerRecord:
        """All of it; heads: how many, if nothing was evicted."""
        evicted = self._evicted
        if evicted is None:
            evicted = np.full((heads, self._n), self._n, np.int32)
        return LayerRecord(layer, evicted, self._scores, self._recalled())

    def _recalled(self) -> Recalled | None:
        if not self._blocks:
            return None
        step, block = (np.concatenate(a) for a in zip(*self._blocks, strict=True))
        counts = np.bincount(step, minlength=self._n)
        blocks = np.full((self._n, counts.max(initial=0)), -1, np.int32)
        # In order of step, and of block in each: how many of the step come before.
        before = np.cumsum(counts) - counts
        blocks[step, np.arange(len(step)) - before[step]] = block
        return Recalled(self._times, self._first, self._last, blocks)
