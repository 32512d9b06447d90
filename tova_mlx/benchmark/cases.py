"""The caches that are compared, and how many of their bytes a decode step reads.

`full` is mlx-lm's own cache of the model, as it is without this package; `rotating` is
the same with mlx-lm's `RotatingKVCache`. All others are as `tova-mlx generate` makes
them.
"""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..caches.layer import PolicyKVCache
from ..evaluation.budgets import tokens_kept
from ..evaluation.reading import new_cache
from ..evaluation.results import Setting
from ..hooks.layers import leaves
from ..models.report import trace
from ..storage.entries import nbytes
from ..storage.fields import PER_SLOT
from .baselines import FULL, KEEP, ROTATING


def caches_of(model: nn.Module, setting: Setting) -> list[Any]:
    """New caches of a setting, that of mlx-lm's for `full` and `rotating`.

    Ours have no journal, as those of `generate` and `chat`.
    """
    if setting == FULL:
        return mlx_lm_cache.make_prompt_cache(model)
    if setting.policy == ROTATING:
        caches = mlx_lm_cache.make_prompt_cache(model)
        return [_rotating(cache, setting.max_kv_size) for cache in caches]
    return new_cache(model, setting, journal=0)


def _rotating(cache: Any, size: int | None) -> Any:
    if type(cache) is mlx_lm_cache.CacheList:
        return mlx_lm_cache.CacheList(*(_rotating(c, size) for c in cache.caches))
    if type(cache) is not mlx_lm_cache.KVCache:
        return cache
    # As mlx-lm makes them for its own max_kv_size.
    return mlx_lm_cache.RotatingKVCache(size, keep=KEEP)


def tokens_of(model: nn.Module, size: Any, setting: Setting, *, context: int) -> int:
    """Return tokens per layer for a size, see `evaluation.budgets.tokens_kept`."""
    if setting.policy == ROTATING:
        # Keys and values and nothing else, as in our window.
        setting = setting._replace(policy="window")
    return tokens_kept(model, size, setting, context=context)


def can_fill(caches: Iterable[Any]) -> bool:
    """Whether all layers have mlx-lm's plain caches, which `fill` can fill."""
    return all(type(cache) is mlx_lm_cache.KVCache for cache in leaves(caches))


def fill(model: nn.Module, caches: list[Any], n_tokens: int) -> None:
    """Put random keys and values of so many tokens into plain, empty caches.

    What a decode step costs does not depend on the numbers that it reads.
    """
    if n_tokens == 0:
        return
    shapes = trace(model, mlx_lm_cache.make_prompt_cache(model))
    for cache, shape in zip(leaves(caches), leaves(shapes), strict=True):
        if shape.keys is None:
            continue
        keys, values = (
            mx.random.normal((1, a.shape[1], n_tokens, a.shape[3]), a.dtype)
            for a in (shape.keys, shape.values)
        )
        cache.update_and_fetch(keys, values)
        mx.eval(cache.state)


def bytes_read(caches: Iterable[Any]) -> int:
    """Return the bytes of the caches that a decode step reads at least.

    Keys and values held, and of ours what is known of each slot. Not the journal, which
    is only written to, and not an archive.
    """
    return sum(map(_bytes_read, leaves(caches)))


def _bytes_read(cache: Any) -> int:
    if cache.empty():
        return 0
    if isinstance(cache, PolicyKVCache):
        slots = cache.slots
        there = sum(nbytes(getattr(slots, name)) for name in PER_SLOT)
        return there * slots.taken // slots.keys.shape[2]
    if isinstance(cache, (mlx_lm_cache.KVCache, mlx_lm_cache.RotatingKVCache)):
        assert cache.keys is not None
        return cache.nbytes * cache.size() // cache.keys.shape[2]
    return int(cache.nbytes)
