"""Storage formats fitted to a model, by what it makes of a few random tokens.

A conversation's own beginning would do as well (docs/results.md), but a first prompt
may have ten tokens, come in chunks of any size, or be one row of a batch of several;
what is taken from the model is the same for all of them.

Where a few layers are far more sensitive than the others, they get wider formats: the
first of Qwen2.5-0.5B's 24 layers has four fifths of what rounding all keys to 6 bits
does to the logits.
"""

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any
from weakref import finalize

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..hooks import dispatcher, replacing
from ..hooks.layers import leaves
from ..storage.formats import Storage

# Tokens that formats are fitted to: rotary embeddings turn what keys share, so a mean
# of fewer would be right near the beginning only.
_TOKENS = 512
# The newest queries, by which a layer's noise is measured.
_QUERIES = 64
# A layer is widened whose noise is so many times the median's; at most one of so many
# is, the noisiest first.
_LOUD, _ONE_OF = 4, 10
# By the identity of models, as long as they live.
_known: dict[int, dict[Storage, list[Storage]]] = {}


class _Seen(mlx_lm_cache.KVCache):
    """mlx-lm's cache, and the first queries that attended to it, scaled."""

    queries: mx.array | None = None

    def attend(
        self, queries: mx.array, keys: Any, values: Any, *, scale: float, **how: Any
    ) -> mx.array:
        if self.queries is None:
            self.queries = queries[:, :, -_QUERIES:] * scale
        theirs = replacing.original(dispatcher.dispatch)
        return theirs(queries, keys, values, None, scale, **how)


def fitted(
    model: nn.Module, storage: Storage, caches_of: Callable[[nn.Module], list[Any]]
) -> list[Storage]:
    """Return a storage for each cache of a model; taken once per model and storage.

    caches_of: the model's own new caches.
    """
    if id(model) not in _known:
        _known[id(model)] = {}
        finalize(model, _known.pop, id(model), None)
    known = _known[id(model)]
    if storage not in known:
        known[storage] = _fit(model, storage, caches_of) if storage.fits else [storage]
    return known[storage]


def _fit(
    model: nn.Module, storage: Storage, caches_of: Callable[[nn.Module], list[Any]]
) -> list[Storage]:
    caches = caches_of(model)
    for cache in leaves(caches):
        if type(cache) is mlx_lm_cache.KVCache:
            cache.__class__ = _Seen
    dispatcher.install()
    model(_tokens(model), cache=caches)
    found, noises = [], {}
    for i, cache in enumerate(leaves(caches)):
        found.append(storage)
        if isinstance(cache, _Seen) and not cache.empty():
            keys, values = (
                a.astype(mx.float32) for a in cache.state[:2] if a is not None
            )
            found[i] = storage.fitted(keys, values)
            if cache.queries is not None:
                noises[i] = _noise(found[i], keys, cache.queries)
    for i in _loud(noises):
        found[i] = found[i].widened()
    return found


def _tokens(model: nn.Module) -> mx.array:
    """The same tokens every time [1, n], as far apart as the vocabulary allows."""
    tables = (nn.Embedding, nn.QuantizedEmbedding)
    sizes = [len(m.weight) for m in model.modules() if isinstance(m, tables)]
    return mx.random.randint(
        0, max(sizes, default=1), (1, _TOKENS), key=mx.random.key(0)
    )


def _noise(storage: Storage, keys: mx.array, queries: mx.array) -> float:
    """How far storing keys moves the logits of these queries: its root mean square."""
    assert storage.keys is not None
    keys = keys.astype(mx.float32)
    moved = storage.keys.quantize(keys).dequantized() - keys
    batch, heads, _, width = keys.shape
    asked = queries.astype(mx.float32).reshape(batch, heads, -1, width)
    return float(mx.sqrt((asked @ moved.swapaxes(2, 3)).square().mean()))


def _loud(noises: dict[int, float]) -> Iterable[int]:
    """The layers to widen."""
    if not noises:
        return []
    usual = median(noises.values())
    loud = sorted(noises, key=lambda i: -noises[i])[: len(noises) // _ONE_OF]
    return [i for i in loud if noises[i] > _LOUD * usual]
