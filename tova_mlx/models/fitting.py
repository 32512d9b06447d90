"""Storage formats fitted to a model, by what it makes of a few random tokens.

A conversation's own beginning would do as well (docs/results.md), but a first prompt
may have ten tokens, come in chunks of any size, or be one row of a batch of several;
what is taken from the model is the same for all of them.
"""

from collections.abc import Callable
from typing import Any
from weakref import finalize

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..hooks.layers import leaves
from ..storage.formats import Storage

# Tokens that formats are fitted to: rotary embeddings turn what keys share, so a mean
# of fewer would be right near the beginning only.
_TOKENS = 512
# By the identity of models, as long as they live.
_known: dict[int, dict[Storage, list[Storage]]] = {}


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
        known[storage] = [storage]
        if storage.fits:
            caches = caches_of(model)
            model(_tokens(model), cache=caches)
            known[storage] = [_fit(storage, cache) for cache in leaves(caches)]
    return known[storage]


def _tokens(model: nn.Module) -> mx.array:
    """The same tokens every time [1, n], as far apart as the vocabulary allows."""
    tables = (nn.Embedding, nn.QuantizedEmbedding)
    sizes = [len(m.weight) for m in model.modules() if isinstance(m, tables)]
    return mx.random.randint(
        0, max(sizes, default=1), (1, _TOKENS), key=mx.random.key(0)
    )


def _fit(storage: Storage, cache: Any) -> Storage:
    if not isinstance(cache, mlx_lm_cache.KVCache) or cache.empty():
        return storage
    keys, values = cache.state[:2]
    assert keys is not None
    assert values is not None
    return storage.fitted(keys, values)
